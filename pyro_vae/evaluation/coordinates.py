"""The density of each coordinate of a vector on its own, where the distribution has it in closed form."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from torch import Tensor

from pyro_vae.priors.gaussian_mixture import DiagonalMixture

WRAPPERS = ("Independent", "ExpandedDistribution", "MaskedDistribution")


def coordinate_log_prob(fn: Any, value: Tensor) -> Tensor | None:
    """Log-density of every coordinate's marginal, ``(*leading, *event)``; None where it has no closed form.

    Known for products over coordinates, normals with any covariance, and mixtures of diagonal normals.

    Args:
        fn: a distribution.
        value: ``(*leading, *event)``, in its support.

    Example:
        >>> import torch
        >>> fn = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[4.0, 1.0], [1.0, 1.0]]))
        >>> coordinate_log_prob(fn, torch.zeros(5, 2)).shape
        torch.Size([5, 2])
    """
    while type(fn).__name__ in WRAPPERS:
        fn = fn.base_dist
    if not fn.event_shape:
        log_prob: Tensor = fn.log_prob(value)
        return log_prob
    if isinstance(fn, dist.MultivariateNormal | dist.LowRankMultivariateNormal):
        return dist.Normal(fn.mean, fn.variance.sqrt(), validate_args=False).log_prob(value)
    if isinstance(fn, DiagonalMixture):
        parts = dist.Normal(fn.loc, fn.scale, validate_args=False).log_prob(value.unsqueeze(-2))
        return (parts + fn.logits.log_softmax(0).unsqueeze(-1)).logsumexp(-2)
    return None
