"""Whether the density that a distribution states integrates to 1, and is that of its draws.

    E_q[g / (g + q)] = E_g[q / (g + q)]      for every normalised g: both are the integral of g q / (g + q)

With terms in [0, 1] on both sides, whatever the tails and the number of dimensions; the one-sided E_q[g / q] = 1 would condemn
right densities in many. g is a normal in the coordinates of the real line (a rounded one for counts), with moments found from
other draws. P-values are exact bounds (Maurer & Pontil 2009, Empirical Bernstein bounds, https://arxiv.org/abs/0907.3740). Where
q lies so far from g that g / (g + q) is small, there is no power, and that is said.

Unmodified classes of torch, Pyro and this library are held in the tests, once; asked are those that were written by hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Distribution, Transform, biject_to

from pyro_vae.errors import said
from pyro_vae.programs.folding import ByRow
from pyro_vae.programs.masks import unmasked, unvalidated

PILOT, DRAWS, AGAIN = 256, 192, 10_000  # draws: for g's moments, of each row, and of rows that look wrong
SUSPECT = 0.01  # chance that any row of a right density is asked again
MOST_ELEMENTS = 32  # of a site with elements of their own, drawn evenly from all
MOST_DIMENSIONS = 256  # of a joint density
REPEATED = 0.02  # share of draws that are equal to others
NO_POWER = 0.01  # the median of g / (g + q)
CLOSED = 1e-3  # nats by which a sum over all values may miss 0
OURS = ("torch", "pyro", "pyro_vae")
METHODS = ("log_prob", "sample", "rsample")


@dataclass(frozen=True)
class Normalisation:
    """What was found of one site: ``p_value`` of all tests of it together, or why there is none.

    ``row`` is the worst row, ``overlap`` the median of g / (g + q).
    """

    p_value: float
    row: int
    overlap: float
    unasked: str = ""


def by_hand(fn: Any, seen: frozenset[int] = frozenset()) -> str | None:
    """The name of the first class in a distribution that is not an unmodified one of torch, Pyro or this library."""
    if type(fn).__module__.split(".")[0] not in OURS or any(name in vars(fn) for name in METHODS):
        return type(fn).__name__
    seen = seen | {id(fn)}  # a transform refers to its inverse, which refers to it
    for part in vars(fn).values():
        for each in part if isinstance(part, (list, tuple)) else [part]:
            known = id(each) in seen or not isinstance(each, (Distribution, Transform))
            if not known and (found := by_hand(each, seen)) is not None:
                return found
    return None


@torch.no_grad()
def normalisation(fn: Any, rows: int, kept: Tensor | None = None) -> Normalisation:
    """Ask one site's distribution; with torch's generators.

    Args:
        fn: of batch shape ``(..., rows)``.
        rows: of data.
        kept: which of its elements count, ``(*batch, *event)``; None for all.
    """
    fn = unvalidated(unmasked(fn.base_dist if isinstance(fn, ByRow) else fn))
    while type(fn).__name__ == "Independent" and type(fn).__module__.split(".")[0] in OURS:
        fn = fn.base_dist
    if fn.event_shape.numel() > MOST_DIMENSIONS:
        return Normalisation(1.0, 0, math.nan, f"a joint density of {fn.event_shape.numel()} elements")
    try:
        if getattr(fn, "has_enumerate_support", False) and not fn.has_rsample:
            return _summed(fn, rows)
        return _compared(fn, rows, kept)
    except (NotImplementedError, RuntimeError, ValueError, IndexError, TypeError) as error:
        return Normalisation(1.0, 0, math.nan, f"{type(fn).__name__} cannot be asked: {said(error, 60)}")


def _summed(fn: Any, rows: int) -> Normalisation:
    values = fn.enumerate_support(expand=False)
    off = fn.log_prob(values.expand((len(values), *fn.batch_shape, *fn.event_shape))).double().logsumexp(0).abs()
    worst = int(off.flatten().argmax())
    return Normalisation(float(not bool(off.max() > CLOSED)), worst % rows, 0.5)


def _compared(fn: Any, rows: int, kept: Tensor | None) -> Normalisation:
    if not fn.support.is_discrete and _has_atoms(fn.sample((PILOT,))):
        return Normalisation(1.0, 0, math.nan, "it draws some values again and again: no density of the real line")
    first = _Pair(fn)
    difference, overlap = first.terms(DRAWS)
    counted = torch.ones(fn.batch_shape, dtype=torch.bool)
    if kept is not None:
        shape = fn.batch_shape + fn.event_shape
        counted = kept.cpu().expand(shape).reshape(*fn.batch_shape, -1).any(-1)
    some = counted.flatten().nonzero()[:, 0]
    if len(some) == 0:
        return Normalisation(1.0, 0, math.nan)
    difference = difference.flatten(1)[:, some]
    error = difference.std(0) / math.sqrt(DRAWS)
    z = difference.mean(0) / error.clamp(min=1e-9)
    suspects = (z.abs() > stats.norm.isf(SUSPECT / 2 / len(some))).nonzero()[:, 0]
    p_values = [_bernstein(difference.flatten())]
    worst = int(z.abs().argmax())
    if len(suspects):
        suspects = suspects[z[suspects].abs().argsort(descending=True)][:MOST_ELEMENTS]
        fresh = torch.cat(
            [_Pair(fn, g=first).terms(DRAWS)[0].flatten(1)[:, some[suspects]] for _ in range(AGAIN // DRAWS)]
        )
        again = [_bernstein(column) for column in fresh.unbind(1)]
        p_values.append(min(1.0, min(again) * len(again)))
        worst = int(suspects[again.index(min(again))])
    return Normalisation(
        min(1.0, 2 * min(p_values)), int(some[worst]) // _per_row(fn, rows), float(overlap.flatten(1)[:, some].median())
    )


def _has_atoms(drawn: Tensor) -> bool:
    """Whether an element takes values more than once: a hurdle, a censored number, levels on a grid."""
    ordered = drawn.flatten(1).sort(0).values
    repeated = (ordered[1:] == ordered[:-1]).sum(0)
    return bool((repeated > REPEATED * len(drawn)).any())


def _per_row(fn: Any, rows: int) -> int:
    """Elements of one row, where rows stand first."""
    return max(1, fn.batch_shape.numel() // max(1, rows))


def _bernstein(difference: Tensor) -> float:
    """The p-value of a mean of independent terms in [-1, 1], where that mean is 0."""
    n = len(difference)
    mean, variance = abs(float(difference.mean())), float(difference.var())
    # |mean| <= sqrt(2 variance L / n) + 14 L / (3 (n - 1)) but for a chance of 2 exp(-L) on each side
    a, b = 14 / (3 * (n - 1)), math.sqrt(2 * variance / n)
    root = (-b + math.sqrt(b * b + 4 * a * mean)) / (2 * a)
    return min(1.0, 4 * math.exp(-root * root))


class _Pair:
    """A distribution and the normal beside it."""

    def __init__(self, fn: Any, g: _Pair | None = None) -> None:
        self.fn, self.discrete = fn, bool(fn.support.is_discrete)
        self.to_support = None if self.discrete else biject_to(fn.support)
        self.normal: Any
        if g is not None:
            self.normal = g.normal
            return
        free = self.free(fn.sample((PILOT,)))
        sd = free.std(0)
        floor = 0.5 if self.discrete else 1e-6 * (1 + free.abs().amax(0))
        self.normal = dist.Normal(free.mean(0), torch.maximum(sd, torch.as_tensor(floor).to(sd)), validate_args=False)

    def free(self, value: Tensor) -> Tensor:
        return value.double() if self.to_support is None else self.to_support.inv(value).double()

    def log_g(self, value: Tensor, free: Tensor | None = None) -> Tensor:
        if self.to_support is None:
            up, down = (self.normal.cdf(value.double() + half) for half in (0.5, -0.5))
            return (up - down).clamp(min=1e-300).log()
        free = self.to_support.inv(value) if free is None else free
        found = self.normal.log_prob(free.double())
        own = found.dim() - len(self.fn.batch_shape) - 1  # axes of the event, in free coordinates
        found = found.flatten(found.dim() - own).sum(-1) if own > 0 else found
        jacobian = self.to_support.log_abs_det_jacobian(free, value).double()
        while jacobian.dim() > found.dim():
            jacobian = jacobian.sum(-1)
        return found - jacobian

    def log_q(self, value: Tensor) -> Tensor:
        found = self.fn.log_prob(value).double()
        try:
            return torch.where(self.fn.support.check(value), found, -math.inf)
        except (NotImplementedError, RuntimeError, ValueError):
            return found

    def terms(self, draws: int) -> tuple[Tensor, Tensor]:
        """Differences of the two sides and g / (g + q) at draws of q, ``(draws, *batch)`` each."""
        ours = self.fn.sample((draws,))
        one = torch.sigmoid(self.log_g(ours) - self.log_q(ours))
        theirs = self.normal.sample((draws,))
        if self.to_support is None:
            value = theirs.round().to(ours.dtype)
            other = torch.sigmoid(self.log_q(value) - self.log_g(value))
        else:
            value = self.to_support(theirs.to(ours.dtype))
            other = torch.sigmoid(self.log_q(value) - self.log_g(value, theirs.to(ours.dtype)))
        return (one - other).nan_to_num(1.0), one
