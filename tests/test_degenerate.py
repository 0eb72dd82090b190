"""Degenerate fits are named, each by a program planted to be one, and sound ones are not."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import sparse
from sklearn.neighbors import NearestCentroid
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.cli.app import run as command
from pyro_vae.declared import names
from pyro_vae.evaluation.degenerate import DegenerateFitWarning, degenerate
from pyro_vae.programs.latents import encoded_sites
from pyro_vae.seeding import seeded

QUICK: dict[str, Any] = {"steps": 500, "batch_size": 20, "compile": "off", "average": None}


def table(n: int = 200) -> Tensor:
    """Rows of five columns that two numbers explain, with noise of a tenth."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, 2, generator=generator)
    return z @ torch.randn(2, 5, generator=generator) + 0.1 * torch.randn(n, 5, generator=generator)


class Linear(nn.Module):
    """z ~ N(0, I), x ~ N(W z, s^2), and how it is spoilt."""

    def __init__(self, decode: float = 1.0, encode: float = 1.0, offset: float = 0.0, spread: float = 1.0) -> None:
        super().__init__()
        self.decoder, self.encoder = nn.Linear(2, 5), nn.Linear(5, 2)
        self.log_scale = nn.Parameter(torch.zeros(2))
        self.decode, self.encode, self.offset, self.spread = decode, encode, offset, spread
        with torch.no_grad():
            self.decoder.weight.mul_(3)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), self.spread).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(self.decode * z), 0.3).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            mean = self.encode * self.encoder(x) + self.offset
            pyro.sample("z", dist.Normal(mean, self.spread * self.log_scale.exp()).to_event(1))


class Half(dist.Normal):
    """A density that integrates to a half, which makes a negative KL of a guide at the prior."""

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value) - 0.7


class Negative(Linear):
    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", Half(torch.zeros_like(self.encoder(x)) + 0 * self.log_scale, 1.0).to_event(1))


