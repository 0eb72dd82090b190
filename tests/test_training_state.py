"""Training leaves alone what is not its own, and what it averages belongs together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from by_hand import mlp
from small import digits, small_vae
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import capture
from pyro_vae.capture import CaptureWarning
from pyro_vae.programs.trace import draw_terms
from pyro_vae.seeding import generator, seeded
from pyro_vae.training.average import Average
from pyro_vae.training.modes import in_training


@pytest.fixture(autouse=True)
def _generators_put_back() -> Iterator[None]:
    with seeded(0):
        yield


class ByHand(nn.Module):
    """x ~ N(decoder(z), 1), of any two networks."""

    def __init__(self, encoder: nn.Module | None = None, decoder: nn.Module | None = None, dim: int = 4) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder or nn.Linear(dim, 4), decoder or nn.Linear(2, dim)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw) + 1e-3).to_event(1))


def normed(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 4))


def data(n: int = 64, dim: int = 4) -> Tensor:
    return torch.randn(n, dim, generator=generator("test of training's state")) * 2 + 1


# Modes, frozen parts, the user's tensors.


def test_a_submodule_in_evaluation_mode_stays_in_it() -> None:
    program = ByHand(normed())
    program.encoder.eval()
    kept = {n: t.clone() for n, t in program.encoder.named_buffers()}
    modes: list[bool] = []
    program.decoder.register_forward_pre_hook(lambda m, args: modes.append(m.training))
    pv.fit(program, data(), epochs=2, batch_size=16)
    assert not any(m.training for m in program.encoder.modules())
    assert program.training
    assert program.decoder.training
    assert all(torch.equal(t, kept[n]) for n, t in program.encoder.named_buffers())
    assert any(modes)


def test_a_program_in_evaluation_mode_trains_and_is_put_back() -> None:
    program = ByHand(normed()).eval()
    pv.fit(program, data(), epochs=2, batch_size=16, average=None)
    assert not any(m.training for m in program.modules())
    assert int(program.encoder[1].num_batches_tracked) == 8  # type: ignore[index]


def test_a_train_method_of_the_users_is_asked() -> None:
    class KeepsNorms(ByHand):
        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self.encoder.eval()
            return self

    program = KeepsNorms(normed())
    assert program.encoder.training
    with in_training(program):
        assert not program.encoder[1].training  # type: ignore[index]
        assert program.decoder.training
    assert program.encoder.training


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_frozen_parameters_stay_and_thawed_ones_move(optimizer: str) -> None:
    program = ByHand(mlp(4, 6, 4))
    program.encoder.requires_grad_(False)
    before = {n: p.clone() for n, p in program.named_parameters()}
    seen: list[bool] = []

    def thaw(metrics: dict[str, Any]) -> None:
        seen.append(all(torch.equal(p, before[f"encoder.{n}"]) for n, p in program.encoder.named_parameters()))
        program.encoder[0].requires_grad_(metrics["epoch"] == 2)  # type: ignore[index]

    pv.fit(program, data(), epochs=4, batch_size=16, optimizer=optimizer, callback=thaw)
    assert seen == [True, True, False, False]
    now = dict(program.named_parameters())
    assert torch.equal(now["encoder.2.weight"], before["encoder.2.weight"])
    assert not now["encoder.0.weight"].requires_grad
    assert all(p.grad is None for p in now.values())


def test_a_thawed_run_resumes_to_the_bit(tmp_path: Path) -> None:
    def run(path: Path, stop: int | None, resume: bool = False) -> dict[str, Tensor]:
        with seeded(1):
            program = ByHand(mlp(4, 6, 4))
        program.encoder.requires_grad_(resume)

        def callback(metrics: dict[str, Any]) -> bool:
            program.encoder.requires_grad_(True)
            return metrics["epoch"] == stop

        pv.fit(program, data(), epochs=4, batch_size=16, callback=callback, out=path, resume=resume)
        return {n: t.clone() for n, t in program.state_dict().items()}

    alone = run(tmp_path / "alone", None)
    run(tmp_path / "stopped", 2)
    resumed = run(tmp_path / "stopped", None, resume=True)
    assert all(torch.equal(t, resumed[n]) for n, t in alone.items())


def test_no_gradient_reaches_the_users_data() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = data().requires_grad_()
        pv.fit(ByHand(), x, epochs=1)
        rows = torch.utils.data.TensorDataset(x)
        pv.fit(ByHand(), rows, epochs=1)
    assert x.grad is None
    assert x.requires_grad


# Moving averages and the statistics that belong to them.


def test_averaged_weights_have_their_own_statistics() -> None:
    """Running means, in standard deviations: those of the newest weights are off by 0.4 here, the limit is a twentieth of that.

    Variances depend on which rows were in a batch together, by up to 5 %, and are not compared.
    """
    layers = [
        nn.Linear(4, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 4),
    ]
    program, x = ByHand(nn.Sequential(*layers)), data(256)
    pv.fit(program, x, epochs=60, lr=0.1, schedule="constant", batch_size=32)
    norms = [m for m in program.modules() if isinstance(m, nn.BatchNorm1d)]
    kept = [m.running_mean.clone() for m in norms if m.running_mean is not None]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
    with torch.no_grad():
        for rows in x.split(32):
            draw_terms(program, rows, num_samples=1)
    for m, mean in zip(norms, kept, strict=True):
        assert float(((mean - m.running_mean) / m.running_var.sqrt()).abs().max()) < 0.02  # type: ignore[union-attr, operator]


class RunningScale(nn.Module):
    """Divides by a running scale that is kept by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.scale.lerp_(x.reshape(-1, x.shape[-1]).std(0), 0.1)  # type: ignore[operator]
        return x / self.scale  # type: ignore[operator]


