"""Cells of annealing: importance sampling from the prior and from the guide, the reverse chains, and bounds from both sides."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from exact import Exact, Hierarchy, LinearGaussian, MissingElements, declared, rotated
from exact_modes import TwoModes
from exact_others import BetaBinomial, GammaPoisson, HeavyTails
from instruments_checks import Cell, Check, estimates, shown, unbiased, within, z_check
from instruments_weights import both, noises, repeated, seed_of

from pyro_vae.evaluation.ais import annealed_log_likelihood
from pyro_vae.evaluation.anneal import run
from pyro_vae.evaluation.bdmc import bidirectional
from pyro_vae.evaluation.methods import Annealing

DATA = 200
SPREAD = 1.0  # of log w: above it, few weights carry the mean, and a cell says so
LENGTHS = (5, 20, 100, 1000)  # distributions; the last is the library's default
REPLICATES = {5: 100, 20: 80, 100: 30, 1000: 8}  # of every datum, 16 chains each

# Data say little enough here that log w varies by less than 1 from the prior at 5 distributions.
MODELS: dict[str, Callable[[], tuple[Any, Exact]]] = {
    "PPCA, 3 latents": lambda: both(LinearGaussian(rotated(5, 3, 0.3, 20), 0.9, guide="diagonal", width=1.3)),
    "PPCA, 8 latents": lambda: both(LinearGaussian(rotated(10, 8, 0.14, 21), 0.9, width=1.15)),
    "PPCA, declared": lambda: declared(rotated(5, 3, 0.35, 22), 0.9, width=1.25),
    "factor analysis": lambda: both(LinearGaussian(rotated(6, 3, 0.3, 23), noises(6, 0.6, 1.5), width=1.25)),
    "hierarchy": lambda: both(Hierarchy(rotated(3, 2, 0.5, 24), rotated(5, 3, 0.25, 25), 0.8, 0.9, width=1.2)),
    "gamma-Poisson": lambda: both(GammaPoisson(2, 1, 6.0, 2.0)),
    "beta-binomial": lambda: both(BetaBinomial(3, 2, 3.0, 2.0)),
    "Student t prior": lambda: both(HeavyTails(2, noise=2.0)),
    "masked elements": lambda: both(MissingElements(rotated(5, 2, 0.4, 26), 0.9, width=1.25)),
    "factor": lambda: both(LinearGaussian(rotated(5, 3, 0.3, 27), 0.9, width=1.2, factor=0.4)),
    "two modes, four guides": lambda: both(TwoModes((0.6, 0.3, -0.5), 1.0)),
}
REVERSE = ("PPCA, 3 latents", "PPCA, 8 latents", "hierarchy", "gamma-Poisson", "beta-binomial")


def annealed(model: str, distributions: int, start: str, size: float) -> list[Check]:
    """Chains forward: E[w] = p(x), and what is said of log p(x)."""
    program, truth = MODELS[model]()
    count = max(4, round(REPLICATES[distributions] * size))
    seed = seed_of("annealing", model, distributions, start)
    x, y, exact = repeated(truth, DATA, count, seed)
    how: dict[str, Any] = {"num_distributions": distributions, "start": start, "seed": seed}
    result = annealed_log_likelihood(program, x, y, **how)
    variation = float(result.mc_se.square().mean()) * result.num_samples  # of w, in units of its mean, squared
    return [*estimates(result, exact, count), spread(math.sqrt(math.log1p(variation)))]


def spread(value: Any) -> Check:
    """The standard deviation of log w (of a lognormal w that varies as much); above 1 the cell's z would lean on few weights."""
    return within("sd of log w", float(value), 0.0, SPREAD, "nats")


