"""Training beyond the defaults: optimizers, schedules, objectives, parts of minibatches, checkpoints, more epochs, events."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import conjugate
import numpy as np
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.cli.app import run as command
from pyro_vae.errors import UserError
from pyro_vae.programs.trace import draw_terms
from pyro_vae.seeding import generator
from pyro_vae.training.due import Due
from pyro_vae.training.optimizers import OPTIMIZERS, make_optimizer, parse_optimizer, state_of_one
from pyro_vae.training.schedule import Schedule
from pyro_vae.training.settings import Settings

PLAIN: dict[str, Any] = {"compile": "off", "device": "cpu", "average": None, "standardize": "off"}


def x(n: int = 64) -> Tensor:
    return torch.randn(n, 3, generator=generator("test: rows", n))


def vae(seed: int = 0) -> Any:
    return pv.build("ppca", "linear", (3,), latent_dim=2, seed=seed)


def weights(program: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in program.parameters()])


@pytest.mark.parametrize(
    "text",
    [
        "adamw:weight_decay=0.1,betas=[0.5,0.9]",
        "sgd:momentum=0.9,nesterov=true",
        "nadam",
        "adam:amsgrad=true",
        "asgd",
        "rprop",
    ],
)
def test_an_optimizer_by_name_and_options_steps_as_torchs_and_resumes(text: str, tmp_path: Path) -> None:
    """The same gradients through the optimizer made by hand end in the same weights, also resumed half way."""
    how: dict[str, Any] = {"batch_size": 32, "lr": 0.01, "schedule": "constant", "optimizer": text, **PLAIN}
    whole = pv.fit(vae(), x(), epochs=4, out=tmp_path / "a", **how)
    pv.fit(vae(), x(), epochs=2, out=tmp_path / "b", **how)
    half = pv.fit(vae(), x(), epochs=4, out=tmp_path / "b", resume=True, **how)
    assert torch.equal(weights(whole.program), weights(half.program))
    block = parse_optimizer(text)
    assert pv.load(tmp_path / "a").record["training"]["optimizer"] == block.model_dump()
    theirs = OPTIMIZERS[block.name]([torch.nn.Parameter(torch.ones(2, 2))], lr=0.01, **block.options)  # type: ignore[call-arg]
    ours = make_optimizer(parse_optimizer(text), 0.01, [torch.nn.Parameter(torch.ones(2, 2))])  # type: ignore[arg-type]
    for optimizer in (theirs, ours):
        for _ in range(3):
            p = optimizer.param_groups[0]["params"][0]
            p.grad = 2 * p.detach()
            optimizer.step()
    torch.testing.assert_close(theirs.param_groups[0]["params"][0], ours.param_groups[0]["params"][0])


def test_every_optimizer_of_torchs_that_needs_no_closure_is_known() -> None:
    assert {"adam", "radam", "adadelta", "nadam", "rprop", "asgd"} <= set(OPTIMIZERS)
    assert not {"lbfgs", "sparseadam", "optimizer"} & set(OPTIMIZERS)
    assert pv.fit(vae(), x(), epochs=1, optimizer=torch.optim.RAdam, **PLAIN).record["training"]["optimizer"] == "radam"
    like = torch.nn.Parameter(torch.zeros(3, 4))
    assert set(state_of_one(parse_optimizer("adam:amsgrad=true"), 1e-3, like)) == {  # type: ignore[arg-type]
        "step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq",
    }  # fmt: skip
    for wrong, message in (
        ("adaam", "unknown optimizer 'adaam': did you mean"),
        ("adamw:weight=1", "has no option 'weight'"),
        ("adam:lr=1", "lr is a setting of its own"),
        ("adamw:weight_decay=-1", "Invalid weight_decay"),
        ("sgd:nesterov=true", "momentum"),
        (torch.optim.Adam([like]), "give its name and options, 'adam:key=value'"),
        (3, "expected a name"),
    ):
        with pytest.raises(UserError, match=message):
            pv.fit(vae(), x(), epochs=1, optimizer=wrong, **PLAIN)


def test_the_schedules_of_a_paper_can_be_stated() -> None:
    """Burda, Grosse & Salakhutdinov 2016: 3^i passes at 0.001 * 10^(-i/7), i = 0, ..., 7; in one word, and as a function."""
    settings = Settings(lr=1e-3, schedule="stages", epochs=3280)  # type: ignore[arg-type]
    by_name, passes = Schedule(settings, 3280), [i for i in range(8) for _ in range(3**i)]
    assert [by_name.at(n).lr for n in range(3280)] == pytest.approx([1e-3 * 10 ** (-i / 7) for i in passes])
    asked = []

    def burda(step: int) -> float:
        asked.append(step)
        return 1e-3 * 10 ** (-passes[step] / 7)

    run = pv.fit(vae(), x(), epochs=3, batch_size=32, schedule=burda, **PLAIN)
    assert asked[:6] == [0, 1, 0, 2, 3, 2] or set(asked) == set(range(6))
    assert run.record["training"]["schedule"]["name"] == "function"
    assert run.metrics[1]["lr"] == pytest.approx(1e-3 * 10 ** (-1 / 7))
    cosine = Schedule(Settings(lr=1.0, schedule="cosine:final=0.1,warmup=0.1"), 100)  # type: ignore[arg-type]
    assert cosine.at(4).lr == pytest.approx(0.5, rel=0.01)
    assert cosine.at(100).lr == pytest.approx(0.1)
    assert Schedule(Settings(lr=1.0, schedule="exponential:final=0.01"), 10).at(5).lr == pytest.approx(0.1)  # type: ignore[arg-type]
    for wrong, message in (
        ("cosinus", "unknown schedule 'cosinus': did you mean"),
        ("cosine:end=1", "has no option 'end'"),
        ("one-cycle:rise=2", "rise = 2 is out of range"),
        (lambda step: "fast", r"schedule\(0\): expected a learning rate"),
        (lambda step: -1.0, r"schedule\(0\) = -1.0"),
    ):
        with pytest.raises(UserError, match=message):
            pv.fit(vae(), x(), epochs=1, schedule=wrong, **PLAIN)


def test_an_objective_of_ones_own_is_a_function(tmp_path: Path) -> None:
    def own(program: Any, x: Tensor, y: Tensor | None, step: Any) -> Tensor:
        return -draw_terms(program, x, y, num_samples=1).log_weight.mean()

    how: dict[str, Any] = {"epochs": 2, "batch_size": 32, **PLAIN}
    ours = pv.fit(vae(), x(), objective=own, out=tmp_path / "run", **how)
    theirs = pv.fit(vae(), x(), objective="elbo", **how)
    torch.testing.assert_close(weights(ours.program), weights(theirs.program), rtol=1e-4, atol=1e-6)
    assert "function" in str(pv.load(tmp_path / "run").record["training"]["objective"])
    assert "kept epoch 2" in str(ours.kept)
    with pytest.raises(UserError, match=r"the objective was a function, .*own: hand it over"):
        pv.fit(vae(), x(), objective={"name": "function", "of": "own"}, **how)
    for wrong, message in (
        (lambda program: 0, "expected a function of program and x"),
        (lambda program, x: x, "expected a scalar tensor, the mean over rows, got a tensor of shape"),
        (lambda program, x: 1.0, "got float"),
    ):
        with pytest.raises(UserError, match=message):
            pv.fit(vae(), x(), objective=wrong, **how)


def test_parts_of_a_minibatch_add_up_to_it() -> None:
    def fixed(program: Any, x: Tensor) -> Tensor:
        """A loss without noise."""
        return (program.decoder(program.encoder(x)[..., :2]) - x).square().sum(-1).mean()

    def fitted(**extra: Any) -> Tensor:
        program = conjugate_like()
        pv.fit(program, x(), epochs=2, batch_size=32, objective=fixed, **PLAIN, **extra)
        return weights(program)

    for parts in (2, 3, 32):
        torch.testing.assert_close(fitted(accumulate=parts), fitted(), rtol=1e-5, atol=1e-6)
    run = pv.fit(vae(), x(), epochs=20, batch_size=32, accumulate=4, lr=0.02, **PLAIN)
    assert run.metrics[-1]["train_loss"] < run.metrics[0]["train_loss"]
    with pytest.raises(UserError, match="accumulate"):
        pv.fit(vae(), x(), epochs=1, accumulate=0, **PLAIN)
    with pytest.raises(UserError, match="compares the images of a batch"):
        pv.fit(vae(), x(), epochs=1, accumulate=2, objective="mmd", **PLAIN)


def conjugate_like() -> Any:
    """A program with an encoder and a decoder to be called."""

    class Program(conjugate.LinearGaussian):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.float()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.encoder, self.decoder = torch.nn.Linear(3, 4), torch.nn.Linear(2, 3)

    return Program()


def test_a_finished_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how: dict[str, Any] = {"batch_size": 32, "schedule": "constant", **PLAIN}
    whole = pv.fit(vae(), x(), epochs=5, **how)
    pv.fit(vae(), x(), epochs=2, out=tmp_path / "run", **how)
    run = pv.fit(vae(), x(), epochs=5, out=tmp_path / "run", resume=True, **how)
    assert len(run.metrics) == len(pv.load(tmp_path / "run").metrics) == 5
    assert torch.equal(weights(whole.program), weights(run.program))
    assert pv.load(tmp_path / "run").record["lineage"]["epochs_before"] == [2]
    with pytest.raises(UserError, match=r"training.epochs was 5 and is now 4.*more epochs are taken"):
        pv.fit(vae(), x(), epochs=4, out=tmp_path / "run", resume=True, **how)
    data = tmp_path / "x.npy"
    np.save(data, x(100).numpy())
    arguments = ["--epochs", "1", "--compile", "off", "--device", "cpu", "--quiet", "--out", str(tmp_path / "c")]
    more = [
        "--dtype",
        "float64",
        "--optimizer",
        "adamw:weight_decay=0.1",
        "--schedule",
        "cosine:warmup=0.1",
        "--accumulate",
        "2",
    ]
    assert (
        command(
            ["train", str(data), "--model", "ppca", "--guide", "linear", "--checkpoint-epochs", "1", *more, *arguments]
        )
        == 0
    )
    loaded = pv.load(tmp_path / "c")
    assert loaded.record["program"]["dtype"] == "float64"
    assert next(loaded.program.parameters()).dtype == torch.float64
    assert (
        command(["train", "--resume", "--epochs", "3", "--quiet", "--device", "cpu", "--out", str(tmp_path / "c")]) == 0
    )
    assert len(pv.load(tmp_path / "c").metrics) == 3
    assert command(["evaluate", str(tmp_path / "c"), "--samples", "20", "--quiet"]) == 0
    capsys.readouterr()
    for wrong, message in (
        (["--dtype", "half"], "--dtype half"),
        (["--optimizer", "lbfgs"], "unknown optimizer 'lbfgs'"),
    ):
        assert command(["train", str(data), *wrong, "--out", str(tmp_path / "d")]) == 2
        assert message in capsys.readouterr().err


def test_checkpoints_are_made_when_they_are_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("pyro_vae.training.due._now", lambda: now[0])
    due = Due(epochs=3)
    assert [due.after(epoch, watched=True) for epoch in (1, 2, 3, 4, 6)] == [False, False, True, False, True]
    due = Due(minutes=2)
    assert not due.after(1, watched=False)
    now[0] = 121.0
    assert due.after(2, watched=False)
    due.made(121.0)
    assert not due.after(3, watched=False)
    assert due.seconds == 120
    made = []
    monkeypatch.setattr(
        "pyro_vae.training.loop.save_checkpoint", lambda path, trainer, within: made.append(trainer.epoch)
    )
    pv.fit(vae(), x(), epochs=7, checkpoint_epochs=3, out=tmp_path / "run", **PLAIN)
    assert made == [3, 6, 7]
    for wrong in ({"checkpoint_epochs": 0}, {"checkpoint_minutes": -1.0}, {"checkpoint_minutes": float("inf")}):
        with pytest.raises(UserError, match="checkpoints: expected at least 1 epoch"):
            pv.fit(vae(), x(), epochs=1, **wrong, **PLAIN)  # type: ignore[arg-type]


def test_event_files_are_written_beside_a_callback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, list[Any]] = {}

    class SummaryWriter:
        def __init__(self, path: str) -> None:
            self.scalars = written.setdefault(path, [])

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.scalars.append((name, step))

        def flush(self) -> None:
            pass

    module: Any = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    seen: list[Any] = []
    pv.fit(vae(), x(), epochs=2, tensorboard=True, callback=seen.append, out=tmp_path / "run", **PLAIN)
    pv.fit(vae(), x(), epochs=1, tensorboard=tmp_path / "elsewhere", **PLAIN)
    assert len(seen) == 2
    assert [name for name, _ in written[str(tmp_path / "run" / "tensorboard")]].count("train_loss") == 2
    assert list(written) == [str(tmp_path / "run" / "tensorboard"), str(tmp_path / "elsewhere")]
    with pytest.raises(UserError, match="give out, or a folder"):
        pv.fit(vae(), x(), epochs=1, tensorboard=True, **PLAIN)
