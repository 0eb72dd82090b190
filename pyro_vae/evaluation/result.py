"""The one result of every estimator of log p(x)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_vae.evaluation.estimators import good_khat

MOST_DECIMALS = 4  # of a printed log-likelihood: below that, rounding of the model itself is seen
BAD_FRACTION = 0.01  # of images with k above the threshold, from which on the mean is not to be trusted


class UnreliableEstimateWarning(UserWarning):
    """The importance weights say that an estimate of log p(x) is not to be trusted."""


@dataclass(frozen=True, eq=False)
class LogLikelihood:
    """Per-image log p(x) in nats, with its evidence; every tensor is ``(N,)``, float64, on the CPU.

    Attributes:
        log_likelihood: the importance-weighted bound log (1/K) sum_k w_k, higher is better.
        bias: jackknife estimate of its O(1/K) bias, at most about 0: ``log_likelihood - bias`` is the corrected estimate.
        mc_se: standard error of the corrected estimate over redrawn samples.
        ess: effective sample size (sum w)^2 / sum w^2, out of ``num_samples``.
        khat: Pareto k of the largest weights; NaN for fewer than 25 draws.
        reconstruction: E_q log p(x | z).
        kl: E_q[log q(z | x) - log p(z)], over all latent sites.
        num_samples: K.
        seed: of the draws.
        chunk_size: images times samples in one pass; another size draws other numbers.
        precision: of matrix products, ``full`` for the program's own.
        rounding_error: what another precision adds to estimates, against float64 and the same draws, of the first 16 images;
            None at full precision, and where it could not be measured.
        noise: ``random``, or ``sobol`` for randomised quasi-Monte Carlo.
        draws: how many each image got, where an error was aimed at; None where all got ``num_samples``.
    """

    log_likelihood: Tensor
    bias: Tensor
    mc_se: Tensor
    ess: Tensor
    khat: Tensor
    reconstruction: Tensor
    kl: Tensor
    num_samples: int
    seed: int
    chunk_size: int
    precision: str = field(default="full", kw_only=True)
    rounding_error: Tensor | None = field(default=None, kw_only=True)
    noise: str = field(default="random", kw_only=True)
    draws: Tensor | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.log_likelihood)

    @property
    def elbo(self) -> Tensor:
        """Per-image evidence lower bound, ``reconstruction - kl``."""
        return self.reconstruction - self.kl

    @property
    def nll(self) -> float:
        """Mean of -log p(x) over images, in nats per image."""
        return -float(self.log_likelihood.mean())

    @property
    def nll_mc_se(self) -> float:
        """Monte Carlo standard error of ``nll`` over redrawn samples: sqrt(sum of mc_se^2) / N."""
        return float(self.mc_se.square().sum().sqrt()) / len(self)

    @property
    def nll_data_se(self) -> float:
        """Standard error of ``nll`` over images drawn anew: sd(log p) / sqrt(N); NaN for one image."""
        return float(self.log_likelihood.std()) / math.sqrt(len(self)) if len(self) > 1 else math.nan

    @property
    def nll_total_se(self) -> float:
        """Monte Carlo and data error of ``nll`` together; of those that are known, NaN where neither is."""
        return total_error(self.nll_mc_se, self.nll_data_se)

    @property
    def nll_bias(self) -> float:
        """Estimated bias of ``nll``, at least about 0: the bound's looseness to first order in 1/K."""
        return -float(self.bias.mean())

    @property
    def khat_threshold(self) -> float:
        """The k up to which an image's estimate can be relied on at this K."""
        return good_khat(self.num_samples)

    @property
    def khat_bad_fraction(self) -> float:
        """The fraction of images with k above the threshold; NaN where k is unknown."""
        known = ~self.khat.isnan()
        limits = [self.khat_threshold] if self.draws is None else [good_khat(n) for n in self.draws[known].tolist()]
        bad = self.khat[known] > torch.tensor(limits, dtype=self.khat.dtype)
        return float(bad.double().mean()) if bool(known.any()) else math.nan

    @cached_property
    def warnings(self) -> list[str]:
        """What stands against the number: each a line with the figure, the cause and the remedy."""
        found = []
        lost = int((~torch.isfinite(self.log_likelihood)).sum())
        if lost:
            found.append(
                f"{lost} of {len(self)} images have no finite log p(x): the guide draws no latents under which the model "
                "allows them; check the data's range, or train longer"
            )
        if self.khat_bad_fraction > BAD_FRACTION:
            found.append(
                f"Pareto k is above {self.khat_threshold:.2f} for {self.khat_bad_fraction:.1%} of {len(self)} images "
                f"(worst {float(self.khat.nan_to_num(-math.inf).max()):.2f}): the guide is too narrow for their posteriors, "
                "and log p(x) is likely underestimated; use a more expressive guide or annealed importance sampling, more "
                "samples alone help little"
            )
        if self.num_samples < 25:
            found.append(
                f"K = {self.num_samples} draws are too few for Pareto k: nothing vouches for the estimate; use at least 1000"
            )
        return found

    def summary(self) -> dict[str, Any]:
        """Plain numbers for a table or JSON; what is undefined is None."""
        median = lambda t: float(t.nanmedian())  # noqa: E731
        numbers = {
            "nll": self.nll,
            "nll_mc_se": self.nll_mc_se,
            "nll_data_se": self.nll_data_se,
            "nll_bias": self.nll_bias,
            "elbo": float(self.elbo.mean()),
            "reconstruction": float(self.reconstruction.mean()),
            "kl": float(self.kl.mean()),
            "ess_median": median(self.ess),
            "khat_median": median(self.khat),
            "khat_bad_fraction": self.khat_bad_fraction,
        }
        plain: dict[str, Any] = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        if self.draws is not None:
            plain["draws_mean"] = float(self.draws.double().mean())
        if self.noise != "random":
            plain["noise"] = self.noise
        if self.precision != "full":
            plain |= {"precision": self.precision, "rounding_error": None, "rounding_error_sd": None}
            if self.rounding_error is not None:
                plain["rounding_error"] = float(self.rounding_error.mean())
                plain["rounding_error_sd"] = float(self.rounding_error.std(unbiased=False))
        return {**plain, "num_samples": self.num_samples, "num_data": len(self), "warnings": list(self.warnings)}

    def __str__(self) -> str:
        nll, elbo, reconstruction, kl = (
            digits(float(value), self.nll_total_se)
            for value in (self.nll, self.elbo.mean(), self.reconstruction.mean(), self.kl.mean())
        )
        lines = [
            f"NLL {nll} +- {self.nll_mc_se:.2g} (Monte Carlo) +- {self.nll_data_se:.2g} (data) nats per image, "
            f"{self._drawn()}, N = {len(self)}",
            f"ELBO {elbo} = reconstruction {reconstruction} - KL {kl}; ESS median {float(self.ess.median()):.0f}, "
            f"Pareto k median {float(self.khat.nanmedian()):.2f}",
        ]
        if self.precision != "full":
            cost = "an unknown error"
            if self.rounding_error is not None:
                mean, sd = float(self.rounding_error.mean()), float(self.rounding_error.std(unbiased=False))
                cost = f"{mean:+.2g} nats per image (sd {sd:.2g} over {len(self.rounding_error)} images)"
            lines.append(f"products in {self.precision}: against float64, {cost}")
        return "\n".join([*lines, *(f"warning: {w}" for w in self.warnings)])

    def _drawn(self) -> str:
        if self.draws is None:
            return f"K = {self.num_samples}{'' if self.noise == 'random' else f' ({self.noise} noise)'}"
        return f"K = {float(self.draws.double().mean()):.0f} on average, {self.num_samples} at most"

    def __repr__(self) -> str:
        return f"<LogLikelihood: {self}>"


