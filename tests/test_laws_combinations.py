"""Every registered combination builds, keeps the contract, trains a step, is evaluated, saved and loaded.

In the fast suite every block once, with a partner that fits; every pair in the slow one.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from small import small
from torch import Tensor

import pyro_vae as pv
from pyro_vae import registry
from pyro_vae.errors import UserError
from pyro_vae.objectives.elbo import ELBO
from pyro_vae.programs.contract import admit
from pyro_vae.programs.values import check_observed
from pyro_vae.seeding import generator, seeded
from pyro_vae.spec import Spec, construct

SHAPE = (1, 4, 4)


def rows(likelihood: str) -> Tensor:
    """Six images that a likelihood takes."""
    u = torch.rand(6, *SHAPE, generator=generator(1), dtype=torch.float64)
    kind = registry.get("likelihoods", likelihood).data  # type: ignore[attr-defined]
    return {
        "binary": lambda: u.round(),
        "lattice": lambda: (u * 4).round() / 4,
        "count": lambda: (u * 6).floor(),
        "unit": lambda: 0.01 + 0.98 * u,
        "real": lambda: 2 * u - 1,
    }[kind]()


def build(**names: str) -> Any:
    """A small VAE of the blocks named, with an mlp where no network is."""
    names = {"encoder": "mlp", "decoder": "mlp", **names}
    blocks = {key: {"name": name, **small(key + "s", name)} for key, name in names.items()}
    return pv.build("mlp", "diagonal", SHAPE, latent_dim=3, **blocks)


def keeps_the_laws(program: Any, x: Tensor, without_gradient: tuple[str, ...] = ()) -> None:
    """The contract, a finite step whose gradient reaches every parameter, saving and loading."""
    program = program.double().train()
    check_observed(admit(program, x), x)
    with seeded(0):
        loss, surrogate = ELBO(num_particles=2)(program, x)
    surrogate.backward()
    assert bool(torch.isfinite(loss))
    bad = [
        n
        for n, p in program.named_parameters()
        if p.requires_grad and (p.grad is None or not torch.isfinite(p.grad).all())
    ]
    assert bad == []
    result = pv.log_likelihood(program, x, num_samples=40, compile="off")
    assert torch.isfinite(result.log_likelihood).all()
    spec = Spec.from_toml(program.spec.to_toml())
    other = construct(spec, SHAPE, seed=8).double()
    other.load_state_dict(program.state_dict())
    again = pv.log_likelihood(other, x, num_samples=40, compile="off")
    assert torch.equal(again.log_likelihood, result.log_likelihood)
    assert pv.sample(program, 2).shape == (2, *SHAPE)
    assert pv.reconstruct(program, x).shape == x.shape


def fits(prior: str, posterior: str) -> bool:
    """Whether the two may be put together, by what they declare: the same support, and a guide that can be scored."""
    p: Any = registry.get("priors", prior)
    q: Any = registry.get("posteriors", posterior)
    if p.support is None:  # it lives wherever the guide does, on latents of one axis
        return q.scoring != "impossible" and "OneHot" not in repr(q.support)
    return repr(p.support) == repr(q.support)


# Guides that were never trained are rightly warned of.
untrained = pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")
PRIORS, POSTERIORS = registry.names("priors"), registry.names("posteriors")
PAIRS = [(p, q) for p in PRIORS for q in POSTERIORS]
FITTING = [pair for pair in PAIRS if fits(*pair)]


def slow_but(pairs: list[tuple[str, str]], fast: set[tuple[str, str]]) -> list[Any]:
    return [pytest.param(*pair, marks=[] if pair in fast else pytest.mark.slow) for pair in pairs]


def once(pairs: list[tuple[str, str]]) -> set[tuple[str, str]]:
    """The first pair of each that stands on either side."""
    return {next(pair for pair in pairs if pair[side] == name) for side in (0, 1) for name in {p[side] for p in pairs}}


@untrained
@pytest.mark.parametrize(("prior", "posterior"), slow_but(FITTING, once(FITTING)))
def test_every_prior_with_every_posterior(prior: str, posterior: str) -> None:
    keeps_the_laws(build(prior=prior, posterior=posterior), rows("bernoulli"))


LIKELIHOODS = [(p, d) for p in registry.names("likelihoods") for d in registry.names("decoders")]
ONE_OF_EACH = {pair for pair in LIKELIHOODS if pair[0] == "bernoulli" or pair[1] == "mlp"} - {
    ("autoregressive-bernoulli", "mlp")  # seconds; its density has tests of its own
}


@untrained
@pytest.mark.parametrize(("likelihood", "decoder"), slow_but(LIKELIHOODS, ONE_OF_EACH))
def test_every_likelihood_on_every_decoder(likelihood: str, decoder: str) -> None:
    keeps_the_laws(build(likelihood=likelihood, decoder=decoder), rows(likelihood))


ENCODED = [(q, e) for q in POSTERIORS for e in registry.names("encoders")]


@untrained
@pytest.mark.parametrize(
    ("posterior", "encoder"),
    slow_but(ENCODED, {pair for pair in ENCODED if pair[0] == "diagonal-normal"}),  # on an mlp all are above
)
def test_every_posterior_on_every_encoder(posterior: str, encoder: str) -> None:
    prior = next(p for p in PRIORS if fits(p, posterior) and p != "vamp")
    keeps_the_laws(build(prior=prior, posterior=posterior, encoder=encoder), rows("bernoulli"))


@untrained
@pytest.mark.slow
@pytest.mark.parametrize("likelihood", registry.names("likelihoods"))
def test_everything_with_everything(likelihood: str) -> None:
    x = rows(likelihood)
    for prior, posterior in itertools.product(registry.names("priors"), registry.names("posteriors")):
        if fits(prior, posterior):
            keeps_the_laws(build(prior=prior, posterior=posterior, likelihood=likelihood), x)


def test_what_does_not_fit_is_refused() -> None:
    x = rows("bernoulli").float()
    for prior, posterior in PAIRS:
        if not fits(prior, posterior):
            with pytest.raises(UserError, match=r"choose|score|vamp"):
                admit(build(prior=prior, posterior=posterior), x)
