"""Inference gaps against the closed form of linear-Gaussian models, and bounds of other programs."""

from __future__ import annotations

import math

import pytest
import torch
from test_ais import GammaPoisson, LinearGaussian
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.evaluation.gaps import DIAGONAL_NORMAL, SAME_FAMILY, inference_gaps
from pyro_vae.evaluation.result import UnreliableEstimateWarning
from pyro_vae.networks.heads import positive_inverse
from pyro_vae.seeding import generator


def diagonal_gap(precision: Tensor) -> float:
    """KL from the best diagonal normal to N(m, precision^-1): (sum log L_ii - log det L) / 2."""
    return 0.5 * float(precision.diagonal().log().sum() - torch.linalg.slogdet(precision)[1])


def test_a_program_of_ones_own() -> None:
    """The guide is the best diagonal normal times 2 in scale: the amortization gap is what that costs."""
    program = LinearGaussian(6, 3, narrow=2.0)
    x = pv.sample(program, 20, seed=1)
    result = pv.log_likelihood(program, x, num_samples=20_000)
    gaps = inference_gaps(program, x, log_likelihood=result, num_steps=300, lr=0.05, seed=2)
    assert gaps.family == DIAGONAL_NORMAL
    # 3.3 errors of the mean, and 0.02 nats for an ascent that has not quite arrived
    assert float(gaps.approximation.mean()) == pytest.approx(
        diagonal_gap(program.precision), abs=3.3 * gaps.approximation_se + 0.02
    )
    cost = 3 * (-math.log(2) + 0.5 * (4 - 1))
    assert float(gaps.amortization.mean()) == pytest.approx(cost, abs=3.3 * gaps.amortization_se + 0.02)
    assert "approximation" in str(gaps)


def test_a_vae_is_optimised_in_its_own_family() -> None:
    weight = torch.randn(6, 2, generator=generator(0), dtype=torch.float64)
    vae = pv.build("ppca", "linear", (6,), latent_dim=2).double()
    with torch.no_grad():
        vae.likelihood.head.map.weight.copy_(weight)
        vae.likelihood.raw_scale.fill_(positive_inverse(0.5, vae.likelihood.min_scale))
    x = pv.sample(vae, 12, seed=1)
    before = {name: t.clone() for name, t in vae.state_dict().items()}
    with pytest.warns(UnreliableEstimateWarning, match="Pareto k"):  # the untrained guide is a poor one
        result = pv.log_likelihood(vae, x, num_samples=20_000)
    gaps = inference_gaps(vae, x, log_likelihood=result, num_steps=600, lr=0.05, seed=2)
    assert gaps.family == SAME_FAMILY
    precision = torch.eye(2, dtype=torch.float64) + weight.T @ weight / 0.25
    exact = torch.distributions.MultivariateNormal(
        vae.likelihood.head.map.bias.detach(), weight @ weight.T + 0.25 * torch.eye(6, dtype=torch.float64)
    ).log_prob(x)
    found = float((exact - gaps.elbo_optimal).mean())
    assert found == pytest.approx(diagonal_gap(precision), abs=3.3 * gaps.approximation_se + 0.02)
    assert float(gaps.amortization.mean()) > 1.0
    assert all(torch.equal(t, before[name]) for name, t in vae.state_dict().items())
    assert all(p.grad is None for p in vae.parameters())


def test_a_constrained_latent() -> None:
    program = GammaPoisson().double()
    program.p = nn.Parameter(torch.zeros((), dtype=torch.float64))
    x = torch.tensor([[2, 0, 1, 3], [5, 4, 6, 5]]).double()
    result = pv.log_likelihood(program, x, num_samples=5000)
    gaps = inference_gaps(program, x, log_likelihood=result, num_steps=200, lr=0.03)
    assert bool((gaps.approximation > -0.02).all())
    assert bool((gaps.approximation < 0.1).all())
    assert float(gaps.elbo_optimal.mean()) > float(gaps.elbo.mean())
    assert gaps.summary()["num_data"] == 2
