"""Declared densities without latents: exact, drawn as they are scored, cached or not, and taken by every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from densities import gradients, shaken
from small import small
from torch import Tensor
from torch.autograd.functional import jacobian

import pyro_vae as pv
from pyro_vae import registry
from pyro_vae.cli.app import run as command
from pyro_vae.networks.causal import Causal
from pyro_vae.programs.autoregressive import PlaceByPlace
from pyro_vae.seeding import generator, seeded
from pyro_vae.spec import Spec, declare

PROGRAMS = [name for name in registry.names("programs") if not registry.get("programs", name).latents]  # type: ignore[attr-defined]
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in PROGRAMS),
    ("made", {"hidden": [7, 9], "masks": 3, "shuffle": True}),
    ("made", {"hidden": [9], "direct": False}),
]
ALPHA = 1e-4  # of a chi-square test
each = pytest.mark.parametrize(("name", "options"), CASES, ids=["-".join([n, *map(str, o)]) for n, o in CASES])


def program(name: str, shape: tuple[int, ...], options: dict[str, Any], likelihood: Any = "bernoulli") -> Any:
    declared = {"program": {"name": name, **small("programs", name), **options}, "likelihood": likelihood}
    return shaken(pv.build(declared, None, shape))


def density(of: Any) -> PlaceByPlace:
    return PlaceByPlace(of.nets, of.likelihood, of.event_shape)


def every(levels: int, *shape: int) -> Tensor:
    values = torch.arange(levels, dtype=torch.float64) / (levels - 1)
    return torch.cartesian_prod(*[values] * torch.Size(shape).numel()).reshape(-1, *shape)


def trained(name: str, options: dict[str, Any], dtype: torch.dtype, compile: str) -> Any:
    x = every(2, 1, 3, 3)[torch.randint(512, (60,), generator=generator(0))]
    of = program(name, (1, 3, 3), options).to(dtype)
    pv.fit(of, x.to(dtype), steps=5, batch_size=20, lr=0.01, compile=compile)
    return of


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_sums_to_one_over_all_images(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    found = pv.log_likelihood(trained(name, options, dtype, "off"), every(2, 1, 3, 3).to(dtype), compile="off")
    assert float(found.log_likelihood.exp().sum()) == pytest.approx(1, abs=1e-12 if dtype == torch.float64 else 1e-5)
    assert float(found.mc_se.max()) == 0
    assert found.states == 1


@pytest.mark.slow
@each
def test_it_sums_to_one_compiled(name: str, options: dict[str, Any]) -> None:
    of = trained(name, options, torch.float32, "on")
    found = pv.log_likelihood(of, every(2, 1, 3, 3).float(), compile="on")
    assert float(found.log_likelihood.exp().sum()) == pytest.approx(1, abs=1e-5)


@each
def test_a_place_depends_on_those_before_it_and_on_no_other(name: str, options: dict[str, Any]) -> None:
    of = program(name, (1, 3, 4), options)
    x = torch.rand(12, 1, generator=generator(1), dtype=torch.float64)
    for net in of.nets:
        slope = jacobian(lambda x, net=net: net(x[None])[0].sum(-1), x).squeeze(-1).detach()[net.order][:, net.order]
        assert not bool(slope.triu().any())
        reaches = slope.tril(-1) != 0
        assert bool(reaches[-1].any())
        assert name == "made" or int(reaches.sum()) == 66


@each
def test_a_cache_draws_what_whole_passes_draw(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    of, drawn = program(name, (2, 3, 4), {**options, "features": 3}, {"name": "categorical", "levels": 3}), []
    for _ in range(2):
        with seeded(0):
            drawn.append(density(of).sample((9,)))
        for net in of.nets:
            monkeypatch.setattr(type(net), "begin", Causal.begin)
            monkeypatch.setattr(type(net), "at", Causal.at)
    assert torch.equal(*drawn)
    assert len(drawn[0].unique()) == 3


@each
def test_draws_have_the_frequencies_of_the_density(name: str, options: dict[str, Any]) -> None:
    images = every(2, 1, 2, 2)
    p = density(program(name, (1, 2, 2), options))
    with seeded(1):
        drawn = p.sample((4000,))
    seen = (drawn.flatten(1) @ torch.tensor([8.0, 4, 2, 1], dtype=torch.float64)).long().bincount(minlength=16).double()
    expected = p.log_prob(images).exp().detach() * 4000
    assert float(expected.min()) > 5
    assert float(((seen - expected) ** 2 / expected).sum()) < scipy.stats.chi2.ppf(1 - ALPHA, 15)


@pytest.mark.parametrize("name", PROGRAMS)
def test_grey_levels_and_colours_sum_to_one_and_every_parameter_is_trained(name: str) -> None:
    of = program(name, (2, 1, 2), {"features": 3}, {"name": "categorical", "levels": 3})
    p, x = density(of), every(3, 2, 1, 2)
    assert float(p.log_prob(x).detach().exp().sum()) == pytest.approx(1, abs=1e-12)
    of = program(name, (1, 4, 4), {})
    x = torch.rand(20, 1, 4, 4, generator=generator(2), dtype=torch.float64).round()
    assert gradients(of, density(of).log_prob(x).sum()) == []


def test_masks_are_a_mixture_that_shares_its_weights() -> None:
    of, x = program("made", (1, 3, 3), {"masks": 3, "shuffle": True}), every(2, 1, 3, 3)
    each = torch.stack([PlaceByPlace([net], of.likelihood, (1, 3, 3)).log_prob(x) for net in of.nets])
    torch.testing.assert_close(density(of).log_prob(x), each.exp().mean(0).log())
    assert float((each[0] - each[1]).detach().abs().max()) > 0.1
    one = program("made", (1, 3, 3), {"masks": 1})
    assert list(of.state_dict()) == list(one.state_dict())


def test_what_is_about_latents_is_refused_by_name() -> None:
    for key in ("latent_dim=3", "prior=laplace", "decoder=mlp", "posterior=planar", "encoder=mlp"):
        name, _, value = key.partition("=")
        with pytest.raises(pv.UserError, match=f"no latents, and so no {name} to choose"):
            declare("made").override({name: value})
    with pytest.raises(pv.UserError, match="no latents, and so no guide to choose"):
        pv.build("made", "diagonal", (1, 4, 4))
    with pytest.raises(pv.UserError, match="no latents, and so no prior to choose"):
        pv.build({"program": "pixelcnn", "prior": "laplace"}, None, (1, 4, 4))
    with pytest.raises(pv.UserError, match="no latents, and so no encoder"):
        pv.build("made", None, (1, 4, 4), encoder=torch.nn.Flatten())
    with pytest.raises(pv.UserError, match="kernel = 4"):
        declare("pixelcnn").override({"program.kernel": 4})
    with pytest.raises(pv.UserError, match=r"\(C, H, W\)"):
        pv.build("pixelrnn", None, (1, 2, 3, 4))
    assert Spec.from_toml(declare("made").to_toml()) == declare("made")
    assert "diagonal" not in declare("made").to_toml()


@pytest.mark.parametrize("name", ["made", *(pytest.param(n, marks=pytest.mark.slow) for n in PROGRAMS if n != "made")])
def test_every_command_takes_it(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, x = str(tmp_path / "run"), tmp_path / "x.npy"
    np.save(tmp_path / "data.npy", (np.random.default_rng(0).uniform(size=(60, 1, 3, 4)) < 0.4).astype(np.uint8))
    sizes = [f"--set=program.{k}={v}" for k, v in small("programs", name).items()]
    train = ["train", str(tmp_path / "data.npy"), "--model", name, *sizes, "--compile", "off", "--quiet"]
    assert command([*train, "--guide", "diagonal", "--out", run]) == 2
    assert "no guide to choose" in capsys.readouterr().err
    assert command([*train, "--epochs", "1", "--out", run]) == 0
    assert command(["train", "--resume", "--out", run, "--epochs", "2", "--quiet"]) == 0
    capsys.readouterr()
    assert command(["evaluate", run, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["nll_mc_se"], found["kl"], found["states"]) == (0, 0, 1)
    assert command(["sample", run, "--num", "2", "--out", str(x)]) == 0
    assert set(np.load(x).ravel()) <= {0, 1}
    capsys.readouterr()
    assert command(["reconstruct", run, "--num", "2", "--out", str(tmp_path / "x.png")]) == 2
    assert "is about latents" in capsys.readouterr().err
    assert command(["show", name, "--shape", "1,3,4", "--python"]) == 0
    assert command(["runs", str(tmp_path)]) == 0
    assert name in capsys.readouterr().out


def test_progress_is_told_and_means_are_draws() -> None:
    told: list[float] = []
    of = program("pixelrnn", (1, 2, 3), {})
    x = pv.sample(of, 4, mean=True, progress=told.append)
    assert told == [pytest.approx((i + 1) / 6) for i in range(6)]
    assert set(x.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_it_is_compiled_exported_compared_and_reported(name: str, tmp_path: Path) -> None:
    x = (torch.rand(90, 1, 3, 4, generator=generator(4)) < 0.4).float()
    data = pv.Data("pixels", x[:60], x[60:75], x[75:], 2)
    runs = []
    for compile in ("on", "off"):
        of = pv.build(name, None, data, program={"name": name, **small("programs", name)})
        runs.append(pv.fit(of, data, steps=20, batch_size=20, compile=compile, out=tmp_path / compile))
    a, b = (pv.log_likelihood(run.program, x[75:]) for run in runs)
    torch.testing.assert_close(a.log_likelihood, b.log_likelihood, rtol=0, atol=1e-3)
    assert abs(pv.compare(a, b).mean) < 1e-3
    exported = pv.export(runs[0].program, parts=["density"], num_samples=1)["density"].module()(x[75:], [])
    torch.testing.assert_close(exported["log_likelihood"].double(), a.log_likelihood, rtol=0, atol=1e-4)
    assert command(["report", str(tmp_path / "off"), "--out", str(tmp_path / "report.html")]) == 0
    assert "p(x) = prod_d p(x_d | z_d)" in (tmp_path / "report.html").read_text(encoding="utf-8")
