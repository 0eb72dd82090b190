"""Declared programs beside the VAE: a conditional one, and a semi-supervised one; a new one is a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae import registry
from pyro_vae.programs.columns import packed
from pyro_vae.programs.conditional import Conditional
from pyro_vae.programs.contract import admit
from pyro_vae.registry import register
from pyro_vae.seeding import seeded

# programs of two latents, trained for a second: what weights say of their guides is not looked at here
pytestmark = pytest.mark.filterwarnings("ignore:Pareto k")

SMALL: dict[str, Any] = {"encoder": "mlp:hidden=[8]", "decoder": "mlp:hidden=[8]", "latent_dim": 2}
EVENT = (1, 4, 4)


def images(rows: int) -> tuple[Tensor, Tensor]:
    """Images that their labels, of three, make: and the labels."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (rows,), generator=random)
    means = torch.tensor([0.1, 0.5, 0.9])[labels][:, None].expand(rows, 16)
    return torch.bernoulli(means, generator=random).reshape(rows, *EVENT), labels


@pytest.mark.parametrize("options", ["in_prior=true,embedding=3,in_guide=false", "in_decoder=false,in_prior=true"])
def test_a_conditional_program_learns_what_the_label_is_worth(options: str) -> None:
    """Every parameter has a gradient; trained, the right label makes data more probable; each part can be switched off."""
    x, y = images(200)
    program = pv.build("conditional", "diagonal", EVENT, program=f"conditional:classes=3,{options}", **SMALL)
    run = pv.fit(program, (x, y), epochs=8, batch_size=20, lr=0.03)
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in program.parameters())
    right = pv.log_likelihood(run.program, x, y, num_samples=50)
    wrong = pv.log_likelihood(run.program, x, (y + 1) % 3, num_samples=50)
    assert right.log_likelihood.mean() > wrong.log_likelihood.mean() + 1
    assert pv.sample(run.program, 5, torch.full((5,), 2)).shape == (5, *EVENT)
    with pytest.raises(pv.UserError, match="y in row 0"):
        pv.log_likelihood(run.program, x[:2], torch.tensor([3, 0]))


def test_covariates_are_numbers() -> None:
    """A vector of numbers stands for y; a program that is told of neither, or of both, is refused."""
    x, y = images(20)
    given = torch.stack([y / 2, 1 - y / 2], 1)
    program = pv.build("conditional", "diagonal", EVENT, program="conditional:covariates=2", **SMALL)
    assert pv.log_likelihood(program, x, given, num_samples=30).log_likelihood.shape == (20,)
    for wrong in ("conditional", "conditional:classes=3,covariates=2", "conditional:classes=3,in_decoder=false"):
        with pytest.raises(pv.UserError, match="conditional"):
            pv.build("conditional", "diagonal", EVENT, program=wrong, **SMALL)
    with pytest.raises(pv.UserError, match="made of the guide"):
        pv.build("conditional", "diagonal", EVENT, prior="vamp:components=3", **SMALL)


@pytest.mark.slow
def test_a_semi_supervised_program_classifies(tmp_path: Path) -> None:
    """Of 300 images 30 have labels: most others are classified; the run is rebuilt from its directory alone."""
    x, y = images(300)
    record = pv.Record({"x": x, "label": y}, {"label": torch.arange(300) < 30})
    program = pv.build("semi-supervised", "diagonal", EVENT, program="semi-supervised:classes=3", **SMALL)
    run = pv.fit(
        program, record, epochs=15, batch_size=30, lr=0.03, objective="elbo:label_weight=10", out=tmp_path / "run"
    )
    unlabelled = pv.Record({"x": x[30:130], "label": y[30:130]}, {"label": torch.zeros(100, dtype=torch.bool)})
    found = pv.impute(run.program, unlabelled, num_samples=30, num_draws=2).probability["label"]
    assert float((found.argmax(1) == y[30:130]).double().mean()) > 0.8
    again = pv.load(tmp_path / "run")
    a, b = (pv.log_likelihood(p, unlabelled, num_samples=30).log_likelihood for p in (run.program, again.program))
    assert torch.equal(a, b)
    alone = pv.log_likelihood(
        run.program, x[30:130], num_samples=30
    )  # without a column, the label is a latent of each row
    assert alone.log_likelihood.shape == (100,)


