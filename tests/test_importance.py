"""Importance-weighted log-likelihood: known answers, stated errors, diagnostics, seeds."""

from __future__ import annotations

import dataclasses
import math
import warnings

import pytest
import scipy.stats
import torch
from by_hand import KnownWeights
from torch import Tensor

import pyro_vae as pv
from pyro_vae.errors import UserError
from pyro_vae.evaluation.estimators import estimate, good_khat, pareto_khat
from pyro_vae.evaluation.importance import block_shape
from pyro_vae.evaluation.result import UnreliableEstimateWarning
from pyro_vae.seeding import generator


def lognormal(sigma: float, num_samples: int, batch: int, seed: int = 0) -> Tensor:
    """Log-weights whose true log-mean-exp is sigma^2 / 2."""
    return sigma * torch.randn(num_samples, batch, generator=generator(seed), dtype=torch.float64)


def test_log_mean_exp_by_hand() -> None:
    log_weight = torch.tensor([[0.0, -1000.0], [math.log(3.0), -1000.0 + math.log(5.0)]])
    found = estimate(log_weight)
    torch.testing.assert_close(
        found.log_likelihood, torch.tensor([math.log(2), -1000 + math.log(3)]).double(), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(found.ess, torch.tensor([16 / 10, 36 / 26]).double(), rtol=1e-4, atol=0)


def test_bias_and_standard_error_are_the_jackknife() -> None:
    log_weight = lognormal(1.0, 7, 3)
    found, k = estimate(log_weight), 7
    lme = lambda t: t.logsumexp(0) - math.log(len(t))  # noqa: E731
    without = torch.stack([lme(torch.cat([log_weight[:i], log_weight[i + 1 :]])) for i in range(k)])
    bias = (k - 1) * (without.mean(0) - lme(log_weight))
    se = ((k - 1) / k * (without - without.mean(0)).square().sum(0)).sqrt()
    torch.testing.assert_close(found.bias, bias, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.mc_se, se, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("sigma", "num_samples"), [(0.3, 50), (0.5, 400), (0.8, 1000)])
def test_bias_and_error_of_lognormal_weights_have_their_closed_form(sigma: float, num_samples: int) -> None:
    # Delta method: bias -(e^{s^2} - 1) / 2K, variance (e^{s^2} - 1) / K, both to order 1/K; truth s^2 / 2.
    batch = 1500
    found = estimate(lognormal(sigma, num_samples, batch))
    variance = math.expm1(sigma**2) / num_samples
    assert float(found.bias.mean()) == pytest.approx(-variance / 2, rel=0.1)
    assert float(found.mc_se.square().mean()) == pytest.approx(variance, rel=0.1)
    corrected = found.log_likelihood - found.bias
    # Three tests of level 1e-4 each: the corrected mean, the uncorrected mean, the spread of standardised errors.
    z = (corrected.mean() - sigma**2 / 2) / (corrected.std() / batch**0.5)
    assert abs(float(z)) < 3.9
    z = (found.log_likelihood.mean() - (sigma**2 / 2 - variance / 2)) / (found.log_likelihood.std() / batch**0.5)
    assert abs(float(z)) < 3.9
    low, high = scipy.stats.chi2.ppf([5e-5, 1 - 5e-5], batch - 1) / (batch - 1)
    assert low < float(corrected.var() / found.mc_se.square().mean()) < high


def test_equal_weights_have_no_error() -> None:
    for log_weight in (torch.full((100, 2), -37.25), torch.full((30, 2), 0.0), torch.full((2, 2), -1e4)):
        found = estimate(log_weight)
        assert torch.equal(found.log_likelihood, log_weight[0].double())
        assert torch.isneginf(found.khat).all()
        assert found.mc_se.tolist() == found.bias.tolist() == [0.0, 0.0]
        assert found.ess.tolist() == [len(log_weight)] * 2


def test_weights_equal_to_the_rounding_of_their_terms_are_equal() -> None:
    terms = torch.tensor([1000.0, 1000.0])
    log_weight = 1e-3 * torch.rand(100, 2, generator=generator(0))
    assert not torch.isneginf(estimate(log_weight).khat).any()
    assert torch.isneginf(estimate(log_weight, terms).khat).all()


@pytest.mark.parametrize("fill", [-math.inf, math.nan])
def test_weights_that_are_all_zero_or_nan(fill: float) -> None:
    found = estimate(torch.full((100, 2), fill))
    assert not torch.isfinite(found.log_likelihood).any()
    assert not (found.khat < 0.7).any()
    assert not (found.mc_se < 1e9).any()


def test_draws_outside_the_support_count_as_zero() -> None:
    log_weight = lognormal(0.3, 200, 2)
    log_weight[::2] = -math.inf
    found = estimate(log_weight)
    expected = log_weight[1::2].logsumexp(0) - math.log(200)
    torch.testing.assert_close(found.log_likelihood, expected)
    assert torch.isfinite(found.mc_se).all()
    assert torch.isfinite(found.khat).all()
    variance = ((log_weight - expected).exp().square().mean(0) - 1) / 200
    torch.testing.assert_close(found.mc_se.square(), variance, rtol=0.05, atol=0)


def test_one_weight_that_dwarfs_all_others_is_bad() -> None:
    log_weight = torch.zeros(100, 1)
    log_weight[3] = 800.0
    found = estimate(log_weight)
    assert float(found.khat) > 0.7
    assert float(found.ess) == pytest.approx(1.0)
    assert float(found.mc_se) > 1 or math.isinf(float(found.mc_se))


def test_one_draw_has_no_error_estimate() -> None:
    found = estimate(torch.tensor([[1.5, -2.0]]))
    assert found.log_likelihood.tolist() == [1.5, -2.0]
    assert all(torch.isnan(t).all() for t in (found.mc_se, found.bias, found.khat))


def test_few_draws_have_no_pareto_k() -> None:
    assert torch.isnan(pareto_khat(lognormal(1.0, 24, 3))).all()
    assert torch.isfinite(pareto_khat(lognormal(1.0, 25, 3))).all()


def test_the_sign_of_pareto_k() -> None:
    # q = N(0, s^2) for p = N(0, 1): weights have k = 1 - s^2 where s < 1, and are bounded where s > 1.
    z = torch.randn(5000, 4, generator=generator(0), dtype=torch.float64)
    log_weight = lambda s: -0.5 * (s * z).square() + 0.5 * z.square() + math.log(s)  # noqa: E731
    assert (pareto_khat(log_weight(1 / 3)) > 0.7).all()
    assert (pareto_khat(log_weight(3.0)) < 0.2).all()
    narrow = float(pareto_khat(log_weight(1 / 3)).mean())
    assert narrow == pytest.approx(1 - 1 / 9, abs=0.25)


def test_the_threshold_of_k_depends_on_the_number_of_draws() -> None:
    assert good_khat(5000) == 0.7
    assert good_khat(100) == 0.5
    assert good_khat(1) < 0.05


# Through a program


def test_a_guide_three_times_too_narrow_is_found_out() -> None:
    with pytest.warns(UnreliableEstimateWarning, match="Pareto k is above 0.70 for 100.0% of 3 images"):
        result = pv.log_likelihood(KnownWeights(1 / 3, dim=4), torch.zeros(3, 1), num_samples=5000)
    assert (result.khat > 0.7).all()
    assert result.khat_bad_fraction == 1.0
    assert any("narrow" in w and "expressive guide" in w for w in result.warnings)


def test_few_samples_are_warned_of() -> None:
    with pytest.warns(UnreliableEstimateWarning, match="K = 1 draws are too few"):
        result = pv.log_likelihood(KnownWeights(2.0), torch.zeros(3, 1), num_samples=1)
    torch.testing.assert_close(result.log_likelihood, result.elbo)
    figures = result.summary()
    assert figures["nll_mc_se"] is figures["khat_median"] is figures["khat_bad_fraction"] is None


def test_the_answer_is_right_and_its_error_stated() -> None:
    # z-test of the mean over 400 rows, |z| < 3.9: a false alarm in 1e-4 of seeds.
    x = torch.zeros(400, 1)
    result = pv.log_likelihood(KnownWeights(1.5), x, num_samples=1000)
    truth = -0.5 * math.log(2 * math.pi)
    z = (result.log_likelihood - result.bias - truth) / result.mc_se
    assert abs(float(z.mean())) * 20 < 3.9
    assert result.warnings == []
    assert abs(result.nll + truth) < 3.9 * result.nll_mc_se + result.nll_bias


def test_the_result_is_in_float64_on_the_cpu() -> None:
    result = pv.log_likelihood(KnownWeights(1.5).float(), torch.zeros(3, 1), num_samples=100)
    for field in ("log_likelihood", "bias", "mc_se", "ess", "khat", "reconstruction", "kl", "elbo"):
        tensor = getattr(result, field)
        assert (tensor.dtype, tensor.device.type, tuple(tensor.shape)) == (torch.float64, "cpu", (3,)), field
    assert (result.num_samples, len(result), result.seed) == (100, 3, 0)
    assert result.nll == pytest.approx(-float(result.log_likelihood.mean()))
    assert result.nll_mc_se == pytest.approx(float(result.mc_se.square().sum()) ** 0.5 / 3)
    assert result.nll_data_se == pytest.approx(float(result.log_likelihood.std()) / 3**0.5)
    torch.testing.assert_close(result.elbo, result.reconstruction - result.kl)
    assert "nats per image" in str(result)
    assert repr(result).startswith("<LogLikelihood")
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.seed = 1


def test_seeds() -> None:
    program, x = KnownWeights(1.5), torch.zeros(5, 1)
    first = pv.log_likelihood(program, x, num_samples=50, seed=3)
    torch_state = torch.random.get_rng_state()
    again = pv.log_likelihood(program, x, num_samples=50, seed=3)
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    other = pv.log_likelihood(program, x, num_samples=50, seed=4)
    assert torch.equal(first.log_likelihood, again.log_likelihood)
    assert not torch.equal(first.log_likelihood, other.log_likelihood)
    assert len(first.log_likelihood.unique()) == 5  # every row has draws of its own


def test_rows_are_drawn_by_their_place_alone() -> None:
    program = KnownWeights(1.5)
    whole = pv.log_likelihood(program, torch.zeros(7, 1), num_samples=50, chunk_size=100)
    start = pv.log_likelihood(program, torch.zeros(4, 1), num_samples=50, chunk_size=100)
    assert torch.equal(whole.log_likelihood[:4], start.log_likelihood)
    assert whole.chunk_size == 100


@pytest.mark.parametrize("chunk_size", [1, 7, 40, 64, 1000, 10**6])
def test_a_block_is_never_larger_than_asked_and_all_is_drawn(chunk_size: int) -> None:
    for num_samples in (1, 39, 40, 5000):
        images, samples = block_shape(torch.zeros(33, 1), num_samples, chunk_size)
        assert images >= 1
        assert 1 <= samples <= num_samples
        assert images * samples <= max(chunk_size, 1)
        assert images <= 33


@pytest.mark.parametrize("chunk_size", [64, 250, 10_000])
def test_another_block_size_agrees_within_the_error_bars(chunk_size: int) -> None:
    # z-test of the difference at |z| < 3.9: a false alarm in 1e-4 of seeds.
    program, x = KnownWeights(1.5), torch.zeros(40, 1)
    a = pv.log_likelihood(program, x, num_samples=500)
    b = pv.log_likelihood(program, x, num_samples=500, chunk_size=chunk_size)
    assert b.chunk_size <= chunk_size
    assert abs(a.nll - b.nll) < 3.9 * math.hypot(a.nll_mc_se, b.nll_mc_se)


def test_equal_weights_in_any_block_size_agree_to_rounding() -> None:
    x = torch.randn(9, 1, generator=generator(0), dtype=torch.float64)
    exact = torch.distributions.Normal(0.0, 1.0).log_prob(x[:, 0])
    for chunk_size in (1, 30, 77, None):
        result = pv.log_likelihood(KnownWeights(1.0), x, num_samples=60, chunk_size=chunk_size)
        torch.testing.assert_close(result.log_likelihood, exact, rtol=1e-13, atol=1e-13)
        assert torch.isneginf(result.khat).all()
        assert result.nll_mc_se == 0.0


def test_progress_counts_every_image() -> None:
    seen: list[int] = []
    pv.log_likelihood(KnownWeights(1.0), torch.zeros(10, 1), num_samples=30, chunk_size=90, progress=seen.append)
    assert seen == [3, 3, 3, 1]


def test_dropout_is_off_and_the_mode_put_back() -> None:
    encoder = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Tanh())
    vae = pv.build("mlp", "diagonal", (4,), encoder=encoder, latent_dim=2)
    vae.train()
    x = torch.ones(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)  # an untrained guide
        first = pv.log_likelihood(vae, x, num_samples=30)
        again = pv.log_likelihood(vae.eval(), x, num_samples=30)
    assert torch.equal(first.log_likelihood, again.log_likelihood)
    assert not any(p.grad is not None for p in vae.parameters())
    vae.train()
    pv.encode(vae, x)
    assert all(module.training for module in vae.modules())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: pv.log_likelihood(p, torch.zeros(3, 4), num_samples=0), "num_samples of at least 1, got 0"),
        (lambda p: pv.log_likelihood(p, torch.zeros(0, 4)), r"at least one row, got \(0, 4\)"),
        (
            lambda p: pv.log_likelihood(p, torch.zeros(4)),
            r"a lone datum of shape \(4,\): give it a batch axis, x\[None\]",
        ),
        (lambda p: pv.log_likelihood(p, torch.zeros(3, 4), chunk_size=0), "chunk_size of at least 1, got 0"),
        (lambda p: pv.log_likelihood(p, torch.full((3, 4), 0.5), num_samples=30), "0.5.*Bernoulli|Bernoulli.*0.5"),
        (lambda p: pv.log_likelihood(p, torch.full((3, 4), math.nan), num_samples=30), "NaN or infinite.*row 0"),
        (
            lambda p: pv.log_likelihood(p, torch.zeros(3, 5), num_samples=30),
            r"expected data \(N, 4\), as VAE.*got \(3, 5\)",
        ),
        (lambda p: pv.log_likelihood(torch.nn.Identity(), torch.zeros(3, 4)), "Identity has no model and no guide"),
    ],
)
def test_refusals(call: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call(pv.build("mlp", "diagonal", (4,), latent_dim=2))  # type: ignore[operator]
    assert "\n" not in str(caught.value)
