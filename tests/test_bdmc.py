"""Bidirectional Monte Carlo on probabilistic PCA, whose log p(x) is known."""

from __future__ import annotations

import math

import pytest
import torch
from test_ais import LIMIT, LinearGaussian

import pyro_vae as pv
from pyro_vae.errors import UserError
from pyro_vae.evaluation.bdmc import bidirectional


def test_the_bounds_hold_the_exact_value_between_them() -> None:
    """They cross it as often as their errors say: false-alarm rates of 0.05 % (means) and 0.3 % (images)."""
    program = LinearGaussian(6, 3)
    bounds = bidirectional(program, 60, num_distributions=150, seed=1)
    exact = program.exact(bounds.x)
    below, above = exact - bounds.lower, bounds.upper - exact
    for slack in (below, above):
        assert float(slack.mean()) > -LIMIT * float(slack.std()) / math.sqrt(60)
    # one-sided at 1.75 = t_15(0.95): a twentieth of 60 images, and up to 9 by chance
    assert int((below < -1.753 * bounds.lower_se).sum()) <= 9
    assert int((above < -1.753 * bounds.upper_se).sum()) <= 9
    assert bounds.mean_gap < 0.5
    assert float(bounds.acceptance.mean()) == pytest.approx(float(bounds.reverse_acceptance.mean()), abs=0.05)


def test_the_gap_closes_with_more_distributions() -> None:
    program = LinearGaussian(6, 3)
    gaps = [bidirectional(program, 40, num_distributions=n, seed=1) for n in (20, 320)]
    assert gaps[0].mean_gap > gaps[1].mean_gap > -LIMIT * gaps[1].gap_se
    assert gaps[0].mean_gap - gaps[1].mean_gap > LIMIT * math.hypot(gaps[0].gap_se, gaps[1].gap_se)


def test_from_the_guide_to_the_posterior_is_a_shorter_way() -> None:
    program = LinearGaussian(6, 3)
    bounds = bidirectional(program, 30, num_distributions=50, start="guide", seed=1)
    assert abs(bounds.mean_gap) < 0.1 + LIMIT * bounds.gap_se
    assert bounds.summary()["bdmc_num_images"] == 30
    assert "gap" in str(bounds)


def test_repeats_by_seed() -> None:
    vae = pv.build("ppca", "linear", (4,), latent_dim=2)
    one, two = (bidirectional(vae, 4, num_distributions=10, seed=3) for _ in range(2))
    assert torch.equal(one.lower, two.lower)
    assert torch.equal(one.x, two.x)
    with pytest.raises(UserError, match="num_images"):
        bidirectional(vae, 0)