class Marked(nn.Module):
    """A mixture as Pyro's TraceEnum_ELBO would have it."""

    def __init__(self) -> None:
        super().__init__()
        self.logits, self.encoder = nn.Parameter(torch.randn(3, 5)), nn.Linear(5, 3)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            c = pyro.sample("c", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(self.logits[c], 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("c", dist.Categorical(logits=self.encoder(x)), infer={"enumerate": "parallel"})


def planted(make: Callable[[], nn.Module]) -> nn.Module:
    with seeded(0, torch.device("cpu")):
        return make()


PLANTED: dict[str, tuple[Any, str]] = {
    "collapsed": (lambda: Linear(encode=0.0), "none of 2 units is active.*has collapsed to the prior"),
    "away from the prior": (
        lambda: Linear(encode=0.0, offset=11.0),
        r"none of 2 units is active.*away from the prior: its KL of 1[12]\d[.\d]* nats",
    ),
    "a decoder without z": (lambda: Linear(decode=0.0), "makes nothing of its latents"),
    "samples alike": (lambda: Linear(decode=1e-3, spread=0.1), "samples are all alike"),
    "a negative KL": (Negative, r"0 \(0\) is above the KL divergence .* theory forbids"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_each_kind_is_named(name: str) -> None:
    make, words = PLANTED[name]
    program = planted(make)
    assert any(re.search(words, line) for line in degenerate(program, table()))


def test_a_sound_fit_is_not(tmp_path: Path) -> None:
    program = planted(Linear)
    run = pv.fit(program, table(), lr=1e-2, **QUICK)  # warnings are errors here
    assert degenerate(program, table()) == []
    assert run.metrics[-1]["train_loss"] < 20


def test_fit_warns_when_it_has_ended_and_the_weights_are_kept(tmp_path: Path) -> None:
    program = planted(lambda: Linear(encode=0.0))
    with pytest.warns(DegenerateFitWarning, match="none of 2 units is active"):
        run = pv.fit(program, table(), **QUICK, out=tmp_path / "run")
    loaded = pv.load(tmp_path / "run", program=planted(Linear))
    assert len(loaded.metrics) == len(run.metrics)
    pv.fit(program, table(), **{**QUICK, "steps": 60})  # untrained, not degenerate: no warning, which would be an error


def test_marks_for_another_objective_are_told_before_training() -> None:
    with pytest.warns(DegenerateFitWarning, match=r"'c' are marked infer=.*objective enumerated-elbo, or leave"):
        pv.fit(planted(Marked), table(), **{**QUICK, "steps": 2})
    pv.fit(planted(Marked), table(), **{**QUICK, "steps": 2}, objective="enumerated-elbo")


def test_a_latent_that_only_a_mark_would_sum_out() -> None:
    class Without(Marked):
        def guide(self, x: Tensor) -> None:
            pass

    with pytest.raises(pv.UserError, match=r"no site for the model's latent 'c'.*nothing here sums over"):
        pv.fit(planted(Without), table(), steps=2)


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")
@pytest.mark.usefixtures("coarse_pages")
def test_train_evaluate_and_report_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    train = ["train", "digits", "--model", "mlp", "--decoder", "mlp:hidden=[16]", "--encoder", "mlp:hidden=[16]"]
    train += [
        "--set",
        "latent_dim=3",
        "--objective",
        "elbo:beta=100",
        "--steps",
        "250",
        "--batch-size",
        "50",
        "--lr",
        "0.01",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert command([*train, "--compile", "off", "--quiet", "--out", out]) == 0
    said = "none of 3 units is active: the guide says the same whatever x is, and has collapsed to the prior"
    assert command(["evaluate", out, "--samples", "30", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert said in printed.out
    kept = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert any(said in line for line in kept["warnings"])
    row = next(line for line in printed.out.splitlines() if "- KL" in line)
    assert float(row.split("KL ")[1].split(" ")[0]) == pytest.approx(kept["kl"], rel=0.1)  # not "0"
    assert command(["report", out, "--samples", "20", "--limit", "50"]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count(said) >= 2  # beside the likelihood, and beside the latents


# of the declared models, which have learned nothing after 500 steps; the pixels of pixelvae explain each other
SLOW_TO_START = {"binary-latents", "categorical-latents", "hypersphere", "pixelvae", "hvae", "ladder", "bidirectional"}
COUNTS = {"poisson", "scvae", "scvi"}


def probed(program: Any, data: pv.Data) -> float:
    """How many test digits a draw of their latents is classified right for, a tenth by chance: of draws, not of means."""
    splits = [(data.observed(split)[:500], data.labels[split][:500]) for split in ("train", "test")]
    drawn = [encoded_sites(program, x, num_samples=1, seed=i) for i, (x, _) in enumerate(splits)]
    z = [torch.cat([v[0].flatten(1) for v in of.values()], 1) for of in drawn]
    found = NearestCentroid().fit(z[0].double().numpy(), splits[0][1].numpy())
    return float(found.score(z[1].double().numpy(), splits[1][1].numpy()))


@pytest.mark.slow
@pytest.mark.parametrize("name", names("models"))
def test_declared_models_trained_for_a_moment_raise_no_false_alarm(name: str, tmp_path: Path) -> None:
    """By the command as it is typed: no alarm but of four models, whose latents then classify nothing."""
    out, data = tmp_path / "run", "digits"
    if name in COUNTS:
        rng, data = np.random.default_rng(0), str(tmp_path / "counts.npz")
        rates = np.exp(rng.standard_normal((500, 2)) @ rng.standard_normal((2, 20)))
        sparse.save_npz(data, sparse.csr_matrix(rng.poisson(rates)))
    guides = {
        "binary-latents": "relaxed-bernoulli",
        "categorical-latents": "relaxed-categorical",
        "hypersphere": "hypersphere",
        "mixture-of-bernoullis": "responsibilities --objective enumerated-elbo:marginal=true --lr 0.05",
        "factorial-mixture": "responsibilities",
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        guide = ["--guide", *guides[name].split()] if name in guides else []
        train = f"train {data} --model {name} --steps 500 --quiet".split() + guide
        assert command([*train, "--compile", "off", "--batch-size", "16", "--out", str(out)]) == 0
    alarms = [str(w.message) for w in caught if issubclass(w.category, DegenerateFitWarning)]
    assert not alarms or name in SLOW_TO_START
    if alarms:
        run = pv.load(out)
        assert probed(run.program, run.load_data()) < 0.2