def backward(model: str, distributions: int, start: str, size: float) -> list[Check]:
    """Chains back from exact draws of the posterior: E[1 / w] p(x) = 1, every replicate with an exact draw of its own.

    Chains of one replicate share that draw: their mean counts once.
    """
    program, truth = MODELS[model]()
    count = max(8, round({5: 400, 20: 150, 100: 40, 1000: 10}[distributions] * size))
    seed = seed_of("reverse", model, distributions, start)
    x, _, exact = repeated(truth, DATA, count, seed)
    drawn = truth.posterior_draw(x, seed)
    settings = Annealing(num_chains=4, num_distributions=distributions, start=start, seed=seed)  # type: ignore[arg-type]
    weights = run(program, x, None, settings, exact=drawn)
    if weights.reverse_log_weight is None:
        return [within("reverse chains ran", 0, 1, 1)]
    ratio = (exact.repeat(count) - weights.reverse_log_weight).logsumexp(0) - math.log(4)
    forward = (weights.log_weight - exact.repeat(count)).logsumexp(0) - math.log(4)
    checks = unbiased(ratio.reshape(count, DATA), "p(x) / v of chains back")
    checks.append(unbiased(forward.reshape(count, DATA), "w / p(x) of chains forward")[0])
    off = (weights.reverse_acceptance - weights.acceptance) if weights.reverse_acceptance is not None else None
    if off is not None:
        checks.append(shown("acceptance back - forward", float(off.mean())))
    return [*checks, spread(weights.reverse_log_weight.std(0).mean())]


def bounds(model: str, distributions: int, start: str, size: float) -> list[Check]:
    """Both bounds on simulated images: lower <= log p(x) <= upper in the mean, and both unbiased on their own scale."""
    program, truth = MODELS[model]()
    count = max(100, round((1000 if distributions == 1000 else 8000) * size))
    seed = seed_of("bounds", model, distributions, start)
    how: dict[str, Any] = {"num_distributions": distributions, "start": start, "seed": seed}
    found = bidirectional(program, count, event_shape=truth.event_shape, **how)
    exact = truth.log_px(found.x)
    gap = found.gap
    return [
        unbiased((found.lower - exact).reshape(-1, 1), "exp(lower) / p(x)")[0],
        unbiased((exact - found.upper).reshape(-1, 1), "p(x) / exp(upper)")[0],
        z_check("log p(x) - lower", exact - found.lower, "nats", high=math.inf),
        z_check("upper - log p(x)", found.upper - exact, "nats", high=math.inf),
        z_check("gap", gap, "nats", high=math.inf),
        shown("mean gap", float(gap.mean()), "nats"),
    ]


def wide(distributions: int, size: float) -> list[Check]:
    """A model whose data say much: the spread of log w is named, and the mean over images has to lie below log p(x)."""
    truth = LinearGaussian(rotated(12, 10, 0.8, 28), 0.6, guide="diagonal")
    count = max(4, round(8 * size))
    seed = seed_of("annealing, informative", distributions)
    x, _, exact = repeated(truth, DATA, count, seed)
    result = annealed_log_likelihood(truth, x, num_distributions=distributions, seed=seed)
    off = (result.log_likelihood - exact.repeat(count)).reshape(count, DATA)
    return [
        z_check("bound - log p(x)", off.mean(1), "nats", low=-math.inf),
        shown("mean of bound - log p(x)", float(off.mean()), "nats"),
        shown("sd of log w", float(result.mc_se.mean()) * math.sqrt(result.num_samples), "nats"),
    ]


def cells() -> list[Cell]:
    """Every cell of these instruments."""
    found = []
    for model in MODELS:
        for start in ("prior", "guide"):
            for length in LENGTHS:
                short = (model, start, length) in {
                    ("PPCA, 8 latents", "prior", 20),
                    ("PPCA, 3 latents", "guide", 5),
                    ("gamma-Poisson", "prior", 100),
                }
                name = f"{model}; from the {start}; {length:,} distributions"
                found.append(Cell("annealing", name, partial(annealed, model, length, start), short))
    for length in (100, 1000):
        found.append(
            Cell("annealing, informative data", f"PPCA, 10 latents; {length:,} distributions", partial(wide, length))
        )
    for model in REVERSE:
        for start in ("prior", "guide") if model in REVERSE[:2] else ("prior",):
            for length in LENGTHS:
                short = (model, start, length) in {("PPCA, 8 latents", "prior", 20), ("gamma-Poisson", "prior", 5)}
                name = f"{model}; from the {start}; {length:,} distributions"
                found.append(Cell("reverse chains", name, partial(backward, model, length, start), short))
    for model in ("PPCA, 3 latents", "PPCA, declared", "hierarchy", "gamma-Poisson", "beta-binomial"):
        for start, length in (("prior", 20), ("prior", 1000), ("guide", 20)):
            short = (model, start, length) == ("PPCA, 3 latents", "prior", 20)
            name = f"{model}; from the {start}; {length:,} distributions"
            found.append(Cell("bounds from both sides", name, partial(bounds, model, length, start), short))
    return found