def test_other_running_buffers_are_averaged_and_settle() -> None:
    program = nn.Sequential(nn.Linear(2, 2), RunningScale(2), nn.BatchNorm1d(2))
    average = Average(program, ["1.scale", "2.running_mean", "2.num_batches_tracked"])
    assert average.moving == ["1.scale"]  # BatchNorm's are found anew
    x = torch.randn(64, 2)
    raw = {n: t.clone() for n, t in program.state_dict().items()}
    with torch.no_grad():
        program[1].scale.fill_(3.0)
        program[0].weight.add_(1.0)
    average.follow(0.5)
    torch.testing.assert_close(average.values["1.scale"], torch.full((2,), 2.0))
    newest = {n: t.clone() for n, t in program.state_dict().items()}
    average.settle(lambda: [program(x) for _ in range(60)] and None)
    assert all(torch.equal(t, newest[n]) for n, t in program.state_dict().items())
    torch.testing.assert_close(average.values["1.scale"], torch.full((2,), 2.0))
    with average.swapped():
        torch.testing.assert_close(program[0].weight, (raw["0.weight"] + newest["0.weight"]) / 2)
        h = program[0](x)
        torch.testing.assert_close(program[1].scale, h.std(0), rtol=1e-2, atol=1e-2)
        assert int(program[2].num_batches_tracked) == 60
    assert all(torch.equal(t, newest[n]) for n, t in program.state_dict().items())
    assert program[2].momentum == 0.1


def test_a_run_with_moving_buffers_resumes_to_the_bit(tmp_path: Path) -> None:
    def run(path: Path, stop: int | None, resume: bool = False) -> dict[str, Tensor]:
        with seeded(1):
            program = ByHand(nn.Sequential(normed(), RunningScale(4)))
        stopped = lambda metrics: metrics["epoch"] == stop  # noqa: E731
        pv.fit(program, data(), epochs=4, batch_size=16, callback=stopped, out=path, resume=resume)
        return {n: t.clone() for n, t in program.state_dict().items()}

    alone = run(tmp_path / "alone", None)
    run(tmp_path / "stopped", 2)
    resumed = run(tmp_path / "stopped", None, resume=True)
    assert all(torch.equal(t, resumed[n]) for n, t in alone.items())


# Pyro's own modules, and devices without float64.


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda p: p.decoder.register_buffer("shift", torch.ones(4)), "a parameter or buffer was replaced"),
        (lambda p: setattr(p.decoder.bias, "data", p.decoder.bias.data + 1), "a parameter or buffer was replaced"),
        (lambda p: setattr(p, "decoder", nn.Linear(2, 4)), "the submodule 'decoder' was replaced"),
    ],
    ids=["a buffer", "a parameter's data", "a submodule"],
)
@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")
def test_a_compiled_estimate_follows_what_progress_changes(
    change: Callable[[Any], Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "compiled", lambda graph, example: lambda tensors: graph(*tensors))

    def estimate(compile: str) -> Tensor:
        with seeded(0):
            program = ByHand()
            once = iter([change])
            progress = lambda images: next(once, lambda p: None)(program)  # noqa: E731
            return pv.log_likelihood(
                program, data(20), num_samples=64, chunk_size=640, compile=compile, progress=progress
            ).log_likelihood

    plain = estimate("off")
    with pytest.warns(CaptureWarning, match=told):
        torch.testing.assert_close(estimate("on"), plain, rtol=1e-5, atol=1e-5)


def test_nothing_asks_a_device_for_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that were not fetched to the CPU have no float64 here, as on an Apple GPU; the test stands in for one."""
    cpu, double = Tensor.cpu, Tensor.double
    fetched: set[int] = set()
    held: list[Tensor] = []

    def fetch(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        there = cpu(self, *args, **kwargs).clone()
        held.append(there)
        fetched.add(id(there))
        return there

    def refuse(self: Tensor) -> Tensor:
        if id(self) not in fetched and self.dtype is not torch.float64:
            raise TypeError("this device has no float64")
        return double(self)

    found = digits()
    vae = small_vae(found)
    x = found.observed("test")[:4]
    monkeypatch.setattr(Tensor, "cpu", fetch)
    monkeypatch.setattr(Tensor, "double", refuse)
    pv.fit(vae, found, steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pv.log_likelihood(vae, x, num_samples=50)