@pytest.mark.parametrize("name", ["conditional", "semi-supervised"])
def test_every_parameter_of_a_declared_program_is_trained(name: str) -> None:
    """By name, a gradient that is finite and not all zero."""
    from pyro_vae.objectives.elbo import ELBO

    x, y = images(12)
    program: Any = pv.build(name, "diagonal", EVENT, program=f"{name}:classes=3", **SMALL)
    data = (
        (x, y) if name == "conditional" else (packed(program, pv.Record({"x": x, "label": y}, {"label": y == 0})), None)
    )
    admit(program, *data)
    with seeded(0):
        _, surrogate = ELBO()(program, *data)
    surrogate.backward()
    for parameter, p in program.named_parameters():
        assert p.grad is not None, parameter
        assert bool(p.grad.isfinite().all()), parameter
        assert bool(p.grad.any()), parameter


def test_a_new_program_is_one_class() -> None:
    """What registers itself can be declared, with its options, and nothing else knows of it."""

    @register("programs", "twice-conditional")
    class Twice(Conditional):
        """The same under another name."""

    try:
        spec = pv.Spec.from_dict({"model": {"program": {"name": "twice-conditional", "classes": 3}}})
        assert pv.Spec.from_toml(spec.to_toml()) == spec
        program = pv.build({"program": "twice-conditional:classes=3"}, "diagonal", EVENT, **SMALL)
        assert type(program) is Twice
        with pytest.raises(pv.UserError, match="no option"):
            pv.build({"program": "twice-conditional:clases=3"}, "diagonal", EVENT, **SMALL)
    finally:
        del registry._classes["programs"]["twice-conditional"]


def test_the_command_line_holds_what_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--given label=1`` of a conditional run and of one that reads records; another name, or words, exit with status 2."""
    from pyro_vae.cli.app import run as command

    x, y = images(60)
    small = {**SMALL, "latent_dim": 2}
    conditional = pv.build("conditional", "diagonal", EVENT, program="conditional:classes=3", **small)
    pv.fit(conditional, (x, y), steps=2, batch_size=20, out=tmp_path / "a")
    both = pv.build("semi-supervised", "diagonal", EVENT, program="semi-supervised:classes=3", **small)
    pv.fit(both, pv.Record({"x": x, "label": y}), steps=2, batch_size=20, out=tmp_path / "b")
    for run, name in (("a", "y"), ("b", "label")):
        out = tmp_path / f"{run}.npy"
        assert command(["sample", str(tmp_path / run), "--given", f"{name}=1", "--num", "3", "--out", str(out)]) == 0
        assert np.load(out).shape == (3, *EVENT)
    given = ["--given", "label=1", "--num", "2", "--out", str(tmp_path / "m.png")]
    assert command(["manifold", str(tmp_path / "a"), *given]) == 0
    there = (np.arange(60) % 2 == 0, np.random.default_rng(0).uniform(size=(60, *EVENT)) < 0.9)
    np.savez(tmp_path / "gaps.npz", x=x.numpy(), label=y.numpy(), label_present=there[0], x_present=there[1])
    assert (
        command(["impute", str(tmp_path / "b"), str(tmp_path / "gaps.npz"), "--out", str(tmp_path / "full.npz")]) == 0
    )
    filled = np.load(tmp_path / "full.npz")
    assert np.array_equal(filled["label"][::2], y[::2].numpy())
    assert np.array_equal(filled["x"][there[1]], x.numpy()[there[1]])
    assert bool(
        (
            (filled["x_low"] <= filled["x_high"]) & (filled["label_probability"].sum(1) > 0.999)[:, None, None, None]
        ).all()
    )
    capsys.readouterr()
    np.savez(tmp_path / "whole.npz", x=x.numpy(), label=y.numpy())
    assert command(["impute", str(tmp_path / "b"), str(tmp_path / "whole.npz"), "--out", str(tmp_path / "no.npz")]) == 2
    assert "nothing is missing" in capsys.readouterr().err
    for wrong, message in (("lable=1", "no column 'lable'"), ("label=seven", "with numbers")):
        assert command(["sample", str(tmp_path / "b"), "--given", wrong, "--out", str(tmp_path / "c.npy")]) == 2
        assert message in capsys.readouterr().err
