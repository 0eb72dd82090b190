"""Semi-amortized refinement on a linear-Gaussian model: it closes the amortization part of the gap, and no other."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.errors import UserError
from pyro_vae.networks.heads import positive_inverse
from pyro_vae.objectives.elbo import ELBO
from pyro_vae.programs.contract import admit
from pyro_vae.programs.refined import Refined
from pyro_vae.programs.trace import draw_terms, evaluating
from pyro_vae.seeding import generator, seeded

NOISE, DRAWS = 0.5, 400
# Guides that were never trained are rightly warned of.
untrained = pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")


def linear_gaussian(posterior: str) -> tuple[Any, Tensor, Tensor, float]:
    """A VAE in float64 whose log p(x) is known, its guide untrained; data, log p(x), and the least a diagonal loses."""
    weight = torch.randn(6, 2, generator=generator(2), dtype=torch.float64)
    vae = pv.build("ppca", "linear", (6,), latent_dim=2, posterior=posterior).double()
    with torch.no_grad():
        vae.likelihood.head.map.weight.copy_(weight)
        vae.likelihood.raw_scale.fill_(positive_inverse(NOISE, vae.likelihood.min_scale))
        # of features that are x: each parameter a direction of its own, so that what refinement reaches is no matter of luck
        directions = torch.linalg.qr(torch.randn(6, 6, generator=generator(1), dtype=torch.float64))[0]
        for head, rows in zip(vae.posterior.seams(), directions.split(4), strict=False):
            head.map.weight.copy_(0.3 * rows[: len(head.map.weight)])
    x = pv.sample(vae, 30, seed=1)
    covariance = weight @ weight.T + NOISE**2 * torch.eye(6, dtype=torch.float64)
    truth = torch.distributions.MultivariateNormal(torch.zeros(6, dtype=torch.float64), covariance).log_prob(x)
    precision = torch.eye(2, dtype=torch.float64) + weight.T @ weight / NOISE**2
    least = 0.5 * float(precision.diagonal().log().sum() - torch.linalg.slogdet(precision)[1])
    return vae, x, truth, least


def gap(program: Any, x: Tensor, truth: Tensor) -> tuple[float, float]:
    """Mean log p(x) - ELBO, and its Monte Carlo error."""
    with evaluating(program), seeded(3):
        drawn = draw_terms(program, x, num_samples=DRAWS).log_weight
    return float((truth - drawn.mean(0)).mean()), float(drawn.var(0).mean() / DRAWS / len(x)) ** 0.5


@pytest.mark.parametrize("posterior", ["full-rank-normal", "diagonal-normal"])
def test_refinement_closes_the_amortization_gap_and_leaves_what_the_family_cannot_say(posterior: str) -> None:
    vae, x, truth, least = linear_gaussian(posterior)
    left = least if posterior == "diagonal-normal" else 0.0
    before, _ = gap(vae, x, truth)
    after, se = gap(Refined(vae, steps=400, lr=0.5), x, truth)
    few, _ = gap(Refined(vae, steps=5, lr=0.05), x, truth)
    assert least > 0.05
    assert before > few > after
    assert before > 1.0
    # 3.3 errors of the mean, and 0.02 nats for an ascent that has not quite arrived
    assert after == pytest.approx(left, abs=3.3 * se + 0.02)


@pytest.mark.slow
@untrained
def test_importance_weights_under_a_refined_guide_agree_with_the_closed_form() -> None:
    vae, x, truth, _ = linear_gaussian("full-rank-normal")
    program = Refined(vae, steps=100, lr=0.5)
    result = pv.log_likelihood(program, x, num_samples=200, compile="off")
    assert result.khat_bad_fraction == 0
    z = (result.log_likelihood - result.bias - truth) / result.mc_se
    assert abs(float((result.log_likelihood - result.bias - truth).mean())) < 4 * result.nll_mc_se + 1e-3
    assert float(z.abs().median()) < 2
    again = pv.log_likelihood(program, x, num_samples=200, compile="off")
    assert torch.equal(result.log_likelihood, again.log_likelihood)
    with (
        evaluating(program),
        pytest.MonkeyPatch.context() as patch,
    ):  # nothing is refined twice for the same images and weights
        patch.setattr(program, "_climb", lambda x: pytest.fail("refined anew"))
        torch.testing.assert_close(program.refine(program._last[0][0]), program._last[2])  # type: ignore[index]


@untrained
def test_a_refined_program_keeps_the_contract_and_the_weights() -> None:
    vae, x, _, _ = linear_gaussian("diagonal-normal")
    program = Refined(vae, steps=3)
    weights = {name: t.clone() for name, t in vae.state_dict().items()}
    admit(program, x)
    with evaluating(program):
        assert not program.refine(x).requires_grad
    assert all(torch.equal(t, weights[name]) for name, t in vae.state_dict().items())
    assert all(p.grad is None for p in vae.parameters())
    assert pv.reconstruct(program, x).shape == x.shape
    assert pv.sample(program, 3).shape == (3, 6)
    copy.deepcopy(program)


def test_refined_features_change_with_the_data_and_with_the_weights() -> None:
    vae, x, _, _ = linear_gaussian("diagonal-normal")
    program = Refined(vae, steps=3)
    first = program.refine(x)
    assert program.refine(x) is first
    assert not torch.equal(program.refine(x + 1), first)
    with torch.no_grad():
        vae.posterior.head.map.bias.add_(1.0)
    assert not torch.equal(program.refine(x), first)


def test_the_whole_program_is_trained_at_the_refined_point() -> None:
    _, x, _, _ = linear_gaussian("full-rank-normal")
    program = Refined(pv.build("mlp", "diagonal", (6,), latent_dim=2, encoder="mlp:hidden=[5]").double(), steps=3)
    with seeded(0):
        loss, surrogate = ELBO()(program, x.gt(0).double())
    surrogate.backward()
    assert math.isfinite(float(loss))
    for name, p in program.named_parameters():
        assert p.grad is not None, name
        assert bool(torch.isfinite(p.grad).all()), name
        assert bool(p.grad.any()), name


def test_what_cannot_be_refined_is_refused() -> None:
    vae = pv.build("mlp", "diagonal", (4,), latent_dim=2, prior="bernoulli", posterior="bernoulli")
    with pytest.raises(UserError, match="not reparameterized"), seeded(0):
        Refined(vae).guide(torch.ones(3, 4))
    with pytest.raises(UserError, match="expected a VAE"):
        Refined(torch.nn.Identity())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at least 1"):
        Refined(vae, steps=0)
