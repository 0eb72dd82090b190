"""Stratified draws of mixtures of guides: what is stated of them holds; exploding steps, plain and compiled."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal

from pyro_vae.evaluation.estimators import estimate
from pyro_vae.seeding import generator


@pytest.mark.parametrize(("num", "components", "scale", "runs"), [(50, 2, 1.05, 20_000), (100, 4, 1.2, 10_000)])
def test_intervals_of_stratified_draws_cover(num: int, components: int, scale: float, runs: int) -> None:
    """log p(x) = 0 under a mixture whose first component alone is right, by at least 93.7 % of intervals that say 95.

    Most of the weights' skewness is then between components, where the mean of stratified draws has none: taken for its own,
    intervals covered 91 %. The share has an error of 0.2 to 0.3 %, and neither tail more than 4.5 %.
    """
    source = generator("strata", 1)
    where = torch.tensor([0.0, *(7.0 + i for i in range(1, components))], dtype=torch.float64)
    scales = torch.tensor([scale, *[1.0] * (components - 1)], dtype=torch.float64)
    rounds = num // components
    order = torch.rand(rounds, runs, components, generator=source).argsort(-1).permute(0, 2, 1).reshape(num, runs)
    z = where[order] + scales[order] * torch.randn(num, runs, generator=source, dtype=torch.float64)
    density = torch.stack([Normal(m, s).log_prob(z) for m, s in zip(where, scales, strict=True)])
    log_weight = Normal(0.0, 1.0).log_prob(z) - density.logsumexp(0) + math.log(components)
    ends = estimate(log_weight, None, components, True).interval
    above, below = (float(off.double().mean()) for off in (ends[:, 0] > 0, ends[:, 1] < 0))
    assert above + below < 0.063
    assert max(above, below) < 0.045
