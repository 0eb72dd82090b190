"""Which of two programs describes the data better: paired differences on the same images.

    d_i = log p_a(x_i) - log p_b(x_i),   mean d +- t_(N-1) sd(d) / sqrt(N)

What makes an image easy makes it easy for both, and cancels: the error of the mean difference is often a tenth of the error of
either mean. sd(d) holds the Monte Carlo noise of both estimates, which is reported apart as well. A difference that rounding
could make, few images and few draws give no verdict; what stands against either result stands against the comparison.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from scipy import stats
from scipy.optimize import brentq
from torch import Tensor

from pyro_vae.errors import UserError
from pyro_vae.evaluation.consistency import FEW
from pyro_vae.evaluation.result import BAD_FRACTION, LogLikelihood

LEVEL = 0.95
LEAST = 1e-12  # p-value that is told of seeds


@dataclass(frozen=True, eq=False)
class Comparison:
    """The paired difference of two programs, in nats per image; positive where the first is better.

    Attributes:
        difference: ``(N,)``, of the bias-corrected log p(x) of each image, float64.
        mc_se: standard error of the mean difference over redrawn samples, the images fixed; of two estimates of one seed, which
            share their noise, by a jackknife over sixteenths of the draws, NaN where these are not known. It is part of ``se``,
            and not to be added to it.
        names: of the two programs.
        khat_bad: for each the fraction of images whose Pareto k is bad; NaN where it is unknown.
        warnings: what stands against either result, a line each.
        rounding: nats of the mean that rounding may have made.
        few: why there is no verdict; empty where there is one.
        p_together: the p-value among several comparisons (:func:`together`); None of one alone.
        by_seed: ``(S,)`` mean difference of each pair of trainings of one seed, ``difference`` being over all of them; of one
            pair there is no error over seeds, and no verdict. None of two trained programs.
    """

    difference: Tensor
    mc_se: float
    names: tuple[str, str] = ("a", "b")
    khat_bad: tuple[float, float] = field(default=(math.nan, math.nan), kw_only=True)
    warnings: tuple[str, ...] = field(default=(), kw_only=True)
    rounding: float = field(default=0.0, kw_only=True)
    few: str = field(default="", kw_only=True)
    p_together: float | None = field(default=None, kw_only=True)
    by_seed: Tensor | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.difference)

    @property
    def mean(self) -> float:
        """Mean of log p_a(x) - log p_b(x)."""
        return float(self.difference.mean())

    @property
    def _variances(self) -> list[tuple[float, int]]:
        """Of the mean, over images and samples drawn anew and over other seeds, each with its degrees of freedom."""
        parts = [self.difference] if self.by_seed is None else [self.difference, self.by_seed]
        return [(float(part.var()) / len(part) if len(part) > 1 else math.nan, len(part) - 1) for part in parts]

    @property
    def se(self) -> float:
        """Standard error of :attr:`mean` over images and samples drawn anew, sd(d) / sqrt(N), and over seeds, where there are.

        The two variances are added, which counts what a seed does to an image twice: a little too large.
        """
        return math.sqrt(sum(variance for variance, _ in self._variances))

    def _half(self, p: float) -> float:
        """Half the width of the interval that the mean leaves with probability ``p``: those of the two parts, squared and added.

        Their degrees of freedom may be 2 and 1,000: one number for both (Satterthwaite 1946) held the truth in 92 % of cases.
        """
        return math.sqrt(sum(variance * float(stats.t.isf(p / 2, n)) ** 2 for variance, n in self._variances))

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the mean difference, by Student's t."""
        if len(self) < 2:
            return (math.nan, math.nan)
        half = self._half(1 - LEVEL)
        return (self.mean - half, self.mean + half)

    @property
    def p_value(self) -> float:
        """Two-sided p of the paired t-test that the mean difference is what rounding makes, or less; NaN without a verdict."""
        if self.few:
            return math.nan
        beyond = abs(self.mean) - self.rounding
        if self.se == 0 or beyond <= 0:
            return 1.0 if beyond <= 0 else 0.0
        if len(self._variances) == 1:
            return float(2 * stats.t.sf(beyond / self.se, len(self) - 1))
        if self._half(LEAST) < beyond:
            return LEAST
        return math.exp(float(brentq(lambda q: self._half(math.exp(q)) - beyond, math.log(LEAST), 0.0)))

    @property
    def verdict(self) -> str:
        """One sentence: which is better, by how much, how surely."""
        a, b = self.names
        p = self.p_value if self.p_together is None else self.p_together
        if self.few:
            return f"no verdict on {a} and {b}: {self.few}"
        if not p < 1 - LEVEL:
            return f"{a} and {b} are not told apart by {len(self)} images"
        better, worse = (a, b) if self.mean > 0 else (b, a)
        found = f"{better} is better than {worse} by {abs(self.mean):.3g} nats per image (p = {p:.1g})"
        bad = [
            f"{f:.0%} of the images of {n}" for n, f in zip(self.names, self.khat_bad, strict=True) if f > BAD_FRACTION
        ]
        if not bad:
            return found
        return (
            f"{found}, if weights can be relied on whose Pareto k is bad for {' and '.join(bad)}: compare by annealing"
        )

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON; what is undefined is None."""
        numbers = {
            "difference": self.mean,
            "difference_se": self.se,
            "difference_mc_se": self.mc_se,
            "interval_low": self.interval[0],
            "interval_high": self.interval[1],
            "p_value": self.p_value,
            "p_value_together": self.p_value if self.p_together is None else self.p_together,
            "khat_bad_fraction_a": self.khat_bad[0],
            "khat_bad_fraction_b": self.khat_bad[1],
        }
        plain: dict[str, Any] = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        if self.by_seed is not None:
            plain["by_seed"] = self.by_seed.tolist()
        return {"runs": list(self.names), **plain, "verdict": self.verdict, "warnings": list(self.warnings)}


def compare(
    a: LogLikelihood | Sequence[LogLikelihood],
    b: LogLikelihood | Sequence[LogLikelihood],
    names: tuple[str, str] = ("a", "b"),
) -> Comparison:
    """Compare two programs, or two ways of training, by their log p(x) of the same images, in the same order.

    Args:
        a, b: results on the same images: by importance weighting or by annealing. Or as many of each, of trainings with the same
            seeds in the same order: what is compared is then the mean over seeds, and the error holds what another seed does.
        names: what to call the two.

    Returns:
        The paired difference. Images of which either has no finite estimate make it infinite or NaN.

    Raises:
        UserError: results of different numbers of images, or not as many of each.

    Example:
        >>> import torch, pyro_vae as pv
        >>> from pyro_vae.evaluation.compare import compare
        >>> vae = pv.build("ppca", "linear", (3,), latent_dim=2)
        >>> result = pv.log_likelihood(vae, torch.zeros(8, 3), num_samples=100)
        >>> compare(result, result).mean
        0.0
    """
    several = isinstance(a, Sequence) and isinstance(b, Sequence)
    ours, theirs = (list(r) if isinstance(r, Sequence) else [r] for r in (a, b))
    for one in [*ours, *theirs]:
        if not isinstance(one, LogLikelihood):
            raise UserError(
                f"expected two results of log_likelihood, got {type(one).__name__}; or two lists of results"
            )
    if not isinstance(names, tuple | list) or len(names) != 2:
        raise UserError(f"expected names of the two results, got {names!r}")
    if len(ours) != len(theirs) or not ours:
        raise UserError(
            f"expected as many results of each, of the same seeds in one order, got {len(ours)} and {len(theirs)}"
        )
    if len({len(one) for one in [*ours, *theirs]}) > 1:
        raise UserError(
            f"expected results on the same images, got {' and '.join(str(len(r)) for r in [*ours, *theirs])} images"
        )
    both = [(n, r) for n, results in zip(names, (ours, theirs), strict=True) for r in results]
    few = [f"{len(ours[0])} images are too few (at least {FEW})"] if len(ours[0]) < FEW else []
    few += ["one seed that both have says nothing of what another does"] if several and len(ours) < 2 else []
    few += [f"{r.num_samples} draws of {n} are too few (at least {r.least_samples})" for n, r in both if r.few_samples]
    by_image = torch.stack([corrected(r) - corrected(s) for r, s in zip(ours, theirs, strict=True)])
    lost = int((~torch.isfinite(by_image)).any(0).sum())
    few += [f"{lost} of {len(ours[0])} images have no finite log p(x)"] if lost else []
    mc_se = [_mc_se(r, s) for r, s in zip(ours, theirs, strict=True)]
    bad = [float(torch.tensor([r.khat_bad_fraction for r in results]).nanmean()) for results in (ours, theirs)]
    return Comparison(
        by_image.mean(0),
        math.hypot(*mc_se) / len(mc_se),
        names,
        khat_bad=(bad[0], bad[1]),
        warnings=tuple(dict.fromkeys(f"{n}: {w}" for n, r in both for w in (*r.forbidden, *r.warnings))),
        rounding=sum(
            float(r.rounding_error.abs().nan_to_num(0.0).max()) for _, r in both if r.rounding_error is not None
        )
        / len(ours),
        few="; ".join(dict.fromkeys(few)),
        by_seed=by_image.mean(1) if several else None,
    )


def together(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Comparisons that are looked at together, with p-values by Holm's rule: one of all is wrong in 5 % of cases, not of each."""
    known = sorted((c.p_value, i) for i, c in enumerate(comparisons) if not math.isnan(c.p_value))
    found, least = list(comparisons), 0.0
    for rank, (p, i) in enumerate(known):
        least = max(least, min(1.0, p * (len(known) - rank)))
        found[i] = replace(found[i], p_together=least)
    return found


def _mc_se(a: LogLikelihood, b: LogLikelihood) -> float:
    """Of the mean difference, the images fixed."""
    how = [(r.seed, r.num_samples, r.chunk_size, r.noise, r.draws is None, r.shared is None) for r in (a, b)]
    if how[0] != how[1]:  # other noise
        return math.hypot(a.nll_mc_se, b.nll_mc_se)
    if a.groups is None or b.groups is None or a.groups.shape != b.groups.shape or len(a.groups) != len(a):
        return math.nan
    left = []
    for groups in (a.groups, b.groups):  # log of the mean weight without each group
        share = (groups - groups.logsumexp(-1, keepdim=True)).exp().clamp(max=1 - 1e-12)
        left.append(torch.log1p(-share))
    shift, number = a.independent(left[0] - left[1]), a.groups.shape[-1]
    return float(((number - 1) * shift.var(-1, correction=0)).sum().sqrt()) / len(a)


def corrected(result: LogLikelihood) -> Tensor:
    """Bias-corrected log p(x) ``(N,)``; the bound itself where there is no finite correction."""
    return result.log_likelihood - torch.where(torch.isfinite(result.bias), result.bias, torch.zeros_like(result.bias))
