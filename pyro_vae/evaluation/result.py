"""The one result of every estimator of log p(x)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_vae.evaluation.estimators import good_khat
from pyro_vae.evaluation.interval import FEWEST, NORMAL
from pyro_vae.evaluation.questions import Proof

MOST_DECIMALS = 4  # of a printed log-likelihood: below that, rounding of the model itself is seen
ROUNDED = 1e-3  # nats of an image: rounding below that is nobody's concern
BAD_FRACTION = 0.01  # of images with k above the threshold, from which on the mean is not to be trusted


class UnreliableEstimateWarning(UserWarning):
    """The importance weights say that an estimate of log p(x) is not to be trusted."""


@dataclass(frozen=True, eq=False)
class LogLikelihood:
    """Per-image log p(x) in nats, with its evidence; every tensor but ``interval`` is ``(N,)``, float64, on the CPU.

    Attributes:
        log_likelihood: the importance-weighted bound log (1/K) sum_k w_k, higher is better.
        bias: jackknife estimate of its O(1/K) bias, at most about 0: ``log_likelihood - bias`` is the corrected estimate.
        mc_se: standard error of the corrected estimate over redrawn samples; too small for fewer than 25 draws.
        interval: ``(N, 2)``, where log p(x) of each image lies at 95 %, over redrawn samples; wider upwards, as weights
            are skew. Where Pareto k is bad its upper end may be too low by an unknown amount; for fewer than 25 draws it is NaN,
            chains of annealing included. See :mod:`pyro_vae.evaluation.interval`.
        ess: effective sample size, out of an image's draws: (sum w)^2 / sum w^2, or of stratified draws what as many independent
            ones would have to be for the same error.
        khat: Pareto k of the largest weights; NaN for fewer than 25 draws; -inf where all are equal, and the guide is proved to
            reach all that matters.
        reconstruction: E_q log p(x | z).
        kl: E_q[log q(z | x) - log p(z)], over all latent sites.
        num_samples: K; at most, where an error was aimed at.
        seed: of the draws.
        chunk_size: images times samples in one pass; another size draws other numbers.
        precision: of matrix products, ``full`` for the program's own.
        rounding_error: what computing in float32, or in fewer bits, adds to estimates, against float64 and the same draws, of 16
            images; None in float64, and where it could not be measured.
        noise: ``random``, or ``sobol`` for randomised quasi-Monte Carlo.
        strata: components of the guide's mixtures, of each of which equally many draws were made; 1 where draws were independent.
        target_se: the standard error that was aimed at, in nats; None where all images got ``num_samples`` draws.
        forbidden: what of the result theory forbids, a line each (:mod:`pyro_vae.evaluation.consistency`); not to be used where
            there is any.
        groups: ``(N, 16)``, log of the sum of the weights of each sixteenth of the draws; of one seed, they are compared by it.
        draws: how many each image got, where an error was aimed at; None where all got ``num_samples``.
        states: joint values of discrete latents that log p(x) is the exact sum over; None where it was estimated from draws.
        blind_spots: what of the program's latents no draw tells of; the first of the warnings.
        proof: what was asked of the weights, and found; None where log p(x) needs none.
        shared: ``(N,)``, one number for rows whose noise is the same, as their content seeds it; None where each has its own.
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
    strata: int = field(default=1, kw_only=True)
    draws: Tensor | None = field(default=None, kw_only=True)
    target_se: float | None = field(default=None, kw_only=True)
    states: int | None = field(default=None, kw_only=True)
    blind_spots: list[str] = field(default_factory=list, kw_only=True)
    forbidden: tuple[str, ...] = field(default=(), kw_only=True)
    proof: Proof | None = field(default=None, kw_only=True)
    interval: Tensor = field(kw_only=True)
    groups: Tensor | None = field(default=None, kw_only=True, repr=False)
    shared: Tensor | None = field(default=None, kw_only=True, repr=False)
    least_samples: ClassVar[int] = FEWEST  # of which the error of an estimate can be relied on

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
        """Monte Carlo standard error of ``nll`` over redrawn samples: sqrt(sum of mc_se^2) / N, where noise is not shared."""
        return float(self.independent(self.mc_se).square().sum().sqrt()) / len(self)

    def independent(self, values: Tensor) -> Tensor:
        """Values ``(N, ...)`` as sums over rows that share their noise: what is independent of each other."""
        return values if self.shared is None else torch.zeros_like(values).index_add(0, self.shared, values)

    @property
    def nll_data_se(self) -> float:
        """Standard error of ``nll`` over images *and* samples drawn anew: sd(log p) / sqrt(N); NaN for one image.

        The noise of the estimates is part of their spread: ``nll_mc_se`` is contained in it, and not to be added.
        """
        return float(self.log_likelihood.std()) / math.sqrt(len(self)) if len(self) > 1 else math.nan

    @property
    def nll_total_se(self) -> float:
        """Standard error of ``nll`` over images and samples drawn anew, see :func:`total_error`."""
        return total_error(self.nll_mc_se, self.nll_data_se)

    @property
    def nll_interval(self) -> tuple[float, float]:
        """Where the mean of -log p(x) of *these* images lies at 95 %, over redrawn samples; around ``nll_corrected``.

        The errors of images are independent: variances add, and what an image's interval reaches beyond 1.96 errors, which
        stems from third cumulants, adds by variance. NaN where an image has no interval. Where Pareto k of some is bad
        (``khat_bad_fraction``), the mean may lie below the lower end, by what their weights have missed.
        """
        centre, half = self.log_likelihood - self.bias, NORMAL * self.mc_se
        own = self.independent(half)
        total = own.square().sum()
        if not bool(torch.isfinite(half).all()):
            ends = self.interval.mean(0)
        elif total == 0:
            ends = centre.mean().expand(2)
        else:
            beyond = torch.stack([centre - self.interval[:, 0] - half, self.interval[:, 1] - centre - half], 1)
            reach = (total.sqrt() + (self.independent(beyond) * own.square()[:, None]).sum(0) / total) / len(self)
            ends = centre.mean() + reach * torch.tensor([-1.0, 1.0], dtype=reach.dtype)
        return (-float(ends[1]), -float(ends[0]))

    @property
    def nll_bias(self) -> float:
        """Estimated bias of ``nll``, at least about 0: the bound's looseness to first order in 1/K."""
        return -float(self.bias.mean())

    @property
    def nll_corrected(self) -> float:
        """``nll - nll_bias``: the estimate that ``nll_mc_se`` and ``nll_interval`` are of."""
        return self.nll - self.nll_bias

    @property
    def khat_threshold(self) -> float:
        """The k up to which estimates can be relied on; of the image with fewest draws, where these differ."""
        return good_khat(self.num_samples if self.draws is None else int(self.draws.min()))

    @property
    def khat_thresholds(self) -> Tensor:
        """The k up to which the estimate of each image can be relied on ``(N,)``: by its own number of draws."""
        draws = [self.num_samples] * len(self) if self.draws is None else self.draws.tolist()
        return torch.tensor([good_khat(n) for n in draws], dtype=torch.float64)

    @property
    def khat_bad_fraction(self) -> float:
        """The fraction of images with k above the threshold; NaN where k is unknown."""
        known = ~self.khat.isnan()
        bad = self.khat[known] > self.khat_thresholds[known]
        return float(bad.float().mean()) if bool(known.any()) else math.nan

    @property
    def ess_share(self) -> Tensor:
        """Effective sample size of each image as a share of its own draws ``(N,)``."""
        return self.ess / (self.num_samples if self.draws is None else self.draws)

    @property
    def few_samples(self) -> bool:
        """Whether draws are too few to tell their own error."""
        return self.num_samples < self.least_samples and self.states is None

    @property
    def target_met(self) -> float:
        """The fraction of images whose standard error is down to the target; NaN where none was aimed at."""
        return math.nan if self.target_se is None else float((self.mc_se <= self.target_se).to(torch.float64).mean())

    @cached_property
    def warnings(self) -> list[str]:
        """What stands against the number: each a line with the figure, the cause and the remedy."""
        found = list(self.blind_spots)
        lost = int((~torch.isfinite(self.log_likelihood)).sum())
        if lost:
            found.append(
                f"{lost} of {len(self)} images have no finite log p(x): the guide draws no latents under which the model "
                "allows them; check the data's range, or train longer"
            )
        if self.khat_bad_fraction > BAD_FRACTION:
            found.append(
                f"Pareto k is above {self._threshold()} for {self.khat_bad_fraction:.1%} of {len(self)} images "
                f"(worst {_in_words(float(self.khat[~self.khat.isnan()].max()))}): the guide is too narrow for their posteriors, "
                "and log p(x) is likely underestimated; the interval leaves out what their weights have missed, and the NLL may "
                "lie below it; use a more expressive guide or annealed importance sampling, more samples alone help little"
            )
        found += self._rounded()
        if self.few_samples:
            found.append(
                f"K = {self.num_samples} draws are too few for Pareto k, and their standard error is too small (+- 1.96 errors "
                "hold log p(x) in 67 % of cases at K = 2, 87 % at 10): no interval is stated; use at least 1000"
            )
        if self.target_se is not None and self.draws is not None:
            short = int(((self.draws >= self.num_samples) & ~(self.mc_se <= self.target_se)).sum())
            if short:
                found.append(
                    f"{short} of {len(self)} images have a standard error above the target of {self.target_se:g} nats after all "
                    f"{self.num_samples} draws (worst {float(self.mc_se.nan_to_num(math.inf).max()):.2g}): allow more draws "
                    "(num_samples, --samples), or use a more expressive guide"
                )
        return found

    def _rounded(self) -> list[str]:
        """Whether rounding at full precision loses more than a tenth of the stated error, of an image or of the mean."""
        if self.rounding_error is None or self.precision != "full":
            return []
        error = self.rounding_error[self.rounding_error.isfinite()]
        mean, worst = float(error.mean()), float(error.abs().max())
        of_mean, of_row = (
            max(self.nll_mc_se / 10, 10.0**-MOST_DECIMALS),
            max(float(self.mc_se.nanmedian()) / 10, ROUNDED),
        )
        if abs(mean) <= of_mean and not worst > of_row:
            return []
        return [
            f"rounding in float32 moves log p(x) by {mean:+.2g} nats per image (by up to {worst:.2g}; {len(error)} images, those "
            "with the largest numbers among them), more than a tenth of the stated error: compute in float64 (program.double())"
        ]

    def summary(self) -> dict[str, Any]:
        """Plain numbers for a table or JSON; what is undefined is None."""
        median = lambda t: float(t.nanmedian())  # noqa: E731
        numbers = {
            "nll": self.nll,
            "nll_mc_se": self.nll_mc_se,
            "nll_data_se": self.nll_data_se,
            "nll_bias": self.nll_bias,
            "nll_corrected": self.nll_corrected,
            "nll_interval_low": self.nll_interval[0],
            "nll_interval_high": self.nll_interval[1],
            "elbo": float(self.elbo.mean()),
            "reconstruction": float(self.reconstruction.mean()),
            "kl": float(self.kl.mean()),
            "ess_median": median(self.ess),
            "khat_median": median(self.khat),
            "khat_bad_fraction": self.khat_bad_fraction,
        }
        plain: dict[str, Any] = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        if self.draws is not None:
            plain |= {
                "draws_mean": float(self.draws.to(torch.float64).mean()),
                "draws_min": int(self.draws.min()),
                "draws_max": int(self.draws.max()),
                "ess_share_median": median(self.ess_share) if bool(self.ess.isfinite().any()) else None,
                "khat_threshold_min": float(self.khat_thresholds.min()),
                "khat_threshold_max": float(self.khat_thresholds.max()),
                "target_se": self.target_se,
                "target_met": self.target_met,
            }
        if self.states is not None:
            plain["states"] = self.states
        if self.proof is not None:
            plain["proof"] = self.proof.summary()
        if self.noise != "random":
            plain["noise"] = self.noise
        if self.precision != "full":
            plain |= {"precision": self.precision, "rounding_error": None, "rounding_error_sd": None}
            if self.rounding_error is not None:
                plain["rounding_error"] = float(self.rounding_error.mean())
                plain["rounding_error_sd"] = float(self.rounding_error.std(unbiased=False))
        return {
            **plain,
            "num_samples": self.num_samples,
            "num_data": len(self),
            "warnings": [*self.forbidden, *self.warnings],
        }

    def __str__(self) -> str:
        nll, elbo, reconstruction = (
            digits(float(value), self.nll_total_se)
            for value in (self.nll, self.elbo.mean(), self.reconstruction.mean())
        )
        kl = kl_digits(float(self.kl.mean()), self.nll_total_se)
        lines = [
            f"NLL {nll} +- {self.nll_mc_se:.2g} (Monte Carlo) +- {self.nll_data_se:.2g} (data) nats per image, "
            f"{self._drawn()}, N = {len(self)}",
            f"ELBO {elbo} = reconstruction {reconstruction} - KL {kl}; ESS median {self._effective()}, "
            f"Pareto k median {float(self.khat.nanmedian()):.2f}",
        ]
        if self.target_se is not None:
            lines.append(
                f"standard error at most {self.target_se:g} nats, as aimed at, for {self.target_met:.1%} of the images"
            )
        if self.precision != "full":
            cost = "an unknown error"
            if self.rounding_error is not None:
                mean, sd = float(self.rounding_error.mean()), float(self.rounding_error.std(unbiased=False))
                cost = f"{mean:+.2g} nats per image (sd {sd:.2g} over {len(self.rounding_error)} images)"
            lines.append(f"products in {self.precision}: against float64, {cost}")
        return "\n".join([*lines, *(f"warning: {w}" for w in (*self.forbidden, *self.warnings))])

    def _drawn(self) -> str:
        if self.states == 1:
            return "exact, of a density without latents"
        if self.states is not None:
            return f"exact, summed over {self.states:,} states of the latents"
        if self.draws is None:
            return f"K = {self.num_samples}{'' if self.noise == 'random' else f' ({self.noise} noise)'}"
        mean, least, most = (
            float(n) for n in (self.draws.to(torch.float64).mean(), self.draws.min(), self.draws.max())
        )
        return f"K = {drawn_range(mean, least, most, self.num_samples)}"

    def _effective(self) -> str:
        if self.draws is None:
            return f"{float(self.ess.median()):.0f} of {self.num_samples}"
        return f"{float(self.ess_share.median()):.0%} of an image's draws"

    def _threshold(self) -> str:
        ends = sorted({f"{float(end):.2f}" for end in (self.khat_thresholds.min(), self.khat_thresholds.max())})
        return ends[0] if len(ends) == 1 else f"{' to '.join(ends)} (by an image's draws)"

    def __repr__(self) -> str:
        return f"<LogLikelihood: {self}>"


