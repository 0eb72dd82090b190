"""Cells of posterior draws: NUTS, HMC, resampling by smoothed weights, simulation-based calibration, and imputation."""

from __future__ import annotations

from functools import partial

import numpy as np
import scipy.stats
import torch
from arviz_stats.base import array_stats
from exact import Exact, Hierarchy, LinearGaussian, rotated
from exact_modes import TwoModes
from exact_others import BetaBinomial, GammaPoisson, HeavyTails, Mixture
from instruments_checks import Cell, Check, draws_check, p_check, shown, uniform, within, z_check
from instruments_weights import noises, seed_of
from torch import Tensor

import pyro_vae as pv
from pyro_vae.analysis.calibration import sbc
from pyro_vae.analysis.imputation import impute

SBC_LEVEL = 0.01  # at which a guide is rejected
RANKED = 99  # draws that a truth is ranked among

MODELS = {
    "PPCA": lambda width=1.0: LinearGaussian(rotated(6, 3, 0.7, 30), 0.7, width=width),
    "factor analysis": lambda width=1.0: LinearGaussian(rotated(6, 3, 0.7, 31), noises(6, 0.4, 1.5), width=width),
    "hierarchy": lambda width=1.0: Hierarchy(rotated(3, 2, 0.8, 32), rotated(6, 3, 0.5, 33), 0.8, 0.8, width=width),
    "gamma-Poisson": lambda width=1.0: GammaPoisson(spread=width**2),
    "beta-binomial": lambda width=1.0: BetaBinomial(spread=width**2),
    "Student t prior": lambda width=1.0: HeavyTails(width=width),
    "Student t likelihood": lambda width=1.0: HeavyTails(where="likelihood", width=width),
    "two modes, four guides": lambda width=1.0: TwoModes(width=width),
}


def _latents(tree: object, truth: Exact, x: Tensor) -> Tensor:
    """The exact distribution function at a tree's draws, ``(draws, N, D)``."""
    group = tree["posterior"].to_dataset()  # type: ignore[index]
    values = {
        str(n): torch.from_numpy(v.transpose("chain", "draw", "image", ...).values).flatten(0, 1)
        for n, v in group.data_vars.items()
    }
    return truth.pit(values, x)


def chains(model: str, kernel: str, size: float) -> list[Check]:
    """Markov chains at the defaults: the exact posterior's mean, spread and tails, ranks of exact draws, and the errors stated.

    The chains' starting points are learned from a guide a fifth too wide.
    """
    truth = MODELS[model](1.2)
    count, seed = max(20, round(200 * size)), seed_of("chains", model, kernel)
    exact, x = truth.joint(count, seed)
    tree = pv.posterior(truth, x, source=kernel, seed=seed, predictive="none", prior=False)
    pit = _latents(tree, truth, x)
    checks = draws_check(pit)
    # the place of the z that x was made from, among its chain's draws: uniform by itself, and independent over rows
    own = truth.pit({n: v.unsqueeze(0) for n, v in exact.items()}, x)[0]
    below = (pit < own).double().mean(0)
    for unit in range(below.shape[1]):
        checks.append(uniform(f"rank of the truth, unit {unit}", below[:, unit]))
    shape = (4, -1, *pit.shape[1:])
    z = scipy.stats.norm.ppf(pit.clamp(1e-9, 1 - 1e-9).numpy()).reshape(shape)
    ess = array_stats.ess(z, chain_axis=0, draw_axis=1, method="mean")
    error = z.std((0, 1)) / np.sqrt(ess)
    ratio = float(np.sqrt((z.mean((0, 1)) ** 2 / error**2).mean()))
    chance = 4 / np.sqrt(2 * error.size)  # of the root mean square; the effective size itself is known to about a tenth
    checks.append(within("z of means by the effective size, rms", ratio, 1 - chance - 0.1, 1 + chance + 0.1))
    checks.append(shown("effective size of 4,000", float(np.median(ess))))
    return checks


def resampled(model: str, size: float) -> list[Check]:
    """Draws of the guide resampled by smoothed weights: as NUTS's, but of finitely many weights."""
    truth = MODELS[model](1.25)
    count, seed = max(40, round(1000 * size)), seed_of("psis", model)
    x = truth.draw(count, seed)
    tree = pv.posterior(truth, x, source="psis", seed=seed, predictive="none", prior=False)
    return draws_check(_latents(tree, truth, x))


def level(model: str, size: float) -> list[Check]:
    """Calibration of an exact guide, many times: p-values are uniform, and of the stated level few are rejected.

    Repetitions differ in all that is drawn. The p-values of both tests come from whole numbers: their law is uniform up to a
    share of their own number, which the Kolmogorov-Smirnov statistic of a few hundred does not see.
    """
    truth = Mixture(temper=1.0) if model == "mixture" else MODELS[model]()
    repetitions = max(60, round(1000 * size))
    found = [
        sbc(truth, 200, RANKED, event_shape=truth.event_shape, seed=seed_of("sbc", model, i))
        for i in range(repetitions)
    ]
    ecdf = np.array([f.p_value.values[0] for f in found])
    family = np.array([f.family_p_value for f in found])
    rejected = [int((family <= at).sum()) for at in (SBC_LEVEL, 0.1)]
    return [
        uniform("p-values by the ECDF, of one unit", ecdf),
        p_check("too many rejected at 1 %", scipy.stats.binom.sf(rejected[0] - 1, repetitions, SBC_LEVEL)),
        p_check("too many rejected at 10 %", scipy.stats.binom.sf(rejected[1] - 1, repetitions, 0.1)),
        shown("rejected at 10 %", rejected[1] / repetitions),
    ]


