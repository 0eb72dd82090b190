"""Hierarchies that are declared: what every layer is given, what trains, and what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.cli.app import run as command
from pyro_vae.objectives.elbo import ELBO
from pyro_vae.programs.contract import admit
from pyro_vae.programs.hierarchical import product, relative
from pyro_vae.programs.trace import isolated, latent_sites, run
from pyro_vae.seeding import generator, seeded

# what weights say of programs that were not trained is not looked at here
pytestmark = pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")

EVENT = (1, 4, 4)
SMALL: dict[str, Any] = {"encoder": "mlp:hidden=[8]", "latent_dim": 2}
DENSE = [
    "inference=bottom-up",
    "inference=bottom-up,skip=true",
    "inference=top-down,skip=true",
    "inference=top-down,residual=true",
    "inference=ladder",
]
EVERY = [
    *(f"hierarchical:below=[4,3],hidden=[6],{options}" for options in DENSE),
    "bidirectional:below=[2,1],channels=4,repeat=2",
    "bidirectional:below=[2],channels=4,residual=false",
]


def images(rows: int = 6) -> Tensor:
    """Of a few bits each."""
    return torch.rand(rows, *EVENT, generator=generator(1)).round()


def build(program: str, **others: Any) -> Any:
    """A small hierarchy."""
    decoder = "residual-conv:channels=4" if program.startswith("bidirectional") else "mlp:hidden=[8]"
    return pv.build({"program": program}, "diagonal", EVENT, **{**SMALL, "decoder": decoder, **others})


PRIORS = ["standard-normal", "gaussian-mixture:components=3", "maf:layers=1", "vamp:components=3"]
FAST = {(EVERY[0], PRIORS[3]), (EVERY[2], PRIORS[3]), (EVERY[4], PRIORS[1])}
PAIRS = [
    pytest.param(a, b, marks=[] if (a, b) in FAST else pytest.mark.slow) for a, b in itertools.product(EVERY, PRIORS)
]


@pytest.mark.parametrize(("program", "prior"), PAIRS)
def test_every_parameter_is_trained_and_depth_stands_in_the_spec(program: str, prior: str) -> None:
    """By name, a gradient that is finite and not all zero; the contract; weights put back give the same log p."""
    if "bottom-up" in program and prior.startswith("vamp"):
        with pytest.raises(pv.UserError, match="bottom-up inference"):
            build(program, prior=prior)
        return
    vae, x = build(program, prior=prior).double(), images().double()
    admit(vae, x)
    with seeded(0):
        ELBO(num_particles=2)(vae, x)[1].backward()
    bad = [n for n, p in vae.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert bad == []
    other = pv.spec.construct(pv.Spec.from_toml(vae.spec.to_toml()), EVENT, seed=3).double()
    other.load_state_dict(vae.state_dict())
    a, b = (pv.log_likelihood(p, x, num_samples=30, compile="off").log_likelihood for p in (vae, other))
    assert torch.equal(a, b)
    assert pv.sample(vae, 2).shape == (2, *EVENT)


@pytest.mark.parametrize("program", EVERY)
def test_layers_are_drawn_from_the_top_downwards(program: str) -> None:
    """The model's order is zL, ..., z1; the guide's is the same, but from x upwards where it is said."""
    vae, x = build(program), images()
    with isolated(), seeded(0):
        guide = run(vae.guide, x, num_samples=3)
        model = run(vae.model, x, num_samples=3, at=guide)
    names = [f"z{i}" for i in range(len(latent_sites(model)), 0, -1)]
    assert list(latent_sites(model)) == names
    assert list(latent_sites(guide)) == (names[::-1] if "bottom-up" in program else names)
    shapes = {tuple(site["value"].shape[2:]) for site in latent_sites(guide).values()}
    assert shapes >= ({(2, 2, 2)} if program.startswith("bidirectional") else {(4,), (3,), (2,)})


def test_what_q_is_made_of() -> None:
    """The product of two normals is normalised and proportional to it; a normal relative to p is p where nothing differs."""
    random = generator(2)
    loc, scale = torch.randn(2, 5, generator=random).double(), 0.5 + torch.rand(2, 5, generator=random).double()
    p, q = (dist.Normal(a, s).to_event(1) for a, s in zip(loc, scale, strict=True))
    z = torch.randn(4, 5, generator=random).double()
    excess = p.log_prob(z) + q.log_prob(z) - product(p, q).log_prob(z)
    torch.testing.assert_close(excess, excess[:1].expand(4), rtol=1e-12, atol=1e-12)
    same = dist.Normal(0 * loc[0], scale[0] / scale[0]).to_event(1)
    torch.testing.assert_close(relative(p, same).log_prob(z), p.log_prob(z), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("program", "others", "words"),
    [
        ("hierarchical:residual=true", {}, "residual is of inference top-down"),
        ("hierarchical:below=[]", {}, "below"),
        ("hierarchical:inference=sideways", {}, "inference"),
        ("bidirectional:below=[1,1,1]", {}, "halves images"),
    ],
)
def test_what_makes_no_sense_is_refused(program: str, others: dict[str, Any], words: str) -> None:
    """By name, in one line."""
    with pytest.raises(pv.UserError, match=words) as caught:
        build(program, **others)
    assert "\n" not in str(caught.value)


def test_a_guide_of_several_layers_is_not_refined_as_one() -> None:
    """Its features alone do not make q(z | x)."""
    from pyro_vae.programs.refined import Refined

    with pytest.raises(pv.UserError, match="of one layer"):
        Refined(build(EVERY[0]))


def test_maps_are_decoded_from_where_they_are() -> None:
    """A residual decoder given maps of half or a quarter of the image's size begins there, and the others as before."""
    from pyro_vae.networks.residual import ResidualDecoder

    for shape, blocks in (((3, 4, 4), 2), ((3, 2, 2), 3), ((5,), 3)):
        with seeded(0):
            decoder = ResidualDecoder(shape, (1, 8, 8), channels=4)
        assert decoder(torch.zeros(2, 3, *shape)).shape == (2, 3, 4, 8, 8)
        assert sum(type(m).__name__ == "Residual" for m in decoder.layers) == blocks


