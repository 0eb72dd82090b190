"""As many draws as an error bar asks for: what is reported does not depend on how their number was found."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from by_hand import KnownWeights
from test_ais import LinearGaussian
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.analysis.evidence import weight_diagnostics
from pyro_vae.analysis.report.likelihood import headline
from pyro_vae.cli.evaluate import _table
from pyro_vae.evaluation.adaptive import PILOT, chosen
from pyro_vae.evaluation.estimators import Estimate, estimate, good_khat
from pyro_vae.programs.walk import SmallerChunkWarning


def log_likelihood(program: nn.Module, x: Tensor, **options: Any) -> pv.LogLikelihood:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pv.log_likelihood(program, x, **options)


class HardWhereLarge(LinearGaussian):
    """The guide's mean is off in proportion to it: images far from the mean of all have weights of more spread."""

    def mean(self, x: Tensor) -> Tensor:
        return 0.8 * super().mean(x)


def test_draws_until_the_error_is_small_enough() -> None:
    """Easy images get few, hard ones many, and the estimates agree with those of all draws."""
    program = HardWhereLarge(8, 4, noise=1.0, narrow=1.3)
    x = pv.sample(program, 30, seed=2)
    found = log_likelihood(program, x, num_samples=8000, target_se=0.04)
    whole = log_likelihood(program, x, num_samples=4000, seed=1)
    draws = found.draws
    assert draws is not None
    assert set(draws.tolist()) <= {250, 500, 1000, 2000, 4000, 8000}
    assert draws.min() < draws.max()
    assert found.target_met >= 0.9  # of light weights; the pilot's error is off by more than its margin in 1 of 100
    corrected = lambda r: r.log_likelihood - r.bias  # noqa: E731
    z = (corrected(found) - corrected(whole)) / (found.mc_se.square() + whole.mc_se.square()).sqrt()
    assert float(z.abs().max()) < 4.5  # of 30; a false alarm in 2e-4, were the errors normal
    assert "on average, 8000 at most" in str(found)
    assert found.summary()["draws_mean"] == float(draws.double().mean())
    torch.testing.assert_close(found.elbo, whole.elbo, atol=1.0, rtol=0.1)


@pytest.mark.parametrize(("scale", "target_se"), [(0.8, 0.1), (0.9, 0.06)])
def test_the_decision_to_stop_leaves_no_bias(scale: float, target_se: float) -> None:
    """Weights of k = 0.36 and 0.19 per latent, 500 images: |z| < 4, a false alarm in 6e-5.

    Four errors are 0.027 and 0.015 nats. Stopping at the first look at which the estimated error was small gave z = -11 and -9.
    The images that got few draws, and those that got many, are each without bias: nothing is left of the pilot.
    """
    program = LinearGaussian(6, 3, noise=1.0, narrow=scale)
    x = pv.sample(program, 500, seed=1)
    found = log_likelihood(program, x, num_samples=8000, target_se=target_se)
    error = found.log_likelihood - found.bias - program.exact(x)
    assert found.draws is not None
    assert len(found.draws.unique()) > 1
    assert abs(float(error.mean())) < 4 * found.nll_mc_se
    few = found.draws <= found.draws.median()
    for rows in (few, ~few):
        assert abs(float(error[rows].sum())) < 4.5 * float(found.mc_se[rows].square().sum().sqrt())


def test_images_that_draw_together_and_apart_have_noise_of_their_own() -> None:
    found = log_likelihood(
        KnownWeights(0.8, dim=2), torch.zeros(30, 1), num_samples=4000, target_se=0.06, chunk_size=5000
    )
    assert found.draws is not None
    assert len(found.draws.unique()) > 1
    assert len(found.log_likelihood.unique()) == 30
    again = log_likelihood(
        KnownWeights(0.8, dim=2), torch.zeros(30, 1), num_samples=4000, target_se=0.06, chunk_size=5000
    )
    assert torch.equal(found.log_likelihood, again.log_likelihood)


def test_fewer_draws_than_a_pilot_need_none() -> None:
    x = torch.zeros(5, 1)
    found = log_likelihood(KnownWeights(1.5), x, num_samples=PILOT, target_se=1e-9)
    assert found.draws is not None
    assert found.draws.tolist() == [PILOT] * 5
    assert torch.equal(found.log_likelihood, log_likelihood(KnownWeights(1.5), x, num_samples=PILOT).log_likelihood)


