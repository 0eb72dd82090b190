"""Draws of the guide taken again by Pareto-smoothed importance weights.

Vehtari et al. 2024, https://arxiv.org/abs/1507.02646.
"""

from __future__ import annotations

import numpy as np
from arviz_stats.base import array_stats


def resampled(log_weight: np.ndarray, khat: np.ndarray, seed: int) -> np.ndarray:
    """Rows ``(num_samples, batch)`` drawn by Pareto-smoothed weights, systematically, in random order.

    Systematic resampling takes every draw floor(S w) or ceil(S w) times. Where the weights are equal (k = -inf) it
    takes each once.
    """
    num_samples, batch = log_weight.shape
    random = np.random.default_rng(seed)
    rows = np.empty((num_samples, batch), dtype=np.int64)
    for image in range(batch):
        weights = smoothed_weights(log_weight[:, image], khat[image])
        points = (np.arange(num_samples) + random.uniform()) / num_samples
        found = np.searchsorted(np.cumsum(weights), points, side="right").clip(max=num_samples - 1)
        rows[:, image] = random.permutation(found)
    return rows


def smoothed_weights(log_weight: np.ndarray, khat: float) -> np.ndarray:
    """Pareto-smoothed weights ``(num_samples,)`` that add up to 1."""
    shifted = np.maximum(log_weight.astype(np.float64) - log_weight.max(), -700.0)
    if np.isfinite(khat):
        with np.errstate(all="ignore"):
            shifted = array_stats.psislw(-shifted, r_eff=1.0)[0]  # ArviZ takes minus the log-weights
    weights = np.exp(shifted - shifted.max())
    total: np.ndarray = weights / weights.sum()
    return total
