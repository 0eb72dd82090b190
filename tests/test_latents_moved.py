"""Latents that chains and ascents move: mixtures, positive ones in float32, priors without draws, modes that a guide misses."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from one_latent import OneLatent
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.analysis.mcmc import sample_chains
from pyro_vae.evaluation.ais import annealed_log_likelihood
from pyro_vae.seeding import generator

X = torch.linspace(-1.0, 3.0, 8, dtype=torch.float64)[:, None]


def normals(x: Tensor) -> Any:
    places = dist.Normal(torch.tensor([-2.0, 2.0]).to(x), x.new_ones(2))
    return dist.MixtureSameFamily(dist.Categorical(x.new_ones(2)), places)


def gammas(x: Tensor) -> Any:
    shapes = dist.Gamma(torch.tensor([2.0, 5.0]).to(x), x.new_ones(2))
    return dist.MixtureSameFamily(dist.Categorical(x.new_ones(2)), shapes)


def anything(x: Tensor) -> Any:
    return dist.ImproperUniform(dist.constraints.real, (), ())


def log_prior(prior: Any, z: Tensor) -> Tensor:
    if prior is anything:
        return torch.zeros_like(z)
    if prior is normals:
        return normals(X).log_prob(z)
    return torch.where(z > 0, gammas(X).log_prob(z.clamp(min=1e-12)), -math.inf)


def evidence(prior: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    """Log p(x) by quadrature."""
    z = torch.linspace(-15, 20, 200_001, dtype=torch.float64)
    joint = log_prior(prior, z) + dist.Normal(z, 1.0).log_prob(x)
    return joint.logsumexp(1) + math.log(float(z[1] - z[0]))


GUIDES: dict[Any, Callable[[Tensor], Any]] = {
    normals: lambda x: dist.Normal(x[:, 0] / 2, 1.5),
    gammas: lambda x: dist.LogNormal(0 * x[:, 0] + 0.5, 1.0),
    anything: lambda x: dist.Normal(x[:, 0], 1.2),
}


@pytest.mark.parametrize(
    ("prior", "start"),
    [
        (normals, "prior"),
        pytest.param(gammas, "guide", marks=pytest.mark.slow),
        pytest.param(normals, "guide", marks=pytest.mark.slow),
        pytest.param(gammas, "prior", marks=pytest.mark.slow),
    ],
)
def test_annealing_takes_mixtures(prior: Any, start: Any) -> None:
    """To 4 standard errors of each datum: a false alarm in 1,000 of eight."""
    program = OneLatent(GUIDES[prior], prior)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = annealed_log_likelihood(program, X, num_chains=64, num_distributions=100, start=start)
    off = (found.log_likelihood - found.bias - evidence(prior, X)) / found.mc_se
    assert float(off.abs().max()) < 4


@pytest.mark.parametrize("prior", [anything, *(pytest.param(p, marks=pytest.mark.slow) for p in (normals, gammas))])
def test_chains_take_mixtures_and_improper_priors(prior: Any) -> None:
    program = OneLatent(GUIDES[prior], prior)
    drawn = sample_chains(program, X, num_samples=400, num_warmup=200).latents["z"]
    z = torch.linspace(-15, 20, 20_001, dtype=torch.float64)
    mean = ((log_prior(prior, z) + dist.Normal(z, 1.0).log_prob(X)).softmax(1) * z).sum(1)
    off = (torch.from_numpy(drawn).mean((0, 1)) - mean).abs().max()
    print("largest difference of a mean", float(off))
    assert float(off) < 0.25


def test_a_prior_without_draws_is_annealed_from_the_guide_alone() -> None:
    program = OneLatent(GUIDES[anything], anything)
    with pytest.raises(pv.UserError, match="start='guide'"):
        annealed_log_likelihood(program, X, num_distributions=50)
    found = annealed_log_likelihood(program, X, num_distributions=50, start="guide")
    assert found.witness is None
    assert float(found.log_likelihood.abs().max()) < 0.1  # an integral over the line of a normal density


@pytest.mark.parametrize(
    "positive",
    [
        (lambda x: dist.Gamma(x.new_full((2,), 2.0), 1.0), lambda x: dist.LogNormal(0.3 * x[:, :2], 0.5)),
        (lambda x: dist.Beta(x.new_full((2,), 2.0), 2.0), lambda x: dist.Beta(2 + x[:, :2].abs(), 2.0)),
    ],
    ids=["positive", "bounded"],
)
def test_gaps_of_float32_programs_with_matrix_products(positive: Any) -> None:
    class Product(nn.Module):
        event_shape = (3,)

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(2, 3, generator=generator(0)))

        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", positive[0](x).to_event(1))
                pyro.sample("x", dist.Normal(z @ self.weight, 0.5).to_event(1), obs=x)

        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", positive[1](x).to_event(1))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.isfinite(
            pv.inference_gaps(Product(), torch.rand(5, 3, generator=generator(1)), num_steps=20).elbo
        ).all()


def test_chains_see_a_mode_that_the_guide_misses() -> None:
    class Modes(OneLatent):
        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 8.0))
                pyro.sample("x", dist.Normal(z.abs().unsqueeze(-1) + self.shift, 0.7).to_event(1), obs=x)

    program = Modes(lambda x: dist.Normal(x[:, 0], 0.7))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pv.posterior(program, X[4:] + 5, source="nuts", num_samples=200, num_warmup=100, predictive="none", prior=False)
    assert any("R-hat" in str(w.message) for w in caught)