def test_the_number_is_chosen_from_the_error_and_the_tail() -> None:
    def pilot(mc_se: float, khat: float) -> Estimate:
        nothing = torch.zeros(1, dtype=torch.float64)
        return Estimate(nothing, nothing, nothing + mc_se, nothing, nothing + khat, nothing, nothing)

    number = lambda mc_se, khat=0.0: int(chosen(pilot(mc_se, khat), 250, 5000, 0.1))  # noqa: E731
    assert number(0.0) == number(0.09) == 250
    assert number(0.1) == 500  # the margin
    assert number(0.2) == 2000
    assert number(0.2, -5.0) == number(0.2, math.nan) == number(0.2, -math.inf) == 2000
    assert number(0.17, 0.0) == 1000
    assert number(0.17, 0.5) == 2000
    assert number(9.0) == number(math.inf, math.inf) == number(math.nan) == 5000
    log_weight = torch.full((250, 1), -math.inf)
    assert int(chosen(estimate(log_weight), 250, 700, 0.1)) == 700


def test_a_target_out_of_reach_is_told() -> None:
    with pytest.warns(
        UserWarning, match=r"6 of 6 images have a standard error above the target of 0.001 nats after all 600"
    ):
        found = pv.log_likelihood(KnownWeights(0.9), torch.zeros(6, 1), num_samples=600, target_se=0.001)
    assert found.target_met == 0.0
    assert "for 0.0% of the images" in str(found)
    near = pv.log_likelihood(KnownWeights(1.2), torch.zeros(6, 1), num_samples=6000, target_se=0.05)
    assert near.warnings == []
    assert near.target_met == 1.0


def test_every_image_is_held_to_its_own_number_of_draws() -> None:
    """Images of 250 draws have a threshold of 0.58, those of 10,000 one of 0.7, and an ESS of as many draws as they got."""
    program = LinearGaussian(6, 3, noise=1.0, narrow=0.8)
    x = pv.sample(program, 60, seed=1) * torch.linspace(0.2, 2, 60, dtype=torch.float64)[:, None]
    found = log_likelihood(program, x, num_samples=50_000, target_se=0.1)
    assert found.draws is not None
    assert found.draws.min() < found.draws.max()
    assert found.khat_thresholds.tolist() == [good_khat(n) for n in found.draws.tolist()]
    assert found.khat_threshold == float(found.khat_thresholds.min())
    assert bool((found.ess_share <= 1).all())
    figures = found.summary() | {
        "bits_per_dim": None, "active_units": [3], "split": "test", "method": "iw", "binarization": "none",
        "dequantization": "none", "seconds": 1.0,
    }  # fmt: skip
    share = f"{float(found.ess_share.median()):.0%} of an image's draws"
    ends = f"({int(found.draws.min())} to {int(found.draws.max())} by image)"
    low, high = (f"{end(found.khat_thresholds):.2f}" for end in (torch.min, torch.max))
    assert low < high
    for text in (str(found), _table(figures)):
        assert share in text
        assert ends in text
        assert "of 50000" not in text
    assert f"above {low} to {high} by an image's draws" in _table(figures)
    assert ends in headline(figures)[1]
    if found.khat_bad_fraction > 0.01:
        assert f"{low} to {high}" in found.warnings[0]
    left, right = weight_diagnostics(found).axes
    assert f"{low} to {high}" in left.get_legend().get_texts()[0].get_text()
    assert "share of an image's draws" in right.get_xlabel()
    fixed = log_likelihood(program, x, num_samples=300)
    assert f"ESS median {float(fixed.ess.median()):.0f} of 300" in str(fixed)


@pytest.mark.parametrize("limit", [70, 400])
def test_memory_that_runs_out_halves_the_chunk(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    from pyro_vae.evaluation import draws

    weigh, passes = draws.weigh, []

    def short(program: Any, x: Tensor, y: Tensor | None, num_samples: int, precision: str) -> Any:
        passes.append(len(x) * num_samples)
        if passes[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return weigh(program, x, y, num_samples, precision)

    program, x = LinearGaussian(6, 3, noise=1.0, narrow=0.8), torch.zeros(9, 6, dtype=torch.float64)
    monkeypatch.setattr(draws, "weigh", short)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = pv.log_likelihood(program, x, num_samples=2000, target_se=0.05, chunk_size=1000)
    assert sum(issubclass(w.category, SmallerChunkWarning) for w in caught) == 1
    assert found.chunk_size <= limit
    error = found.log_likelihood - found.bias - program.exact(x)
    assert abs(float(error.mean())) < 4 * found.nll_mc_se + 0.01
    # once it fits, no pass is larger than the chunk: few images take more draws, and no more memory
    assert max(passes[passes.index(min(passes, key=lambda n: n > limit)) :][-20:]) <= limit


def test_a_target_below_nothing_is_refused() -> None:
    with pytest.raises(pv.UserError, match=r"target_se, --target-error.* above 0"):
        pv.log_likelihood(pv.build("ppca", "linear", (3,), latent_dim=2), torch.zeros(2, 3), target_se=0.0)
