"""Discrete latents: few states are summed over exactly; of others it is said that no draw tells of them. Factors count once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from one_latent import OneLatent, X, exact
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.analysis.calibration import sbc
from pyro_vae.errors import ProgramError, UserError
from pyro_vae.evaluation.result import UnreliableEstimateWarning
from pyro_vae.programs.latents import sample_latents
from pyro_vae.programs.trace import draw_terms
from pyro_vae.seeding import seeded

# Discrete latents


class Components(nn.Module):
    """A mixture of normals in one dimension, and of class k and bits b; the guide draws class 0 nearly always."""

    event_shape = (1,)

    def __init__(self, classes: int = 3, bits: int = 0) -> None:
        super().__init__()
        self.classes, self.bits = classes, bits
        self.logits = nn.Parameter(torch.linspace(1.0, -1.0, classes, dtype=torch.float64))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            k = pyro.sample("k", dist.Categorical(logits=self.logits))
            loc = 6.0 * k.to(x.dtype)
            if self.bits:
                b = pyro.sample("b", dist.Bernoulli(0.3 + x.new_zeros(self.bits)).to_event(1))
                loc = loc + b.sum(-1)
            pyro.sample("x", dist.Normal(loc.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            favourite = torch.full((self.classes,), -40.0, dtype=x.dtype)
            favourite[0] = 0.0
            pyro.sample("k", dist.Categorical(logits=favourite.expand(len(x), -1)))
            if self.bits:
                pyro.sample("b", dist.Bernoulli(0.5 + x.new_zeros(len(x), self.bits)).to_event(1))

    def log_px(self, x: Tensor) -> Tensor:
        counts = torch.arange(self.bits + 1, dtype=x.dtype)
        of_bits = dist.Binomial(self.bits, torch.tensor(0.3, dtype=x.dtype)).log_prob(counts)
        loc = 6.0 * torch.arange(self.classes, dtype=x.dtype)[:, None] + counts
        log_prior = self.logits.detach().log_softmax(-1)[:, None] + of_bits
        return (log_prior + dist.Normal(loc, 1.0).log_prob(x[..., None])).flatten(1).logsumexp(-1)


@pytest.mark.parametrize(("classes", "bits"), [(3, 0), (2, 4), (32, 5)])
def test_few_states_are_summed_over_exactly(classes: int, bits: int) -> None:
    """The guide never draws the class of most data: importance weighting would be 18 nats and more too low."""
    program = Components(classes, bits)
    x = torch.tensor([[0.0], [6.0], [11.0], [13.5]], dtype=torch.float64)
    result = pv.log_likelihood(program, x, num_samples=10, chunk_size=64)
    torch.testing.assert_close(result.log_likelihood, program.log_px(x), rtol=0, atol=1e-9)
    assert result.states == classes * 2**bits
    assert result.warnings == []
    assert torch.equal(result.mc_se, torch.zeros(4, dtype=torch.float64))
    assert bool(torch.isneginf(result.khat).all())
    assert f"exact, summed over {classes * 2**bits:,} states" in str(result)
    torch.testing.assert_close(result.interval, result.log_likelihood[:, None].expand(-1, 2))


def test_the_exact_elbo_is_that_of_many_draws() -> None:
    program = Components(2, 3)
    x = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    summed = pv.log_likelihood(program, x)
    with seeded(0), torch.no_grad():
        drawn = draw_terms(program, x, num_samples=20_000).log_weight
    assert ((drawn.mean(0) - summed.elbo).abs() < 4 * drawn.std(0) / math.sqrt(len(drawn))).all()  # false alarm 0.01 %


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")
def test_many_states_are_warned_of_and_have_no_k() -> None:
    program = Components(33, 5)
    x = torch.tensor([[0.0], [11.0]], dtype=torch.float64)
    result = pv.log_likelihood(program, x, num_samples=200)
    assert result.states is None
    assert bool(result.khat.isnan().all())
    assert "the guide lives on less than the model" in result.warnings[0]  # it draws other states than the posterior's
    assert result.summary()["khat_median"] is None
    tree = pv.posterior(program, x, num_samples=20, source="psis", prior=False)
    assert tree.sample_stats["khat"].isnull().all()


def test_discrete_beside_continuous_is_warned_of() -> None:
    class Mixed(Components):
        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                k = pyro.sample("k", dist.Categorical(logits=self.logits))
                z = pyro.sample("z", dist.Normal(6.0 * k.to(x.dtype), 1.0))
                pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)

        def guide(self, x: Tensor) -> None:
            super().guide(x)
            with pyro.plate("rows", len(x), dim=-1):
                pyro.sample("z", dist.Normal(x[:, 0] / 2, 1.0))

    for call in (pv.log_likelihood, pv.bound_curve):
        with pytest.warns(UnreliableEstimateWarning, match="the guide lives on less than the model"):
            call(Mixed(), X, num_samples=100)


def test_a_relaxed_guide_of_a_discrete_latent_has_no_weights() -> None:
    program = OneLatent(
        lambda x: dist.RelaxedBernoulliStraightThrough(0.5 * x.new_ones(()), 0.5 + 0 * x[:, 0]),
        prior=lambda x: dist.Bernoulli(0.5 * x.new_ones(())),
    )
    with pytest.raises(ProgramError, match=r"'z' is continuous .*, and the model's discrete"):
        pv.log_likelihood(program, X, num_samples=30)


def test_class_numbers_are_encoded_by_their_mode() -> None:
    z = pv.encode(Components(3), X)
    assert isinstance(z, Tensor)
    assert not z.is_floating_point()
    assert torch.equal(z, torch.zeros(6, dtype=z.dtype))
    assert pv.decode(Components(3), z).shape == X.shape
    assert pv.reconstruct(Components(3), X).shape == X.shape


# Factors, and a second observation


class Weighed(OneLatent):
    """The model, times exp(-z^2 / 2), as a factor: an unnormalised posterior N(x/3, 1/3)."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1) + self.shift, 1.0).to_event(1), obs=x)
            pyro.factor("ridge", -0.5 * z.square())


