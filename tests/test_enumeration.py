"""The enumerated ELBO against its definition and against the score-function gradient; what it refuses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from densities import bits, one_hots, shaken
from test_objectives_bounds import gradients, same_mean
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import registry
from pyro_vae.errors import UserError
from pyro_vae.objectives.elbo import ELBO
from pyro_vae.seeding import generator, seeded

SIZES = {"decoder.hidden": [8], "encoder.hidden": [8]}
CLASSES = 4


def objective() -> Any:
    return registry.get("objectives", "enumerated-elbo")()


def evaluated(program: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    with seeded(0):
        return objective()(program, x)


def discrete(prior: str, posterior: str, latent_dim: int = 1) -> Any:
    vae = pv.build("mlp", "diagonal", (1, 3, 3), latent_dim=latent_dim, prior=prior, posterior=posterior, **SIZES)
    return shaken(vae, 0.5)


def data() -> Tensor:
    return torch.rand(8, 1, 3, 3, dtype=torch.float64, generator=generator(1)).round()


MODELS = [
    (f"categorical:classes={CLASSES}", "categorical", 1, one_hots(1, CLASSES)),
    (f"categorical:classes={CLASSES}", "categorical", 2, one_hots(2, CLASSES)),
    ("bernoulli", "bernoulli", 3, bits(3)),
]


@pytest.mark.parametrize(("prior", "posterior", "latent_dim", "states"), MODELS)
def test_it_is_the_elbo_summed_by_hand(prior: str, posterior: str, latent_dim: int, states: Tensor) -> None:
    vae, x = discrete(prior, posterior, latent_dim), data()
    elbo = torch.zeros(len(x), dtype=torch.float64)
    for z in states:
        log_q = vae.q(x).log_prob(z.expand(len(x), *z.shape))
        log_joint = vae.prior(x).log_prob(z) + vae.likelihood(vae.decoder(z)).log_prob(x)
        elbo = elbo + log_q.exp() * (log_joint - log_q)
    loss, surrogate = evaluated(vae, x)
    torch.testing.assert_close(loss, -elbo.mean().detach())
    parameters = list(vae.parameters())
    for a, b in zip(
        torch.autograd.grad(surrogate, parameters), torch.autograd.grad(-elbo.mean(), parameters), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_it_has_the_expectation_of_the_score_function_gradient_and_no_variance() -> None:
    vae, x = discrete(f"categorical:classes={CLASSES}", "categorical"), data()
    score, guide = gradients(ELBO(), vae, x, 0, 300)
    exact, _ = gradients(objective(), vae, x, 1, 2)
    assert torch.equal(exact[0], exact[1])
    assert float(score.var(0)[guide].sum()) > 0
    assert same_mean(score, exact)
    # and the comparison would find a gradient that stopped at q: 300 draws are enough
    assert not same_mean(score, exact * ~guide)


def test_it_learns_which_of_two_patterns_an_image_is() -> None:
    pattern = torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 1, 0]).double().reshape(1, 1, 3, 3)
    x = torch.cat([pattern, 1 - pattern]).repeat(4, 1, 1, 1)
    vae = discrete("categorical:classes=2", "categorical")
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.1)
    for _ in range(150):
        loss, surrogate = evaluated(vae, x)
        optimizer.zero_grad()
        surrogate.backward()
        optimizer.step()
    # log p(x) = log 1/2 at best
    assert 0.69 < float(loss) < 0.9


class TwoSites(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def guide(self, x: Tensor) -> None:
        import pyro

        with pyro.plate("data", x.shape[0], dim=-1):
            for name in ("z", "w"):
                pyro.sample(name, self.vae.q(x))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: discrete("standard-normal", "diagonal-normal", 2), "from a continuum .Normal."),
        (lambda: discrete("categorical:classes=3", "relaxed-categorical"), "from a continuum .Relaxed."),
        (lambda: discrete("bernoulli", "bernoulli", 11), r"2\^11 states"),
        (lambda: TwoSites(discrete("bernoulli", "bernoulli", 2)), "the guide has 2"),
    ],
)
def test_what_it_cannot_sum_over_it_refuses(build: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        evaluated(build(), data())


def test_the_states_of_a_site_are_all_different() -> None:
    from pyro_vae.programs.states import states as every_state

    states = every_state(discrete(f"categorical:classes={CLASSES}", "categorical", 2).q(data()))
    assert states.shape == (CLASSES**2, 2, CLASSES)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(states, 2))