def power(model: str, width: float, size: float) -> list[Check]:
    """Calibration of a guide of the wrong scale: found in every one of the repetitions."""
    truth = MODELS[model](width)
    repetitions = max(5, round(30 * size))
    missed = 0
    for index in range(repetitions):
        seed = seed_of("sbc power", model, width, index)
        missed += sbc(truth, 1000, RANKED, event_shape=truth.event_shape, seed=seed).passes(SBC_LEVEL)
    return [within("missed", missed / repetitions, 0.0, 0.0, "of scale", abs(width - 1))]


def imputed(model: str, size: float) -> list[Check]:
    """Missing elements: the conditional mean against the exact one, its stated error, and the law of the filled ones."""
    truth = MODELS[model](1.25)
    count, seed = max(100, round(3000 * size)), seed_of("impute", model)
    x = truth.draw(count, seed)
    random = np.random.default_rng(seed)
    seen = torch.from_numpy(random.uniform(size=(count, *truth.event_shape)) < 0.6)
    found = impute(truth, x, seen, seed=seed)
    mean, cdf = _missing(truth, x, seen)
    hidden = ~seen
    off, error = (found.mean.double() - mean), found.mc_se.double()
    z = (off / error.clamp(min=1e-9))[hidden]
    # of 16 chains: Student's t with 15 degrees of freedom
    p = scipy.stats.t.cdf(z.numpy(), 15)
    per_row = torch.where(hidden, off, torch.zeros_like(off)).flatten(1).sum(1)
    checks = [
        z_check("mean - exact", per_row, "of x, summed over a row"),
        z_check(
            "stated errors: |t| - its mean", (2 * np.abs(p - 0.5) - 0.5).reshape(-1), "of the distribution function"
        ),
        within("95 % intervals that hold the exact mean", float((abs(p - 0.5) < 0.475).mean()), 0.92, 0.98),
    ]
    if cdf is not None:
        place = cdf(found.draws.double())
        per_chain = torch.where(hidden, place - 0.5, torch.zeros_like(place)).flatten(2).sum(2).mean(0)
        spread = torch.where(hidden, (place - 0.5).square() - 1 / 12, torch.zeros_like(place)).flatten(2).sum(2).mean(0)
        checks += [z_check("place of the draws", per_chain, "of the distribution function, summed over a row")]
        checks += [z_check("spread of the draws", spread, "of its square, summed over a row")]
        held = (cdf(x.double().unsqueeze(0))[0] - 0.5).abs()[hidden] < 0.475
        checks.append(shown("95 % intervals that hold the true element", float(held.double().mean())))
    return [*checks, shown("acceptance", float(found.acceptance.mean()))]


def _missing(truth: Exact, x: Tensor, seen: Tensor) -> tuple[Tensor, object]:
    """Exact E[x | x_seen] ``(N, *event)``, and the distribution function of each element given what was seen."""
    if isinstance(truth, LinearGaussian):
        w = truth.weight.detach().double()
        bias, covariance = truth.bias.detach().double(), w @ w.T + truth.variance.diag()
    elif isinstance(truth, Hierarchy):
        b = truth.lower.detach().double()
        covariance = b @ truth.marginal @ b.T + truth.noise**2 * torch.eye(len(b), dtype=torch.float64)
        bias = torch.zeros(len(b), dtype=torch.float64)
    else:  # binomial: every element has a latent of its own, and what is missing knows its prior alone
        assert isinstance(truth, BetaBinomial)
        expected = truth.trials * truth.a / (truth.a + truth.b)
        return torch.where(seen, x.double(), torch.full_like(x, expected, dtype=torch.float64)), None
    mean, variance = x.double().clone(), torch.ones_like(x, dtype=torch.float64)
    for row in range(len(x)):
        a, b = seen[row], ~seen[row]
        gain = torch.linalg.solve(covariance[a][:, a], covariance[a][:, b]).T
        mean[row, b] = bias[b] + gain @ (x[row, a].double() - bias[a])
        variance[row, b] = (covariance[b][:, b] - gain @ covariance[a][:, b]).diagonal()
    return mean, lambda value: torch.special.ndtr((value - mean) / variance.sqrt())


def cells() -> list[Cell]:
    """Every cell of these instruments."""
    found = []
    for kernel, names in (("nuts", list(MODELS)), ("hmc", list(MODELS)[:1] + list(MODELS)[2:6])):
        for model in names:
            short = (model, kernel) in {("gamma-Poisson", "nuts"), ("PPCA", "hmc")}
            found.append(Cell(kernel.upper(), model, partial(chains, model, kernel), short))
    for model in ("PPCA", "hierarchy", "gamma-Poisson", "beta-binomial", "Student t prior"):
        found.append(Cell("PSIS resampling", model, partial(resampled, model), model == "PPCA"))
    for model in ("PPCA", "hierarchy", "gamma-Poisson", "beta-binomial", "mixture"):
        found.append(Cell("SBC", f"{model}; an exact guide", partial(level, model), model == "PPCA"))
    for model, width in (("PPCA", 0.8), ("PPCA", 1.25), ("gamma-Poisson", 1.25), ("hierarchy", 0.8)):
        run = partial(power, model, width)
        found.append(Cell("SBC", f"{model}; a guide {width} times as wide", run, (model, width) == ("PPCA", 0.8)))
    for model in ("PPCA", "factor analysis", "hierarchy", "beta-binomial"):
        found.append(Cell("imputation", model, partial(imputed, model), model == "factor analysis"))
    return found