def _in_words(khat: float) -> str:
    return f"{khat:.2f}" if math.isfinite(khat) else "infinite"


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


def kl_digits(kl: float, error: float) -> str:
    """A KL beside an NLL of this error, with two digits of its own at least: 137 nats do not become 0 because the NLL is +- 900.

    Example:
        >>> kl_digits(25.312, 0.25), kl_digits(3.34, 0.4), kl_digits(136.6, 900.0), kl_digits(0.0834, float("nan"))
        ('25.31', '3.3', '137', '0.083')
    """
    if not math.isfinite(kl) or kl == 0 or error <= abs(kl) / 10:
        return digits(kl, error)
    return f"{kl:.{max(0, 1 - math.floor(math.log10(abs(kl))))}f}"


def drawn_range(mean: float, least: float, most: float, allowed: float) -> str:
    """How many draws images got, where each got as many as its error asked for."""
    return f"{mean:.0f} on average, {allowed:.0f} at most ({least:.0f} to {most:.0f} by image)"


def total_error(mc_se: float, data_se: float) -> float:
    """Standard error of a mean over images and samples drawn anew; NaN where nothing is known.

    ``data_se`` = sd(estimates) / sqrt(N) is all of it: estimates differ by their images and by their noise alike. Only where few
    images happen to lie closer together than their noise allows, or where there is one image, the error is ``mc_se``.
    """
    known = [e for e in (mc_se, data_se) if not math.isnan(e)]
    return max(known) if known else math.nan