@pytest.mark.parametrize(
    "blocks",
    [
        {"encoder": "mlp:hidden=[8]", "decoder": "mlp:hidden=[8]"},
        {"encoder": "residual-conv:channels=4", "decoder": "residual-conv:channels=4"},
        {"program": "hierarchical:below=[3],hidden=[6]"},
        {"program": "bidirectional:below=[2],channels=4", "decoder": "residual-conv:channels=4"},
    ],
)
def test_normalised_weights_begin_as_they_were_and_are_trained(blocks: dict[str, Any]) -> None:
    """The same function at first; lengths and directions have gradients, and are saved by name."""
    key = "program" if "program" in blocks else "encoder"
    with_norm = {k: f"{v},weight_norm=true" if k in (key, "decoder") and ":" in v else v for k, v in blocks.items()}
    plain, vae = (pv.build("mlp", "diagonal", EVENT, **{**SMALL, **b}) for b in (blocks, with_norm))
    x = images()
    with seeded(0):
        before = ELBO()(plain, x)[0]
    with seeded(0):
        loss, surrogate = ELBO()(vae, x)
    torch.testing.assert_close(loss, before, rtol=1e-4, atol=1e-4)
    surrogate.backward()
    named = {n: p.grad for n, p in vae.named_parameters() if "original" in n}
    assert named
    assert all(g is not None and bool(g.isfinite().all()) for g in named.values())
    other = pv.spec.construct(pv.Spec.from_toml(vae.spec.to_toml()), EVENT, seed=3)
    other.load_state_dict(vae.state_dict())
    with seeded(0):
        assert torch.equal(ELBO()(other, x)[0], loss)


@pytest.mark.slow
@pytest.mark.usefixtures("coarse_pages")
@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.activity.ActivityWarning")  # of weights after 14 steps
@pytest.mark.parametrize("model", ["two-layer", "hvae", "ladder", "bidirectional"])
def test_a_declared_hierarchy_goes_through_every_command(model: str, tmp_path: Path) -> None:
    """Trained, interrupted and resumed to the bit, evaluated, drawn, exported as chains and told in a report: by its name."""
    data, out = pv.load_data("digits"), tmp_path / "run"
    sizes: dict[str, Any] = {"encoder": "mlp:hidden=[16]", "prior": "standard-normal"}

    def stop(metrics: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    def fit(path: Path, **more: Any) -> pv.Run:
        vae = pv.build(model, "diagonal", data, **sizes)
        return pv.fit(vae, data, epochs=2, batch_size=200, compile="off", skip_gradients=200.0, out=path, **more)

    with pytest.raises(KeyboardInterrupt):
        fit(out, callback=stop)
    whole, run = fit(tmp_path / "whole"), fit(out, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.program.parameters(), run.program.parameters(), strict=True))
    assert [m["skipped"] for m in run.metrics] == [m["skipped"] for m in whole.metrics]
    place = str(out)
    assert command(["evaluate", place, "--samples", "30", "--limit", "20", "--quiet"]) == 0
    kept = json.loads((out / "evaluation.json").read_text())
    names = list(kept["kl_per_layer"])
    assert len(names) == len(kept["active_units"]) > 1
    for options in (["--temperature", "0.7"], ["--shared", max(names)]):
        assert command(["sample", place, "--num", "4", *options, "--out", str(tmp_path / "s.png")]) == 0
    assert command(["posterior", place, "--images", "2", "--out", str(tmp_path / "p.nc")]) == 0
    assert command(["report", place, "--samples", "20", "--limit", "30"]) == 0
    assert "KL of each layer" in (out / "report.html").read_text()
    assert command(["show", model, "diagonal", "--shape", "1,8,8"]) == 0
