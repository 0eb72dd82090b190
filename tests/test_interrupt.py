"""Ctrl-C and SIGTERM end training between two steps, with a checkpoint from which it goes on to the bit."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import commands
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.utils.data import Dataset

import pyro_vae as pv
from pyro_vae.errors import NumericalError
from pyro_vae.programs.walk import SmallerChunkWarning
from pyro_vae.seeding import generator, seeded
from pyro_vae.training.interrupts import Interrupted

CHECKED = (
    8  # items that fit reads before the first step, to run the program on; the others are looked at as they are read
)


class Rows(Dataset[Tensor]):
    """Rows of which one, the ``when``-th to be read, comes with a signal."""

    def __init__(self, when: int = -1, signum: int = signal.SIGINT) -> None:
        self.x = torch.rand(100, 6, generator=generator(0))
        self.left, self.signum = when, signum

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.signum)
        return self.x[index]


def program() -> Any:
    return pv.build("mlp", "diagonal", (6,), likelihood="normal", latent_dim=2, decoder="mlp:hidden=[8]", seed=3)


def fit(path: Path, data: Any, *, resume: bool = False, **settings: Any) -> pv.Run:
    return pv.fit(
        program(),
        data,
        epochs=3,
        batch_size=10,
        out=path,
        resume=resume,
        **{"compile": "off", "standardize": "off", **settings},
    )


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", [CHECKED + 15, CHECKED + 145])
def test_an_interrupted_run_resumes_to_the_bit(tmp_path: Path, when: int, signum: int) -> None:
    """In the first epoch, before any weights were kept, and in a later one."""
    settings = {"skip_gradients": 3.0} if signum == signal.SIGTERM else {}
    fit(tmp_path / "alone", Rows(), **settings)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=r"interrupted after step \d+ of 30; its checkpoint is in") as caught:
        fit(tmp_path / "run", Rows(when, signum), **settings)
    assert caught.value.status == 128 + signum
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    run = fit(tmp_path / "run", Rows(), resume=True, **settings)
    commands.require_same(tmp_path / "run", tmp_path / "alone")
    assert all(("skipped" in m) == bool(settings) for m in run.metrics)


@pytest.mark.slow
def test_a_compiled_run_resumes_within_an_epoch(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"compile": "on", "skip_gradients": 3.0}
    fit(tmp_path / "alone", Rows(), **settings)
    with pytest.raises(Interrupted):
        fit(tmp_path / "run", Rows(CHECKED + 155), **settings)
    fit(tmp_path / "run", Rows(), resume=True, **settings)
    commands.require_same(tmp_path / "run", tmp_path / "alone")


def test_the_second_signal_ends_at_once() -> None:
    from pyro_vae.training.interrupts import Interrupts

    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.pending == signal.SIGINT
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_caller_s_own_handler_is_left_alone() -> None:
    from pyro_vae.training.interrupts import Interrupts

    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: seen.append(signum))
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM]
        assert interrupts.pending is None
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_exit_status(tmp_path: Path, signum: int) -> None:
    path = tmp_path / "run"
    process = commands.start("train", "digits", "--epochs", "2000", "--out", str(path), "--quiet")
    while not (path / "metrics.jsonl").is_file() and process.poll() is None:
        pass
    process.send_signal(signum)
    status, _, err = process.finish()
    assert status == 128 + signum
    assert "interrupted after step" in err
    assert "Traceback" not in err
    pv.load(path)


class Broken(nn.Module):
    """A program whose scale, or whose gradient, goes wrong at a value of a parameter."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)
        self.raw = nn.Parameter(torch.zeros(()))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            if self.how == "masked":  # where it is drawn, this density is 0
                with poutine.mask(mask=False):
                    pyro.sample("left out", dist.Uniform(x.new_tensor(5.0), 6.0, validate_args=False))
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = self.decoder(z)
            if self.how == "gradient":
                loc = loc + (self.raw * 0).abs().sqrt()  # 0 with a derivative of 0 / 0
            scale = (self.raw - 1e3 * self.raw.square()).exp() if self.how in ("scale", "masked") else 1.0
            pyro.sample("x", dist.Normal(loc, scale, validate_args=False).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            if self.how == "masked":
                with poutine.mask(mask=False):
                    pyro.sample("left out", dist.Uniform(x.new_tensor(0.0), 1.0))
            loc, raw = self.encoder(x).chunk(2, -1)
            scale = raw.exp() if self.how == "guide" else nn.functional.softplus(raw)
            pyro.sample("z", dist.Normal(loc, scale, validate_args=False).to_event(1))


@pytest.mark.parametrize(
    ("how", "lr", "message"),
    [
        (
            "gradient",
            0.01,
            r"^a gradient is NaN or infinite at step 1: at the site 'x' .* the parameter at fault is 'raw'",
        ),
        ("scale", 0.5, r"^the loss is NaN or infinite at step \d+: at the site 'x' .* the parameter at fault is 'raw'"),
        ("masked", 0.5, r"^the loss is NaN or infinite at step \d+: at the site 'x' "),  # and not at the one left out
        (
            "guide",
            300.0,
            r"^the loss is NaN or infinite at step \d+: at the site 'z' .* parameter at fault is 'encoder",
        ),
    ],
)
def test_a_numerical_fault_is_named(how: str, lr: float, message: str, tmp_path: Path) -> None:
    x = torch.rand(200, 6, generator=generator(0))
    with seeded(0):
        broken, fresh = Broken(how), Broken(how)
    with pytest.raises(NumericalError, match=message + r".*lower lr, set clip_norm"):
        pv.fit(broken, x, epochs=5, batch_size=20, lr=lr, schedule="constant", out=tmp_path / "run")
    assert all(bool(torch.isfinite(p).all()) for p in broken.parameters())
    assert not (tmp_path / "run" / "weights.safetensors").exists() or pv.load(tmp_path / "run", program=fresh)


def test_the_last_good_checkpoint_is_kept(tmp_path: Path) -> None:
    """Weights that a step made infinite at an epoch's very end are not written: a row whose square is hardly a number, say."""

    class Late(Rows):
        def __getitem__(self, index: int) -> Tensor:
            self.left -= 1
            return self.x[index] * (1.8e19 if self.left == 0 else 1.0)

    with pytest.raises(NumericalError, match=r"at step 20.*; the checkpoint in .* is from epoch 1"):
        fit(tmp_path / "run", Late(CHECKED + 200))
    run = pv.load(tmp_path / "run")
    assert len(run.metrics) == 1
    assert all(bool(torch.isfinite(p).all()) for p in run.program.parameters())
    fit(tmp_path / "run", Rows(), resume=True)


@pytest.mark.parametrize("limit", [1, 7, 150])
def test_out_of_memory_in_evaluation_halves_the_chunk(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    from pyro_vae.evaluation import draws

    vae, x, num_samples = program(), torch.rand(9, 6, generator=generator(0)), 100 if limit > 1 else 10
    weigh, seen = draws.weigh, []

    def short(program: Any, x: Tensor, y: Tensor | None, num_samples: int, precision: str) -> Any:
        seen.append(len(x) * num_samples)
        if seen[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return weigh(program, x, y, num_samples, precision)

    monkeypatch.setattr(draws, "weigh", short)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = pv.log_likelihood(vae, x, num_samples=num_samples, chunk_size=4 * num_samples)
    told = [w for w in caught if issubclass(w.category, SmallerChunkWarning)]
    assert len(told) == 1
    assert f"out of memory with {4 * num_samples} images times samples" in str(told[0].message)
    assert result.chunk_size <= limit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = pv.log_likelihood(vae, x, num_samples=num_samples)
    assert len(result) == 9
    torch.testing.assert_close(result.log_likelihood, whole.log_likelihood, rtol=0.2, atol=2.0)


@pytest.mark.parametrize("moves", [pytest.param(m, marks=pytest.mark.slow) for m in ("ais", "bdmc", "nuts")])
def test_out_of_memory_on_the_way_halves_the_images(monkeypatch: pytest.MonkeyPatch, moves: str) -> None:
    """From the block that failed on; what is drawn is what a smaller chunk_size would have drawn."""
    from pyro_vae.analysis.mcmc import sample_chains
    from pyro_vae.evaluation.ais import annealed_log_likelihood
    from pyro_vae.evaluation.bdmc import bidirectional
    from pyro_vae.evaluation.unconstrained import Unconstrained

    vae, x = pv.build("ppca", "linear", (6,), latent_dim=2), torch.rand(9, 6, generator=generator(0))

    def run(chunk_size: int, progress: Any = None) -> tuple[Any, int | None]:
        if moves == "nuts":
            chains = sample_chains(vae, x, num_samples=5, num_warmup=5, chunk_size=chunk_size, progress=progress)
            return torch.from_numpy(chains.latents["z"]), chains.chunk_size
        options: dict[str, Any] = {
            "num_chains": 4,
            "num_distributions": 5,
            "chunk_size": chunk_size,
            "progress": progress,
        }
        if moves == "bdmc":
            return bidirectional(vae, 9, **options).gap, None
        result = annealed_log_likelihood(vae, x, **options)
        return result.log_likelihood, result.chunk_size

    done: list[float] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small, _ = run(8)
        densities = Unconstrained.densities

        def short(self: Any, u: torch.Tensor, **options: Any) -> Any:
            if u.shape[1] > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            return densities(self, u, **options)

        monkeypatch.setattr(Unconstrained, "densities", short)
        found, chunk_size = run(32, done.append)
    assert len([w for w in caught if issubclass(w.category, SmallerChunkWarning)]) == 1
    assert torch.equal(found, small)
    assert chunk_size in (None, 8)
    assert sum(done) == pytest.approx(9)


def test_no_memory_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyro_vae.evaluation import draws

    def short(*a: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(draws, "weigh", short)
    with pytest.warns(SmallerChunkWarning), pytest.raises(pv.UserError, match="one sample of one image"):
        pv.log_likelihood(program(), torch.zeros(3, 6), num_samples=8)
