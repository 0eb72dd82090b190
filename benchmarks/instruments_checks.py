"""What a cell of the instruments' table finds, and the statistics that it is judged by.

A cell holds one instrument against one model whose answer is known. It makes checks: a figure each, the limits that it has to
keep, and the power: the smallest fault that would have been four standard errors large.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from pyro_vae.evaluation.estimators import good_khat
from pyro_vae.evaluation.result import LogLikelihood

Z_LIMIT = 4.0  # of |z|: a false alarm in 16,000 checks
FALSE_ALARM = 1e-4  # of a p-value
SHARE = 0.2  # of the reported error, that a bias may have after correction
COVERAGE = (0.93, 0.98)  # of a stated 95 % interval
MIN_INTERVALS = 2000
ROUNDING = 1e-5  # of float32 log-densities: no error bar is smaller
EXACT = 1e-5  # nats by which a float32 program may miss an answer that it states as exact
STATED_FROM = 100  # draws, from which on a coverage is judged


@dataclass(frozen=True)
class Check:
    """One figure and the limits that it has to keep.

    Attributes:
        name: what the figure is.
        kind: ``z`` or ``p`` of a statistic, ``share`` of the reported error, ``coverage``, or ``value``.
        value, low, high: the figure, and between what it has to lie; infinite for a figure that is only shown.
        power: the smallest fault that four standard errors would have shown, in ``unit``; None where it has none.
    """

    name: str
    kind: str
    value: float
    low: float = -math.inf
    high: float = math.inf
    power: float | None = None
    unit: str = ""

    @property
    def judged(self) -> bool:
        """Whether the figure can fail."""
        return bool(math.isfinite(self.low) or math.isfinite(self.high))

    @property
    def passes(self) -> bool:
        """Whether it lies within its limits; NaN does not."""
        return not self.judged or bool(self.low <= self.value <= self.high)

    def plain(self) -> dict[str, Any]:
        """For JSON: what is not finite is None."""
        figures = {k: v if v is None or isinstance(v, str) else float(v) for k, v in asdict(self).items()}
        figures = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
        return figures | {"passes": self.passes, "judged": self.judged}


@dataclass(frozen=True)
class Cell:
    """One instrument on one model.

    Attributes:
        group: which instrument.
        name: unique; it says the model and the settings.
        run: does the work at a size (1 for the table, less for a short form) and returns checks.
        short: whether the short form has it.
    """

    group: str
    name: str
    run: Callable[[float], list[Check]]
    short: bool = False


def z_check(name: str, deviations: Any, unit: str, *, low: float = -Z_LIMIT, high: float = Z_LIMIT) -> Check:
    """z of the mean of independent deviations ``(n,)`` whose expectation should be 0."""
    values = torch.as_tensor(deviations, dtype=torch.float64).reshape(-1)
    error = math.hypot(float(values.std()) / math.sqrt(len(values)), ROUNDING)
    return Check(name, "z", float(values.mean()) / error, low, high, Z_LIMIT * error, unit)


def p_check(name: str, value: float) -> Check:
    """A p-value that should be uniform."""
    return Check(name, "p", float(value), FALSE_ALARM, 1.0)


def within(name: str, value: float, low: float, high: float, unit: str = "", power: float | None = None) -> Check:
    """A figure between limits."""
    return Check(name, "value", float(value), low, high, power, unit)


def shown(name: str, value: float, unit: str = "") -> Check:
    """A figure that nothing is asked of."""
    return Check(name, "value", float(value), unit=unit)


def unbiased(log_ratio: Tensor, what: str = "w / p(x)") -> list[Check]:
    """Whether E[exp(log_ratio)] = 1 for every datum: ``(replicates, N)``, all independent.

    z of the mean over all, and a chi-square over data: the sum over data of the squared deviation of their mean, its own noise
    taken off, which is 0 in expectation however skewed the weights are. The law is a sum of chi-squares with as many weights as
    data, matched in its first two moments (Satterthwaite 1946, https://doi.org/10.2307/3002019).
    """
    off = log_ratio.double().exp() - 1
    replicates, data = off.shape
    variance = off.var(0) + ROUNDING**2
    error = math.sqrt(float(variance.sum()) / replicates) / data
    total = float(off.mean())
    checks = [Check(f"mean of {what}", "z", total / error, -Z_LIMIT, Z_LIMIT, Z_LIMIT * error, "of p(x)")]
    if replicates < 2:
        return checks
    own = (off.sum(0).square() - off.square().sum(0)) / (
        replicates * (replicates - 1)
    )  # unbiased for the squared deviation
    scale, freedom = variance / replicates, float(variance.sum() ** 2 / variance.square().sum())
    unit = float(scale.square().sum() / scale.sum())
    p = scipy.stats.chi2.sf((float(own.sum()) + float(scale.sum())) / unit, freedom)
    return [*checks, p_check("chi-square over data", p)]


def interval_of(result: LogLikelihood) -> tuple[Tensor, Tensor, bool]:
    """The stated 95 % interval's ends ``(N,)``, and whether the result itself states it."""
    stated = getattr(result, "interval", None)
    if isinstance(stated, Tensor):
        return stated[:, 0], stated[:, 1], True
    middle, half = result.log_likelihood - result.bias, 1.959964 * result.mc_se
    return middle - half, middle + half, False


def good(result: LogLikelihood) -> Tensor:
    """Which estimates Pareto k vouches for ``(N,)``; where there is no k, all."""
    draws = result.draws if result.draws is not None else torch.full((len(result),), result.num_samples)
    limits = torch.tensor([good_khat(int(n)) for n in draws.tolist()], dtype=torch.float64)
    return ~(result.khat > limits)


def estimates(result: LogLikelihood, truth: Tensor, replicates: int) -> list[Check]:
    """Everything that a result says of log p(x), ``replicates`` times N rows of the same N data: see the module's text."""
    rows = truth.repeat(replicates)
    shape = (replicates, len(truth))
    off = (result.log_likelihood - result.bias - rows).reshape(shape)
    error = result.mc_se.reshape(shape)
    if (
        float(error.mean()) <= ROUNDING
    ):  # exact, or claimed to be: what is left is rounding, which has no sampling error
        return [within("largest error of an exact answer", float(off.abs().max()), -1, EXACT, "nats", EXACT)]
    return [
        *unbiased((result.log_likelihood - rows).reshape(shape)),
        bias_check(off, error),
        *coverage_checks(result, rows),
    ]


def bias_check(off: Tensor, error: Tensor) -> Check:
    """The mean of estimate - truth as a share of the mean reported error, both ``(replicates, N)``."""
    typical = float(error.mean())
    spread = off.var(0) if len(off) > 1 else off.var().expand(off.shape[1])
    own = math.sqrt(float(spread.sum()) / len(off)) / off.shape[1] / typical
    limit = SHARE + Z_LIMIT * own
    return Check("bias / error", "share", float(off.mean()) / typical, -limit, limit, limit * typical, "nats")


def coverage_checks(result: LogLikelihood, rows: Tensor) -> list[Check]:
    """How often the stated interval holds the truth; where k is above its threshold, counted apart."""
    low, high, stated = interval_of(result)
    known = torch.isfinite(low) & torch.isfinite(high)
    held, fine = (low <= rows) & (rows <= high), good(result)
    count = int((fine & known).sum())
    checks = [shown("k above its threshold", float((~fine).double().mean()))]
    if not bool((~fine).all()) and count:
        covered = float(held[fine & known].double().mean())
        draws = result.num_samples if result.draws is None else int(result.draws.min())
        enough = count >= MIN_INTERVALS
        limits = COVERAGE if draws >= STATED_FROM and enough else (-math.inf, math.inf)
        if draws < STATED_FROM and stated:
            limits = (0.9, 1.0)  # an interval that is stated for few draws may be cautious, not careless
        if draws >= STATED_FROM and not enough:  # a short form: as wide as chance makes it
            half = Z_LIMIT * math.sqrt(0.05 * 0.95 / count)
            limits = (COVERAGE[0] - half, COVERAGE[1] + half)
        power = Z_LIMIT * math.sqrt(covered * (1 - covered) / count)
        checks.append(Check(f"coverage of {count:,} intervals", "coverage", covered, *limits, power, "of intervals"))
    bad = known & ~fine
    if bool(bad.any()):
        checks.append(shown("coverage where k is bad", float(held[bad].double().mean())))
    return checks


def uniform(name: str, values: Any) -> Check:
    """The p-value of Kolmogorov and Smirnov that independent numbers are uniform on (0, 1)."""
    return p_check(name, float(scipy.stats.kstest(np.asarray(values, dtype=float).ravel(), "uniform").pvalue))


def draws_check(pit: Tensor) -> list[Check]:
    """Whether draws are of the exact posterior: ``pit`` ``(draws, N, D)`` of the exact distribution function, rows independent.

    Four functions of expectation 0, averaged over the draws of a row; the rows are independent, so that no effective sample size
    enters. The mean, the square and both tails find a wrong place, a wrong spread, and tails too light or too heavy.
    """
    functions = {
        "place": pit - 0.5,
        "spread": (pit - 0.5).square() - 1 / 12,
        "lower tail": (pit < 0.05).double() - 0.05,
        "upper tail": (pit > 0.95).double() - 0.05,
    }
    units = {"place": "of the distribution function", "spread": "of its square"}
    return [z_check(f"{n} of the draws", f.mean((0, 2)), units.get(n, "of probability")) for n, f in functions.items()]
