"""Simulation-based calibration: what it must find, and what it must let pass."""

from __future__ import annotations

import arviz_plots
import by_hand
import conjugate
import pytest
import scipy.stats
import torch
from matplotlib import pyplot

import pyro_vae as pv
from pyro_vae.analysis.calibration import band, sbc
from pyro_vae.seeding import seeded

LEVEL = 0.01  # the chance that an exact guide is rejected


def test_an_exact_guide_passes_and_one_with_a_wrong_scale_is_found(record_property: object) -> None:
    exact = sbc(conjugate.LinearGaussian(), 500, seed=0)
    record_property("exact", str(exact))
    assert exact.passes(LEVEL)
    for scale in (0.7, 1.4):
        wrong = sbc(conjugate.LinearGaussian(scale=scale), 500, seed=0)
        record_property(f"scale {scale}", str(wrong))
        assert not wrong.passes(LEVEL)
        assert float(wrong.chi2_p_value.max()) < 1e-4


@pytest.mark.slow
def test_the_level_is_what_is_stated() -> None:
    # 60 exact guides, each family-wise p-value times ten: fewer than 10 % below 0.1, but for a chance of 1e-3
    p = [sbc(conjugate.LinearGaussian(), 100, seed=seed).family_p_value for seed in range(60)]
    assert sum(value <= 0.1 for value in p) <= scipy.stats.binom.ppf(1 - 1e-3, 60, 0.1)
    assert sum(value <= LEVEL for value in p) <= scipy.stats.binom.ppf(1 - 1e-3, 60, LEVEL)


def test_a_guide_that_ignores_the_data_is_found_by_the_likelihood() -> None:
    prior = by_hand.KnownWeights()
    assert sbc(_PriorGuide(), 300, event_shape=(5,)).p_value.sel(quantity=["z[0]", "z[1]", "z[2]"]).min() > 1e-3
    assert not sbc(_PriorGuide(), 300, event_shape=(5,)).passes(LEVEL)
    assert sbc(prior, 300, event_shape=(4,)).passes(LEVEL)  # here the posterior is the prior


class _PriorGuide(conjugate.LinearGaussian):
    def exact(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.new_zeros(len(x), 3), torch.eye(3, dtype=x.dtype)


def test_discrete_latents_and_conditional_programs_are_ranked() -> None:
    with seeded(0):
        discrete, conditional = by_hand.DiscreteLatent(), by_hand.Conditional()
    found = sbc(discrete, 20, 9, event_shape=(6,))
    assert found.ranks.values.min() >= 0
    assert found.ranks.values.max() <= 9
    y = torch.arange(20) % 3
    assert sbc(conditional, 20, 9, y, event_shape=(6,)).ranks.shape == (20, 3)
    with pytest.raises(pv.UserError, match="at least 10 simulations"):
        sbc(by_hand.KnownWeights(), 5, event_shape=(6,))


def test_pictures() -> None:
    found = sbc(conjugate.LinearGaussian(scale=0.5), 200)
    assert len(found.plot_ecdf().axes) == len(found.plot_ranks().axes) == 4
    pit = found.tree["prior_sbc"]
    assert float(pit["z[0]"].min()) > 0
    assert float(pit["z[0]"].max()) < 1
    assert arviz_plots.plot_ecdf_pit(found.tree, backend="matplotlib") is not None
    pyplot.close("all")
    # the band is left somewhere where the test rejects, and nowhere where it does not
    for calibration in (found, sbc(conjugate.LinearGaussian(), 200)):
        low, high = band(len(calibration.ranks), calibration.num_draws, LEVEL)
        line = calibration.counts()[:, 0] / len(calibration.ranks)
        outside = bool(((line < low - 1e-9) | (line > high + 1e-9)).any())
        assert outside == (float(calibration.p_value[0]) <= LEVEL)