def digits(value: float, error: float) -> str:
    """A value with the decimals that its standard error supports, by the rule of the Particle Data Group.

    The error is kept to two digits where these are 10 to 35, and to one above; the value ends where the error does. Where
    the error is unknown or infinite, no decimals stand.

    Particle Data Group, Review of Particle Physics, introduction, section 5.3, https://pdg.lbl.gov.

    Example:
        >>> digits(87.53127, 0.25), digits(19.012, 0.41), digits(1234.5, 56.0), digits(19.012, float("nan"))
        ('87.53', '19.0', '1230', '19')
    """
    if not math.isfinite(value) or not math.isfinite(error):
        return f"{value:.0f}"
    if error <= 0:  # exact, to rounding
        return f"{value:.{MOST_DECIMALS}f}"
    exponent = math.floor(math.log10(error))
    leading = error / 10.0**exponent  # 1 to 10
    # 9.5 and more is rounded up to 10, whose second digit stands where the first of 9.4 would
    decimals = min(-exponent + (leading < 3.55), MOST_DECIMALS)
    return f"{round(value, decimals):.{max(decimals, 0)}f}"


def total_error(*errors: float) -> float:
    """Independent standard errors together, of those that are known; NaN where none is."""
    known = [e for e in errors if not math.isnan(e)]
    return math.hypot(*known) if known else math.nan
