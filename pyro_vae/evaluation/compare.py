"""Which of two programs describes the data better: paired differences on the same images.

    d_i = log p_a(x_i) - log p_b(x_i),   mean d +- t_(N-1) sd(d) / sqrt(N)

What makes an image easy makes it easy for both, and cancels: the error of the mean difference is often a tenth of the error of
either mean. sd(d) holds the Monte Carlo noise of both estimates, which is reported apart as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from pyro_vae.errors import UserError
from pyro_vae.evaluation.result import LogLikelihood

LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class Comparison:
    """The paired difference of two programs, in nats per image; positive where the first is better.

    Attributes:
        difference: ``(N,)``, of the bias-corrected log p(x) of each image, float64.
        mc_se: standard error of the mean difference over redrawn samples, the images fixed; the two estimates are taken
            as independent. It is part of ``se``, and not to be added to it.
        names: of the two programs.
    """

    difference: Tensor
    mc_se: float
    names: tuple[str, str] = ("a", "b")

    def __len__(self) -> int:
        return len(self.difference)

    @property
    def mean(self) -> float:
        """Mean of log p_a(x) - log p_b(x)."""
        return float(self.difference.mean())

    @property
    def se(self) -> float:
        """Standard error of :attr:`mean` over images and samples drawn anew: sd(d) / sqrt(N)."""
        return float(self.difference.std()) / math.sqrt(len(self)) if len(self) > 1 else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the mean difference, by Student's t."""
        if len(self) < 2:
            return (math.nan, math.nan)
        half = float(stats.t.ppf(0.5 + LEVEL / 2, len(self) - 1)) * self.se
        return (self.mean - half, self.mean + half)

    @property
    def p_value(self) -> float:
        """Two-sided p of the paired t-test that the mean difference is zero."""
        if len(self) < 2:
            return math.nan
        if self.se == 0:
            return 1.0 if self.mean == 0 else 0.0
        return float(2 * stats.t.sf(abs(self.mean) / self.se, len(self) - 1))

    @property
    def verdict(self) -> str:
        """One sentence: which is better, by how much, how surely."""
        a, b = self.names
        if not self.p_value < 1 - LEVEL:
            return f"{a} and {b} are not told apart by {len(self)} images"
        better, worse = (a, b) if self.mean > 0 else (b, a)
        return f"{better} is better than {worse} by {abs(self.mean):.3g} nats per image (p = {self.p_value:.1g})"

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON; what is undefined is None."""
        numbers = {
            "difference": self.mean,
            "difference_se": self.se,
            "difference_mc_se": self.mc_se,
            "interval_low": self.interval[0],
            "interval_high": self.interval[1],
            "p_value": self.p_value,
        }
        plain: dict[str, Any] = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        return {"runs": list(self.names), **plain, "verdict": self.verdict}


def compare(a: LogLikelihood, b: LogLikelihood, names: tuple[str, str] = ("a", "b")) -> Comparison:
    """Compare two programs by their log p(x) of the same images, in the same order.

    Args:
        a, b: results on the same images: by importance weighting or by annealing.
        names: what to call the two.

    Returns:
        The paired difference. Images of which either has no finite estimate make it infinite or NaN.

    Raises:
        UserError: results of different numbers of images.

    Example:
        >>> import torch, pyro_vae as pv
        >>> from pyro_vae.evaluation.compare import compare
        >>> vae = pv.build("ppca", "linear", (3,), latent_dim=2)
        >>> result = pv.log_likelihood(vae, torch.zeros(8, 3), num_samples=100)
        >>> compare(result, result).mean
        0.0
    """
    for one in (a, b):
        if not isinstance(one, LogLikelihood):
            raise UserError(f"expected two results of log_likelihood, got {type(one).__name__}")
    if not isinstance(names, tuple | list) or len(names) != 2:
        raise UserError(f"expected names of the two results, got {names!r}")
    if len(a) != len(b):
        raise UserError(f"expected results on the same images, got {len(a)} images and {len(b)}")
    difference = corrected(a) - corrected(b)
    mc_se = float((a.mc_se.square() + b.mc_se.square()).sum().sqrt()) / len(a)
    return Comparison(difference, mc_se, names)


def corrected(result: LogLikelihood) -> Tensor:
    """Bias-corrected log p(x) ``(N,)``; the bound itself where there is no finite correction."""
    return result.log_likelihood - torch.where(torch.isfinite(result.bias), result.bias, torch.zeros_like(result.bias))
