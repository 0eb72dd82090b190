"""Every declared model and guide builds, trains two steps and is evaluated, with a partner that fits it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_vae as pv
from pyro_vae import registry
from pyro_vae.declared import folder
from pyro_vae.objectives.elbo import ELBO
from pyro_vae.programs.contract import admit
from pyro_vae.programs.trace import draw_terms, evaluating
from pyro_vae.programs.values import check_observed
from pyro_vae.seeding import seeded
from pyro_vae.spec import build, declared, read

EVENT = (1, 8, 8)
EVERY = [name for name in declared("models") if (folder("models") / f"{name}.toml").is_file()]
MODELS = [
    name
    for name in EVERY
    if read("models", name).latents and read("models", name).program.name not in ("conditional", "semi-supervised")
]  # of x alone; others: test_declared_programs, test_tractable_declared
GUIDES = [name for name in declared("guides") if (folder("guides") / f"{name}.toml").is_file()]


def kind_of(support: Any) -> str:
    return next((kind for kind in ("Boolean", "OneHot", "phere") if kind in repr(support)), "real")


PARTNER_GUIDE = {
    "real": "diagonal",
    "Boolean": "relaxed-bernoulli",
    "OneHot": "relaxed-categorical",
    "phere": "hypersphere",
}
PARTNER_MODEL = {"real": "mlp", "Boolean": "binary-latents", "OneHot": "categorical-latents", "phere": "hypersphere"}


def observations(likelihood: Any, rows: int = 6) -> Tensor:
    """Data in the support of a likelihood, ``(rows, *EVENT)``."""
    with seeded(0):
        u = torch.rand(rows, *EVENT)
    if likelihood.data == "lattice":
        return (u * (likelihood.levels - 1)).round() / (likelihood.levels - 1)
    if likelihood.data == "count":
        return (u * 9).round()
    return {"binary": u.round(), "unit": 0.01 + 0.98 * u, "real": u}[likelihood.data]


def train_two_steps(vae: Any, x: Tensor) -> None:
    check_observed(admit(vae, x), x)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    with seeded(1):
        for step in range(2):
            loss, surrogate = ELBO()(vae, x, step=step)
            optimizer.zero_grad()
            surrogate.backward()
            assert bool(torch.isfinite(loss))
            for name, p in vae.named_parameters():
                assert not p.requires_grad or (p.grad is not None and bool(torch.isfinite(p.grad).all())), name
            optimizer.step()
    with seeded(2), evaluating(vae):
        assert bool(torch.isfinite(draw_terms(vae, x, num_samples=3).log_weight).all())
    assert pv.sample(vae, 2).shape == (2, *EVENT)
    assert pv.reconstruct(vae, x).shape == x.shape


def test_the_gallery_is_large_enough() -> None:
    assert len(MODELS) >= 20
    assert len(GUIDES) >= 12


@pytest.mark.parametrize(("kind", "name"), [("models", n) for n in EVERY] + [("guides", n) for n in GUIDES])
def test_a_declared_file_begins_with_its_mathematics_and_a_reason(kind: Any, name: str) -> None:
    first, second, *rest = (folder(kind) / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    assert re.match(r"# [pq]\([zxk].*   .+ \d{4}, https://\S+", first)
    assert second.startswith("# ")
    assert second.endswith(".")
    assert not any(line.startswith("#") for line in rest)


@pytest.mark.parametrize("name", MODELS)
def test_a_declared_model_trains(name: str) -> None:
    prior: Any = registry.get("priors", read("models", name).prior.name)
    vae: Any = build(name, PARTNER_GUIDE[kind_of(prior.support)], EVENT, encoder="mlp:hidden=[16]")
    train_two_steps(vae, observations(vae.likelihood))


@pytest.mark.parametrize("name", GUIDES)
def test_a_declared_guide_trains(name: str) -> None:
    posterior: Any = registry.get("posteriors", read("guides", name).posterior.name)
    vae: Any = build(PARTNER_MODEL[kind_of(posterior.support)], name, EVENT, decoder="mlp:hidden=[16]", latent_dim=12)
    train_two_steps(vae, observations(vae.likelihood))


# A mixture, flows on either side, a likelihood and latents of classes, pixels that know of each other.
RECORDED = {
    "mlp",
    "mixture",
    "vamp",
    "pixelvae",
    "categorical-latents",
    "maf",
    "full-rank",
    "coupling",
    "relaxed-bernoulli",
}


@pytest.mark.parametrize(
    "name", [n if n in RECORDED else pytest.param(n, marks=pytest.mark.slow) for n in MODELS + GUIDES]
)
def test_a_training_step_is_one_graph(name: str) -> None:
    """No value is read to the host and no shape depends on one: what make_fx records replays on other data."""
    small: Any = {"encoder": "mlp:hidden=[8]", "latent_dim": 3}
    if name in MODELS:
        prior: Any = registry.get("priors", read("models", name).prior.name)
        vae: Any = build(name, PARTNER_GUIDE[kind_of(prior.support)], EVENT, **small)
    else:
        posterior: Any = registry.get("posteriors", read("guides", name).posterior.name)
        vae = build(PARTNER_MODEL[kind_of(posterior.support)], name, EVENT, decoder="mlp:hidden=[8]", **small)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    x = observations(vae.likelihood)

    def step(x: Tensor) -> tuple[Tensor, ...]:
        loss, surrogate = ELBO()(vae, x)
        return (loss, *torch.autograd.grad(surrogate, parameters))

    with seeded(0):
        graph = make_fx(step)(x)
    targets = {str(node.target) for node in graph.graph.nodes}
    assert not {t for t in targets if "nonzero" in t or "local_scalar" in t or t.startswith("aten.masked_select")}
    other = x.roll(1, 0).flip(-1)
    with seeded(3):
        eager = step(other)
    with seeded(3):
        replayed = graph(other)
    for a, b in zip(eager, replayed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_the_residual_pair_takes_images_and_leading_axes(shape: tuple[int, int, int]) -> None:
    with seeded(0):
        encoder: Any = registry.get("encoders", "residual-conv")(shape, channels=4, hidden=8)
        decoder: Any = registry.get("decoders", "residual-conv")((5,), shape, channels=4, blocks=2)
        x, z = torch.randn(2, 3, *shape), torch.randn(2, 3, 5)
    h, f = encoder(x), decoder(z)
    assert h.shape == (2, 3, 8)
    assert f.shape == (2, 3, 4, *shape[1:])
    torch.testing.assert_close(h[1, 2], encoder(x[1, 2]), rtol=1e-4, atol=1e-5)
    for module, out in ((encoder, h), (decoder, f)):
        grads = torch.autograd.grad(out.square().sum(), list(module.parameters()))
        assert all(bool(g.any()) for g in grads)


def test_the_residual_pair_refuses_what_does_not_divide_by_four() -> None:
    with pytest.raises(pv.errors.UserError, match="divide by four, not 30x30"):
        registry.get("encoders", "residual-conv")((1, 30, 30))
