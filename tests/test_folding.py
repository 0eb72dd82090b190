"""Samples folded into rows say what an axis of samples says: the same weights, losses and gradients, to 1e-6 in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import small as fewer
from test_blocks_gallery import EVENT, GUIDES, MODELS, PARTNER_GUIDE, PARTNER_MODEL, kind_of, observations
from torch import Tensor

import pyro_vae as pv
from pyro_vae import registry
from pyro_vae.analysis.mcmc import sample_chains
from pyro_vae.errors import UserError
from pyro_vae.programs.folding import FOLDS, ONCE
from pyro_vae.seeding import seeded
from pyro_vae.spec import read
from pyro_vae.training.fit import _objective
from pyro_vae.training.settings import Settings

MANY = {"elbo", "analytic-elbo", "iwae", "dreg", "renyi", "wake-sleep"}  # objectives of several draws for each row
FAST = [("mlp", "diagonal"), ("binary-latents", "score-bernoulli")]


def partner(kind: str, name: str) -> str:
    if kind == "models":
        prior: Any = registry.get("priors", read("models", name).prior.name)
        return PARTNER_GUIDE[kind_of(prior.support)]
    posterior: Any = registry.get("posteriors", read("guides", name).posterior.name)
    return PARTNER_MODEL[kind_of(posterior.support)]


def pairs() -> list[Any]:
    """Every declared model with the guide of its kind, and every declared guide with a model of its kind."""
    every = [(m, partner("models", m)) for m in MODELS] + [
        (partner("guides", g), g)
        for g in GUIDES
        if g != "planar"  # it scores the very tensors that it drew, and folds none
    ]
    rest = [pytest.param(*pair, marks=pytest.mark.slow) for pair in dict.fromkeys(every) if pair not in FAST]
    return [*FAST, *rest]


def small(model: str, guide: str) -> Any:
    sizes: dict[str, Any] = {"latent_dim": 3}
    if model in PARTNER_MODEL.values():
        sizes["decoder"] = "mlp:hidden=[8]"
    if guide in PARTNER_GUIDE.values():
        sizes["encoder"] = "mlp:hidden=[8]"
    for kind in ("prior", "likelihood"):
        name = getattr(read("models", model), kind).name
        if options := {k: v for k, v in fewer(f"{kind}s", name).items() if k in ("components", "levels")}:
            sizes[kind] = {"name": name, **options}
    try:
        return pv.build(model, guide, (1, 4, 4), **sizes).double()
    except UserError:  # of convolutions, which need more
        return pv.build(model, guide, EVENT, **sizes).double()


def chains(program: Any, x: Tensor) -> Tensor:
    found = sample_chains(program, x, num_samples=3, num_warmup=2, num_chains=2, max_tree_depth=3).latents
    return torch.cat([torch.as_tensor(value).flatten() for value in found.values()])


def numbers(program: Any, x: Tensor) -> dict[str, Tensor]:
    """What evaluation and training give, by what it is; a refusal stands as its words."""
    found: dict[str, Any] = {}

    def note(name: str, call: Any) -> None:
        try:
            found[name] = call()
        except UserError as error:
            found[name] = str(error)

    def loss(text: str) -> Tensor:
        with seeded(5):
            loss, surrogate = _objective(Settings(objective=text))(program, x)  # type: ignore[arg-type]
        grads = torch.autograd.grad(surrogate, [p for p in program.parameters() if p.requires_grad], allow_unused=True)
        return torch.cat([loss.reshape(1), *(g.flatten() for g in grads if g is not None)])

    note("weights", lambda: pv.log_likelihood(program, x, num_samples=40).log_likelihood)
    note("annealed", lambda: pv.annealed_log_likelihood(program, x[:2], num_distributions=5).log_likelihood)
    note("nuts", lambda: chains(program, x[:2]))
    for name in registry.names("objectives"):
        for text in [name, f"{name}:num_particles=4"] if name in MANY else [name]:
            note(text, lambda text=text: loss(text))  # type: ignore[misc]
    return found


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")
@pytest.mark.parametrize(("model", "guide"), pairs())
def test_folding_is_the_fast_road(model: str, guide: str) -> None:
    with seeded(0):
        program = small(model, guide)
    x = observations(program.likelihood)[..., : program.event_shape[1], : program.event_shape[2]].double()
    pv.encode(program, x)
    leading = numbers(program, x)
    assert sum(isinstance(v, Tensor) for v in leading.values()) >= 5
    for once in (False, True):  # the guide has one site
        road = vars(program)[FOLDS] = {(ONCE, x.dim()): once}
        folded = numbers(program, x)
        assert vars(program)[FOLDS] is road
        for name, value in leading.items():
            assert isinstance(value, str) == isinstance(folded[name], str), (name, value, folded[name])
            if isinstance(value, Tensor):
                torch.testing.assert_close(folded[name], value, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
