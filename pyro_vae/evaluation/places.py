"""Where an exact draw of the posterior may stand among draws of the guide: a test of the weights themselves.

    z_0 ~ p(z | x),  z_1..z_K ~ q(z | x)   =>   P(the exact draw is z_j | x, {z_0, ..., z_K}) = W_j = w_j / sum_k w_k

whatever q is. So for every f of z, x and the unordered set, f(z_0) - sum_j W_j f(z_j) has mean zero, and a law that the weights
say. P-values are exact bounds: of S, the sum over rows, P(S >= s) <= min_t exp(-t s) prod E_W exp(t (f - E_W f)) (Chernoff 1952,
https://doi.org/10.1214/aoms/1177729330); a normal would condemn right weights where few of them count.

The check sees the shape of densities in z; no factor of x alone, and none that model and guide share.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_vae.precision import wide
from pyro_vae.seeding import generator

MOST_COORDINATES = 32  # of a latent that are looked at one by one; of longer ones as many random projections
TILT = 7.2  # standard deviations of S: the tilt of a density by exp(a f) that is found in 99 % of cases moves S so far
AT_ONCE = 8  # functions
STEPS = 6  # of Newton's method; any t gives a bound


def features(log_weight: Tensor, densities: dict[str, Tensor], latents: dict[str, Tensor]) -> tuple[list[str], Tensor]:
    """The functions f of every draw in the set of its row, ``(K + 1, rows, functions)`` in [-1, 1], and their names.

    Each is standardized over the set, so that it knows no position in it, and bounded by tanh.

    Args:
        log_weight: ``(K + 1, rows)``, the exact draw first.
        densities: log-densities by name, ``(K + 1, rows)``.
        latents: values by site ``(K + 1, rows, elements)``; elements that are masked are all 0.
    """
    names = ["log w", *densities]
    parts = [torch.stack([log_weight, *densities.values()], -1)]
    for name, value in latents.items():
        if value.shape[-1] > MOST_COORDINATES:
            fixed = torch.randn(
                value.shape[-1],
                MOST_COORDINATES,
                generator=generator("proof: projections", value.shape[-1]),
                dtype=torch.float64,
            )
            value = value @ fixed.to(value)
        squares = _standardized(value).square()
        parts += [value, squares]
        names += [f"{name}{mark}" for mark in ("", "^2") for _ in range(value.shape[-1])]
    return names, torch.tanh(_standardized(torch.cat(parts, -1))).float()


def _standardized(value: Tensor) -> Tensor:
    """Over the set; a density of zero, which has no standard score, is far below."""
    finite = torch.isfinite(value)
    known = torch.where(finite, value, 0.0)
    count = finite.sum(0).clamp(min=1)
    mean = known.sum(0) / count
    sd = (torch.where(finite, known - mean, 0.0).square().sum(0) / count).sqrt()
    rounding = 64 * torch.finfo(torch.float32).eps * known.abs().amax(0)
    score = torch.where(sd > rounding, (known - mean) / sd.clamp(min=1e-300), torch.zeros_like(known))
    return torch.where(torch.isneginf(value), -4.0, score)


def usable(log_weight: Tensor) -> Tensor:
    """The rows ``(rows,)`` of which the set says where the exact draw is likely to stand: all weights are numbers."""
    return ~(log_weight.isnan() | torch.isposinf(log_weight)).any(0) & torch.isfinite(log_weight).any(0)


def p_values(log_weight: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Of each function the p-value, an exact bound, and the variance of its sum under the weights, ``(functions,)`` each.

    Args:
        log_weight: ``(K + 1, rows)``, of rows that are :func:`usable`; the exact draw first.
        values: of the functions, ``(K + 1, rows, functions)``.
    """
    if log_weight.shape[1] == 0:
        return torch.ones(values.shape[-1]), torch.zeros(values.shape[-1])
    if values.shape[-1] > AT_ONCE:  # each makes several copies of itself
        parts = [p_values(log_weight, part) for part in values.split(AT_ONCE, -1)]
        return torch.cat([p for p, _ in parts]), torch.cat([v for _, v in parts])
    values = wide(values)
    weight = wide(log_weight).softmax(0).unsqueeze(-1)
    off = values - (weight * values).sum(0)
    total = off[0].sum(0)
    variance = (weight * off.square()).sum((0, 1))
    t = total / variance.clamp(min=1e-300)
    best = torch.zeros_like(t)
    for _ in range(STEPS):
        # the logarithm of E_W exp(t off) and its two derivatives in t
        power = t * off
        largest = power.amax(0)
        tilted = weight * (power - largest).exp()
        norm = tilted.sum(0)
        log_mean = largest + norm.log()
        mean = (tilted * off).sum(0) / norm
        spread = ((tilted * off.square()).sum(0) / norm - mean.square()).sum(0)
        best = torch.minimum(best, -t * total + log_mean.sum(0))
        step = (total - mean.sum(0)) / spread.clamp(min=1e-12 * (1 + variance))
        t = t + step.clamp(-1 - t.abs(), 1 + t.abs())
        t = torch.where(t * total > 0, t, 0.5 * (t - step).abs() * total.sign())
    found = (math.log(2) + best).exp().clamp(max=1.0)
    return torch.where(variance > 0, found, torch.ones_like(found)), variance
