"""Cells of the rules that theory gives (consistency.py): how often a sound result is called forbidden, and what is found.

A claim stands at the very edge of what theory allows (equality), or beyond it by 3, 6 and 9 standard errors of its mean.
"""

from __future__ import annotations

import math
from functools import partial

import scipy.stats
import torch
from instruments_checks import FALSE_ALARM, Cell, Check, shown, within
from instruments_weights import seed_of
from torch import Tensor

from pyro_vae.evaluation.consistency import FAMILY_LEVEL, Claim, claim, forbidden, of_bounds, of_kl

ERRORS = (3, 6, 9)
SHAPES = ("normal", "chi-square", "chi-square, tail below", "lognormal", "lognormal, tail below")
SIZES = (50, 200, 1000)
TRIALS, FOUND = 50_000, 2_000


def noise(shape: str, *size: int) -> Tensor:
    """Numbers of mean 0 and variance 1."""
    drawn = torch.randn(*size, dtype=torch.float64)
    if shape.startswith("chi-square"):
        drawn = (drawn.square() - 1) / math.sqrt(2)
    elif shape.startswith("lognormal"):
        drawn = (drawn.exp() - math.exp(0.5)) / math.sqrt((math.e - 1) * math.e)
    return -drawn if "below" in shape else drawn


def of_means(shape: str, num: int, errors: float) -> list[Claim]:
    """One claim of paired figures, that are too high by so many errors of their mean."""
    return [
        claim("low", "high", noise(shape, num) + errors / math.sqrt(num), torch.zeros(num, dtype=torch.float64), "")
    ]


def of_chains(spread: float, num: int, errors: float) -> list[Claim]:
    """The claim of bounds from both sides, E[e^lower] = E[e^-upper] = 1, that cross by so many errors of their mean gap."""
    lower, upper = (spread * torch.randn(num, dtype=torch.float64) - spread**2 / 2 for _ in range(2))
    crossed = spread**2 * min(errors, 1) + errors * spread * math.sqrt(2 / num)  # the mean gap, and the errors
    return of_bounds(lower, -upper - crossed)


def of_divergence(spread: float, num: int, errors: float) -> list[Claim]:
    """The claims of KL divergences by 100 draws each, where log q - log p has such a spread, off by errors of their mean."""
    draws = torch.full((num,), 100)
    kl = spread**2 / 2 * (errors == 0) + spread * torch.randn(num, dtype=torch.float64) / 10
    return of_kl(kl - errors * spread / math.sqrt(100 * num), draws, torch.zeros(num))


def rules(make: partial[list[Claim]], name: str, size: float) -> list[Check]:
    """Alarms where theory just holds, against the stated level; the share that is found where it does not."""
    with torch.random.fork_rng():
        torch.manual_seed(seed_of("claims", name))
        trials = max(2_000, round(TRIALS * size))
        alarms = sum(bool(forbidden(make(errors=0))) for _ in range(trials))
        found = {e: sum(bool(forbidden(make(errors=e))) for _ in range(FOUND)) / FOUND for e in ERRORS}
    limit = scipy.stats.binom(trials, FAMILY_LEVEL).ppf(1 - FALSE_ALARM) / trials
    return [
        within(f"false alarms of {trials:,}", alarms / trials, 0, limit),
        *(shown(f"found at {e} errors", share) for e, share in found.items()),
    ]


def cells() -> list[Cell]:
    """Every cell of these rules."""
    makes = {f"means, {shape}, N = {n}": partial(of_means, shape, n) for shape in SHAPES for n in SIZES}
    makes |= {f"bounds, spread {s}, N = {n}": partial(of_chains, s, n) for s in (0.1, 1.0) for n in (20, 200)}
    makes |= {f"KL, spread {s}, N = {n}": partial(of_divergence, s, n) for s in (0.1, 1.0) for n in (20, 200)}
    return [Cell("claims", name, partial(rules, make, name), "N = 50" in name) for name, make in makes.items()]
