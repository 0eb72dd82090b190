"""From log-weights to a log-likelihood, its error and its diagnostics.

    log p(x) = log E_q[w],   w = p(x, z) / q(z | x),   estimated by L = log (1/K) sum_k w_k      (IWAE bound)

L lies below log p(x) by Var(w) / (2 K E[w]^2) to first order. With normalised weights v_k = w_k / sum w, leaving draw k out
changes L to L + log((1 - v_k) K / (K - 1)): the jackknife then gives both the bias and the standard error of
the bias-corrected estimate (Efron & Stein 1981, https://doi.org/10.1214/aos/1176345462; for this bound, Nowozin 2018,
https://openreview.net/forum?id=HyZoi-WRb).

Both are of first order in 1/K. Of few draws the standard error is too small, and the normal interval made of it, +- 1.96 errors,
holds log p(x) in 67 % of cases at K = 2, 82 % at 5, 87 % at 10 and 94 % at 1,000 (weights of a guide that is right but for
its width). For the interval that is stated, see :mod:`pyro_vae.evaluation.interval`.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from arviz_stats.base import array_stats
from torch import Tensor

from pyro_vae.evaluation.interval import FEWEST, interval
from pyro_vae.precision import wide

GROUPS = 16  # as many as the randomisations of Sobol noise, whose draws depend on each other


@dataclass(frozen=True)
class Estimate:
    """One block's estimates, each ``(batch,)`` and ``interval`` ``(batch, 2)``, in float64 on the CPU, in nats.

    ``log_likelihood`` is L; ``bias`` the jackknife estimate of E[L] - log p(x), at most about 0; ``mc_se`` the jackknife
    standard error of ``log_likelihood - bias``; ``ess`` the effective sample size (sum w)^2 / sum w^2; ``khat`` the Pareto
    shape of the largest weights; ``interval`` the ends of the 95 % interval of log p(x), NaN for fewer than 25 draws;
    ``groups`` ``(batch, 16)`` the log of the sum of the weights of each sixteenth of the draws, for the error of differences.
    """

    log_likelihood: Tensor
    bias: Tensor
    mc_se: Tensor
    ess: Tensor
    khat: Tensor
    interval: Tensor
    groups: Tensor


def estimate(log_weight: Tensor, size: Tensor | None = None, length: int = 1, stratified: bool = False) -> Estimate:
    """Reduce log-weights ``(num_samples, batch)`` once, in float64.

    ``size`` ``(batch,)`` is the largest sum of the absolute terms that make a log-weight: weights that differ by less than
    its rounding are equal. Without it, the largest log-weight stands for it. Of ``length`` draws in a row, which
    may depend on each other, the jackknife leaves out all or none. Where these are ``stratified``, one of each component of a
    mixture, the effective sample size is that of as many independent draws as have the same error: K E[w]^2 / (E[w^2] - V), V the
    variance of the components' mean weights, which no stratified mean has.

    Weights that are equal to rounding have zero error, full effective sample size and k = -inf. A single unit has no
    error estimate: ``mc_se``, ``bias``, ``khat`` and ``interval`` are NaN. Where one unit holds all the weight, ``mc_se`` and the
    upper end of the interval are infinite.
    """
    khat = pareto_khat(log_weight, size).to(log_weight.device)
    log_weight = wide(log_weight.detach())
    num_samples = log_weight.shape[0]
    total = torch.logsumexp(log_weight, 0)
    log_likelihood = total - math.log(num_samples)
    weight = (log_weight - total).exp()
    ess = 1.0 / weight.square().sum(0)
    units = -(-num_samples // length)
    groups = torch.stack([log_weight[i].logsumexp(0) for i in groups_of(num_samples)], -1)
    skewness = _skewness(weight)
    if units == 1:
        nan = torch.full_like(total, math.nan)
        bias, mc_se, ends = nan, nan, torch.stack([nan, nan], -1)
    else:
        # log-mean-exp without unit k, minus the one with it; a unit that holds all the weight has no jackknife
        sizes = weight.new_full((units, 1), length)
        sizes[-1] = num_samples - (units - 1) * length
        if length > 1:
            unit = torch.arange(num_samples, device=weight.device) // length
            weight = weight.new_zeros(units, weight.shape[1]).index_add_(0, unit, weight)
        if stratified:  # the spread between components is no part of the error, and of its skewness neither
            skewness = _skewness(weight) * math.sqrt(num_samples / units)
        shift = torch.log1p(-weight.clamp(max=1.0)) + torch.log(num_samples / (num_samples - sizes))
        bias = (units - 1) * shift.mean(0)
        mc_se = ((units - 1) * shift.var(0, correction=0)).sqrt()
        relative_se = ((weight - sizes / num_samples).square().sum(0) * units / (units - 1)).sqrt()
        ends = interval(log_likelihood, relative_se, skewness, khat, ess, num_samples, units)
        # the corrected estimate, of higher order where few weights count, is held to be possible
        ends[:, 1] = torch.maximum(ends[:, 1], log_likelihood - bias)
        lost = ~torch.isfinite(shift).all(0)
        bias[lost], mc_se[lost], khat[lost], ends[lost, 1] = -math.inf, math.inf, math.inf, math.inf
        ends[torch.isneginf(log_likelihood), 0] = -math.inf
        if stratified:
            ess = 1 / (relative_se.square() + 1 / num_samples)
        equal = torch.isneginf(khat)
        bias[equal], mc_se[equal] = 0.0, 0.0
        ends[equal] = log_likelihood[equal, None] if num_samples >= FEWEST else math.nan
        ess = torch.where(equal, torch.full_like(ess, num_samples), ess)
    return Estimate(*(t.cpu() for t in (log_likelihood, bias, mc_se, ess, khat, ends, groups)))


def groups_of(num_samples: int) -> list[slice]:
    """The sixteenths of so many draws; of fewer than 16, single ones."""
    number = min(GROUPS, num_samples)
    ends = [i * num_samples // number for i in range(number + 1)]
    return [slice(*two) for two in pairwise(ends)]


def _skewness(weight: Tensor) -> Tensor:
    """Of weights ``(num_samples, batch)``; 0 where they are equal."""
    off = weight - weight.mean(0)
    variance = off.square().mean(0)
    return torch.where(
        variance > 0, off.pow(3).mean(0) / variance.clamp(min=1e-300).pow(1.5), torch.zeros_like(variance)
    )


MIN_DRAWS = FEWEST  # fewer draws have a tail of under five weights, to which no Pareto distribution is fitted


def pareto_khat(log_weight: Tensor, size: Tensor | None = None) -> Tensor:
    """Pareto k ``(batch,)`` of log-weights ``(num_samples, batch)``, by ArviZ, in float64 on the CPU.

    -inf where all weights are equal, +inf where one is infinite or NaN, NaN for fewer than 25 draws.
    Vehtari et al. 2024, Pareto smoothed importance sampling, https://arxiv.org/abs/1507.02646.
    """
    values = log_weight.detach().cpu().double().numpy().T
    terms = np.abs(values).max(axis=1, initial=1.0, where=np.isfinite(values))
    if size is not None:
        terms = np.maximum(terms, size.detach().cpu().double().numpy())
    with np.errstate(invalid="ignore"):  # infinite weights have no spread
        spread = values.max(axis=1) - values.min(axis=1)
    # Equal weights differ by the rounding of their terms, which may be far larger than log p(x): no tail to fit.
    equal = (values.shape[1] > 1) & (spread <= 64 * torch.finfo(log_weight.dtype).eps * terms)
    broken = np.isnan(values).any(axis=1) | np.isposinf(values).any(axis=1)
    khat = np.where(equal, -np.inf, np.where(broken, np.inf, np.nan))
    for row in np.flatnonzero(~equal & ~broken) if values.shape[1] >= MIN_DRAWS else []:
        with (
            contextlib.suppress(ValueError),
            np.errstate(all="ignore"),
        ):  # ValueError: the largest weights are all equal
            # ArviZ takes minus the log-weights; weights of zero (a draw outside the support) are far below any tail.
            k = array_stats.psislw(-np.maximum(values[row], values[row].max() - 700.0), r_eff=1.0)[1]
            khat[row] = np.inf if np.isnan(k) else k  # NaN: one weight dwarfs all others
    return torch.from_numpy(khat)


def good_khat(num_samples: int) -> float:
    """The k below which an estimate of ``num_samples`` draws can be relied on: min(1 - 1 / log10 S, 0.7).

    Vehtari et al. 2024, https://arxiv.org/abs/1507.02646, section 3.2.4.
    """
    return min(1 - 1 / math.log10(max(num_samples, 11)), 0.7)
