"""The density of each coordinate of a site's value on its own, where its distribution has it in closed form."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.priors.gaussian_mixture import DiagonalMixture
from pyro_vae.programs.folding import ByRow
from pyro_vae.programs.masks import counted
from pyro_vae.programs.trace import innermost


def coordinate_log_prob(site: dict[str, Any], value: Tensor, *, scale: bool = False) -> Tensor | None:
    """Log-density of every coordinate's marginal, ``(*leading, *event)``, 0 where it is masked; None where it has no closed form.

    Known for products over coordinates, normals with any covariance, and mixtures of diagonal normals.

    Args:
        site: of a trace.
        value: ``(*leading, *event)``, in the support of the site's distribution.
        scale: whether to multiply by the site's scale.

    Example:
        >>> fn = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[4.0, 1.0], [1.0, 1.0]]))
        >>> coordinate_log_prob({"fn": fn, "mask": None}, torch.zeros(5, 2)).shape
        torch.Size([5, 2])
    """
    if isinstance(fn := site["fn"], ByRow):
        base, mask = fn.base_dist, counted(site)
        known = _unmasked(innermost(base), base.sample()) is not None
        score = lambda inner: _unmasked(innermost(base), inner)  # noqa: E731
        log_prob = fn.through(value, score, len(base.event_shape)) if known else None  # type: ignore[arg-type]
    else:
        log_prob, mask = _unmasked(innermost(fn), value), counted(site)
    if log_prob is not None and mask is not None:
        log_prob = log_prob.where(mask.to(log_prob.device), 0.0)
    if log_prob is None or not scale:
        return log_prob
    factor = torch.as_tensor(site["scale"], dtype=log_prob.dtype, device=log_prob.device)
    return log_prob * factor.reshape((*factor.shape, *[1] * len(site["fn"].event_shape)))


def _unmasked(fn: Any, value: Tensor) -> Tensor | None:
    if not fn.event_shape:
        log_prob: Tensor = fn.log_prob(value)
        return log_prob
    if isinstance(fn, dist.MultivariateNormal | dist.LowRankMultivariateNormal):
        return dist.Normal(fn.mean, fn.variance.sqrt(), validate_args=False).log_prob(value)
    if isinstance(fn, DiagonalMixture):
        parts = dist.Normal(fn.loc, fn.scale, validate_args=False).log_prob(value.unsqueeze(-2))
        return (parts + fn.logits.log_softmax(0).unsqueeze(-1)).logsumexp(-2)
    return None