def third(x: Tensor) -> Any:
    return dist.Normal(x[:, 0] / 3, math.sqrt(1 / 3))


def test_a_factor_counts_with_the_likelihood() -> None:
    """The guide is the posterior: log int p(z) p(x|z) f(z) dz without noise, and KL(q || p) in closed form, +- 4 errors."""
    program = Weighed(third)
    result = pv.log_likelihood(program, X, num_samples=4000)
    evidence = torch.distributions.kl_divergence(third(X), dist.Normal(0.0, 1.0))
    mass = 0.5 * math.log(1 / 3) - X[:, 0].square() / 3 - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(result.log_likelihood, mass, rtol=0, atol=1e-9)
    torch.testing.assert_close(result.elbo, mass, rtol=0, atol=1e-9)
    assert ((result.kl - evidence).abs() < 0.05).all()  # sd of log q - log p is at most 0.7: 4 errors are 0.045
    information = pv.latent_information(program, X, num_samples=2000)
    assert abs(information.rate - float(evidence.mean())) < 0.05
    tree = pv.posterior(program, X, num_samples=50, prior=False)
    assert list(tree.log_prior.data_vars) == ["z"]
    lp = tree.log_likelihood["x"] + tree.log_prior["z"]
    assert float(abs(tree.sample_stats["lp"] - lp).max()) < 1e-9


def test_what_needs_joint_draws_refuses_a_factor() -> None:
    program = Weighed(third)
    with pytest.raises(UserError, match=r"bidirectional Monte Carlo needs draws of the joint .*'ridge'"):
        pv.bidirectional(program, 2, num_distributions=10)
    with pytest.raises(UserError, match=r"calibration needs draws of the joint .*'ridge'"):
        sbc(program, 10)
    with pytest.warns(UserWarning, match="'ridge' has no part in samples"):
        pv.sample(program, 3)
    assert sample_latents(program, 3)["z"].shape == (3,)


@pytest.mark.parametrize(
    ("part", "site", "words"),
    [
        ("model", lambda x: pyro.sample("w", dist.Normal(x[:, 0], 1.0), obs=x[:, 0]), "a second observed site 'w'"),
        ("guide", lambda x: pyro.sample("w", dist.Normal(x[:, 0], 1.0), obs=x[:, 0]), "the site 'w' is observed"),
        ("guide", lambda x: pyro.factor("f", 0 * x[:, 0], has_rsample=True), "pyro.factor 'f' makes q"),
    ],
)
def test_observations_beside_x_are_refused(part: str, site: Callable[[Tensor], Any], words: str) -> None:
    class More(OneLatent):
        def model(self, x: Tensor) -> None:
            super().model(x)
            self.more("model", x)

        def guide(self, x: Tensor) -> None:
            super().guide(x)
            self.more("guide", x)

        def more(self, where: str, x: Tensor) -> None:
            if where == part:
                with pyro.plate("rows", len(x), dim=-1):
                    site(x)

    for call in (
        lambda: pv.fit(More(exact), X, steps=1),
        lambda: pv.log_likelihood(More(exact), X, num_samples=30),
        lambda: pv.encode(More(exact), X),
    ):
        with pytest.raises(ProgramError, match=words):
            call()
