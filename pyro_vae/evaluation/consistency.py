"""Results that theory forbids: where one comes out, an instrument is at fault, and says so.

    claim:  E[low - high] <= 0,  for every datum;      t = mean(low - high) / (sd(low - high) / sqrt(N))

An upper bound lies above a lower one, an ELBO below log p(x), a KL divergence at or above 0, and data are not told apart from
themselves. A figure may break such a rule by chance, but not by much. Where theory bounds an expectation (KL divergences, bounds
of log p(x) from both sides), Markov's inequality gives the chance, for any number of data and any law of the noise; the other
claims are tested on means over data, one-sided. Claims of one result go together by Holm's rule, so that a sound one is called
forbidden once in 10,000. What the tests find is in the table of instruments (cells "claims").

Holm 1979, A simple sequentially rejective multiple test procedure, https://www.jstor.org/stable/4615733; the t-test of skewed
differences: Hall 1992, On the removal of skewness by transformation, https://www.jstor.org/stable/2345958.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from pyro.distributions import ImproperUniform
from scipy.stats import t as student
from torch import Tensor

from pyro_vae.errors import warn
from pyro_vae.programs.masks import counted
from pyro_vae.programs.trace import Traces, innermost, is_random, latent_sites, observation

FAMILY_LEVEL = 1e-4  # chance of a false alarm over all claims of one result
FEW = 20  # data; fewer have no standard error that a figure could rest on
LEAST = 50  # data that a test of means asks for: at 20, differences with a long tail below are above 0 seven times too often
SKEWNESS = 2.0  # times that of a sample, which understates the skewness of what it was drawn from
ROUNDING = 1e-5  # of the figures: what float32 does to them, and no rule is broken by that


class InconsistentResultWarning(UserWarning):
    """A result that theory forbids: an instrument is at fault, and its figures are not to be used."""


@dataclass(frozen=True)
class Claim:
    """That one figure is at most another.

    Attributes:
        low, high: the figures' names, ``low`` the one that theory puts at or below the other.
        low_value, high_value: the figures, in nats per datum where nothing else is said.
        se: standard error of their difference.
        num_data: from how many data the error was found.
        suspect: which instrument to look at, and what to do.
        skewness: of the differences, for the correction of t.
        exact: a bound of the p-value that needs no standard error.
    """

    low: str
    high: str
    low_value: float
    high_value: float
    se: float
    num_data: int
    suspect: str
    skewness: float = 0.0
    exact: float | None = None

    @property
    def difference(self) -> float:
        """``low_value - high_value``: at most 0 in expectation."""
        return self.low_value - self.high_value

    @property
    def size(self) -> float:
        """Of the figures, of which a part is rounding."""
        return max(abs(self.low_value), abs(self.high_value), 1.0)

    @property
    def p_value(self) -> float:
        """Chance of a difference like this or larger where none is; 1 where nothing can be told."""
        if self.exact is not None:
            return self.exact
        excess = self.difference - ROUNDING * self.size
        if not math.isfinite(excess) or not math.isfinite(self.se) or excess <= 0 or self.num_data < LEAST:
            return 1.0
        if self.se <= 0:
            return 0.0
        t = excess / self.se
        # Differences with a long tail below have means above 0 too often: the skewness, negative there, lowers t (Hall).
        a = SKEWNESS * min(0.0, self.skewness) / (3 * math.sqrt(self.num_data))
        return float(student.sf(max(t + a * t**2 + a**2 * t**3 / 3 + a / 2, t / 3), self.num_data - 1))

    def __str__(self) -> str:
        error = "" if math.isnan(self.se) else f" +- {self.se:.1g}"
        return (
            f"{self.low} ({self.low_value:.4g}) is above {self.high} ({self.high_value:.4g}) by {self.difference:.2g}{error}, "
            f"which theory forbids (N = {self.num_data}, p = {self.p_value:.0e}): do not use these figures; {self.suspect}"
        )


def claim(low: str, high: str, low_values: Tensor, high_values: Tensor, suspect: str) -> Claim:
    """The claim of paired figures ``(N,)``, one pair a datum; pairs that are not finite are left out."""
    low_values, high_values = low_values.detach().cpu().double(), high_values.detach().cpu().double()
    finite = torch.isfinite(low_values) & torch.isfinite(high_values)
    low_values, high_values = low_values[finite], high_values[finite]
    difference = low_values - high_values
    count = len(difference)
    if count == 0:
        return Claim(low, high, math.nan, math.nan, math.nan, count, suspect)
    sd = float(difference.std()) if count > 1 else math.nan
    skewness = float(((difference - difference.mean()) / sd).pow(3).mean()) if sd > 0 else 0.0
    error = sd / math.sqrt(count)
    return Claim(low, high, float(low_values.mean()), float(high_values.mean()), error, count, suspect, skewness)


def forbidden(claims: Iterable[Claim], level: float = FAMILY_LEVEL) -> tuple[str, ...]:
    """A line for each claim that does not hold, by Holm's rule at a family's level; none where all may hold."""
    ordered = sorted(claims, key=lambda c: c.p_value)
    found = []
    for index, one in enumerate(ordered):
        if one.p_value > level / (len(ordered) - index):
            break
        found.append(str(one))
    return tuple(found)


def tell(messages: Sequence[str]) -> None:
    """Issue :class:`InconsistentResultWarning` for each line."""
    for message in messages:
        warn(message, InconsistentResultWarning)


def of_bounds(lower: Tensor, upper: Tensor, importance: Tensor | None = None) -> list[Claim]:
    """Of bidirectional bounds ``(N,)`` on the same simulated data, and of an importance-weighted bound there.

    Chains forward and back are independent given x, E[e^lower] = p(x) and E[e^-upper] = 1 / p(x): over the data,
    E[e^(sum of lower - upper)] = 1, and a sum of c or more comes with a chance of at most e^-c.
    """
    suspect = (
        "the chains do not leave their densities as they are, or the data are no draws of the joint: try another model, and "
        "report it"
    )
    found = [claim("the lower bound of annealing", "its upper bound", lower, upper, suspect)]
    if importance is not None:
        found.append(claim("the importance-weighted bound", "annealing's upper bound", importance, upper, suspect))
    lows = [lower] if importance is None else [lower, importance]
    evidence = [
        len(upper) * ROUNDING * one.size - (low - upper).double().sum() for one, low in zip(found, lows, strict=True)
    ]
    return [
        replace(one, exact=float(log.clamp(max=0).exp().nan_to_num(1.0)))
        for one, log in zip(found, evidence, strict=True)
    ]


def of_kl(kl: Tensor, draws: Tensor, rounding: Tensor) -> list[Claim]:
    """Of estimates ``(N,)`` of KL(q(z | x) || p(z)), each by so many independent draws, in all rows and in the worst one.

    Where both densities are normalised, E_q[p(z) / q(z)] <= 1, and by Markov's inequality a sum of log q(z) / p(z) over any
    independent draws is below -c with a chance of at most e^-c: no error has to be estimated. ``rounding`` may be part of each.
    """
    suspect = "a density of the prior or of the guide does not integrate to 1: check the log_prob of every site"
    evidence = (
        (draws * (kl + rounding)).double().nan_to_num(math.inf, math.inf, math.inf)
    )  # e^-inf = 0 of what is infinite
    if not len(evidence):
        return []
    row, name = int(evidence.argmin()), "the KL divergence of the guide from the prior"
    chances = (
        float(evidence.sum().clamp(max=0).exp()),
        min(1.0, len(evidence) * float(evidence[row].clamp(max=0).exp())),
    )
    values = (name, float(kl.nanmean())), (f"{name} in row {row}", float(kl[row]))
    return [
        Claim("0", high, 0.0, value, math.nan, len(evidence), suspect, exact=p)
        for (high, value), p in zip(values, chances, strict=True)
    ]


def latents_have_densities(traces: Traces) -> bool:
    """Whether log q(z | x) - log p(z) is a ratio of two densities of the same latents: no factors, masks or auxiliary sites."""
    model, guide = latent_sites(traces.model), latent_sites(traces.guide)
    others = [name for traced in (traces.model, traces.guide) for name, site in traced.nodes.items()
              if is_random(site) and site["is_observed"] and name != observation(traces.model)]  # fmt: skip
    sites = (*model.values(), *guide.values())
    masked = any(counted(site) is not None or isinstance(innermost(site["fn"]), ImproperUniform) for site in sites)
    return not others and not masked and set(model) == set(guide)


def of_gaps(elbo: Tensor, elbo_optimal: Tensor, log_likelihood: Tensor) -> list[Claim]:
    """Of the ELBOs of a guide and of the best member of its family, and log p(x) without its bias, ``(N,)`` each."""
    suspect = "a guide that is too narrow underestimates log p(x): give that of annealing (log_likelihood=)"
    return [
        claim("the ELBO", "log p(x)", elbo, log_likelihood, suspect),
        claim("the ELBO of the best guide", "log p(x)", elbo_optimal, log_likelihood, suspect),
    ]


def of_information(lower: Tensor, uppers: dict[str, Tensor]) -> list[Claim]:
    """Of terms ``(N,)`` whose means are a lower bound of I(x; z) and, by name, upper ones (leave-one-out, rate)."""
    suspect = "a density of the guide or of the prior is not what it says: compare its log_prob with its samples, and its masks"
    return [claim("the lower bound of I(x; z)", name, lower, upper, suspect) for name, upper in uppers.items()]


def of_itself(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[Claim]:
    """Of scores ``(N,)`` by name of the same data twice, row by row: neither is higher."""
    suspect = "the same data were prepared or scored in two ways: see pyro_vae.data.alike.observed_like"
    found = []
    for name in one:
        names = [f"{name} of the data as {part}" for part in ("normal", "anomalies")]
        found.append(claim(names[0], names[1], one[name], other[name], suspect))
        found.append(claim(names[1], names[0], other[name], one[name], suspect))
    return found
