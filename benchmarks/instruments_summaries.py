"""Cells of what is said about a program: inference gaps, information, active units, comparisons, anomalies."""

from __future__ import annotations

import math
import warnings
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from exact import Hierarchy, LinearGaussian, MissingElements, declared, rotated
from exact_others import GammaPoisson
from instruments_checks import Z_LIMIT, Cell, Check, shown, uniform, within, z_check
from instruments_weights import seed_of
from torch import Tensor

import pyro_vae as pv
from pyro_vae.analysis.anomaly import auroc, detect
from pyro_vae.evaluation.compare import compare
from pyro_vae.evaluation.gaps import inference_gaps
from pyro_vae.evaluation.result import LogLikelihood, UnreliableEstimateWarning
from pyro_vae.programs.vae import VAE

ASCENT = 0.01  # nats that the ascent to the best member of a family may fall short of it


class MaskedRows(VAE):
    """A declared program of which every second row's x is masked: there log p(x) = 0, and the best guide is the prior."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", self.prior(x, self.q))
            with pyro.poutine.mask(mask=self.seen(x)):
                pyro.sample("x", self.likelihood(self.decoder(z)), obs=x)

    @staticmethod
    def seen(x: Tensor) -> Tensor:
        """Which rows count."""
        return torch.arange(len(x)) % 2 == 0


def masked_gaps(size: float) -> list[Check]:
    """The ELBOs of a declared program with masked rows, that of the best member never above log p(x)."""
    program, truth = declared(rotated(6, 3, 0.6, 40), 0.7, "linear", width=1.4)
    program.__class__ = MaskedRows
    x = truth.draw(100, seed_of("gaps, masked rows"))
    seen = MaskedRows.seen(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)
        found = inference_gaps(program, x, seed=1)
    exact = torch.where(seen, truth.log_px(x), torch.zeros(100, dtype=torch.float64))
    optimal = torch.where(seen, exact - truth.diagonal_gap, exact)
    tril = truth.tril.double()
    loc = (x.double() - truth.bias.detach().double()) @ truth.gain.double().T
    kl = 0.5 * (loc.square().sum(1) + (tril @ tril.T).trace() - 3 - 2 * tril.diagonal().log().sum())
    elbo = torch.where(seen, truth.elbo(x), -kl)
    checks = []
    for name, values, want, error, low in (
        ("ELBO of the best member", found.elbo_optimal, optimal, found.elbo_optimal_se, 0.05),
        ("ELBO of the guide", found.elbo, elbo, found.elbo_se, 0.0),
    ):
        room = Z_LIMIT * float(error.square().sum().sqrt()) / 100 + 1e-4
        checks.append(within(f"{name} - exact", float((values - want).mean()), -room - low, room, "nats", room))
    return checks


def gaps(kind: str, size: float) -> list[Check]:
    """The ELBO of the best member of the family, and both gaps, against closed forms."""
    weight, count = rotated(6, 3, 0.6, 40), max(30, round(100 * size))
    seed = seed_of("gaps", kind)
    y = None
    if kind == "by hand, diagonal":
        truth: LinearGaussian = LinearGaussian(weight, 0.7, guide="diagonal", width=1.3, shift=0.3)
        program, best = truth, truth.diagonal_gap
    elif kind == "by hand, factor":
        truth = LinearGaussian(weight, 0.7, guide="diagonal", width=1.3, factor=0.5)
        program, best = truth, truth.diagonal_gap
    elif kind == "by hand, masked elements":
        truth = MissingElements(weight, 0.7, width=1.3)
        program, best, y = truth, math.nan, truth.labels(count)
    else:
        guide = {"declared, diagonal": "linear", "declared, full-rank": "linear-full-rank"}[kind]
        program, truth = declared(weight, 0.7, guide, width=1.4)
        best = truth.diagonal_gap if guide == "linear" else 0.0
    x = truth.draw(count, seed)
    found = inference_gaps(program, x, y, seed=seed)
    if y is None:
        exact, elbo = truth.log_px(x), truth.elbo(x)
        optimal = exact - best
    else:
        exact = truth.log_px(x, y)
        optimal, elbo = _masked_elbos(truth, y, exact)
    checks = []
    for name, seen, want, error, low in (
        ("ELBO of the best member", found.elbo_optimal, optimal, found.elbo_optimal_se, ASCENT),
        ("ELBO of the guide", found.elbo, elbo, found.elbo_se, 0.0),
        ("approximation", found.approximation, exact - optimal, found.elbo_optimal_se, ASCENT),
        ("amortization", found.amortization, optimal - elbo, found.elbo_optimal_se + found.elbo_se, ASCENT),
    ):
        if name == "approximation":
            error = (found.elbo_optimal_se.square() + found.log_likelihood_se.square()).sqrt()
        room = Z_LIMIT * float(error.square().sum().sqrt()) / count + 1e-4
        off = float((seen - want).mean())
        checks.append(within(f"{name} - exact", off, -room - low, room + low, "nats", room + low))
    return checks


def _masked_elbos(truth: MissingElements, y: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """The best diagonal normal's ELBO, and the guide's (the exact posterior ``width`` times as wide), row by row."""
    w, d = truth.weight.detach().double(), truth.latent_dim
    gain = w / truth.variance[:, None]
    precision = torch.eye(d, dtype=torch.float64) + torch.einsum("nd,di,dj->nij", y.double(), gain, w)
    diagonal = precision.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    optimal = exact - 0.5 * (diagonal - torch.logdet(precision))
    return optimal, exact - d * (0.5 * (truth.width**2 - 1) - math.log(truth.width))


def information(kind: str, size: float) -> list[Check]:
    """Rate, distortion and the bounds of I(x; z), over many data sets, against closed forms."""
    if kind == "hierarchy":
        truth: Any = Hierarchy(rotated(3, 2, 0.8, 41), rotated(6, 3, 0.4, 42), 0.8, 0.9)
        # an exact guide: the marginal of (u, z) is the prior, and x tells of u only through z
        bound = 0.5 * float(torch.logdet(truth.marginal) - torch.logdet(truth.cov_z))
        program, rate = truth, bound
    else:
        width = {"exact guide": 1.0, "wide guide": 1.4, "diagonal guide": 1.0, "declared": 1.0}[kind]
        weight = rotated(6, 3, 0.35, 43)
        guide = "diagonal" if kind == "diagonal guide" else "full"
        truth = LinearGaussian(weight, 0.8, guide=guide, width=width)
        program = declared(weight, 0.8)[0] if kind == "declared" else truth
        w, tril = truth.weight.detach().double(), truth.tril.double()
        means = truth.gain.double() @ (w @ w.T + truth.variance.diag()) @ truth.gain.double().T
        noise = tril @ tril.T
        bound = 0.5 * float(torch.logdet(means + noise) - torch.logdet(noise))
        rate = 0.5 * float((means + noise).trace() - 3 - torch.logdet(noise))
    sets, count = max(8, round(300 * size)), 250
    found, spent = [], []
    for index in range(sets):
        seed = seed_of("information", kind, index)
        x = truth.draw(count, seed)
        found.append(pv.latent_information(program, x, seed=seed))
        spent.append(_distortion(truth, x, rate))
    lower, upper = (torch.tensor([getattr(f, n) for f in found]) for n in ("information_lower", "information_upper"))
    rates, distortions = (torch.tensor([getattr(f, n) for f in found]) for n in ("rate", "distortion"))
    stated = {n: math.sqrt(sum(getattr(f, f"{n}_se") ** 2 for f in found) / sets) for n in ("rate", "distortion")}
    checks = [
        z_check("I(x; z) - lower bound", bound - lower, "nats", high=math.inf),
        z_check("upper bound - I(x; z)", upper - bound, "nats", high=math.inf),
        z_check("rate - exact", rates - rate, "nats"),
        shown("mean gap of the bounds", float((upper - lower).mean()), "nats"),
    ]
    if spent[0] is not None:
        checks.append(z_check("distortion - exact", distortions - torch.stack(spent), "nats"))
    for name, values in (("rate", rates), ("distortion", distortions)):
        room = Z_LIMIT / math.sqrt(2 * sets)
        checks.append(
            within(f"spread / stated error of the {name}", float(values.std()) / stated[name], 1 - room, 1 + room)
        )
    return checks


def _distortion(truth: Any, x: Tensor, rate: float) -> Tensor | None:
    """The exact -E_q log p(x | z) of these data, where the ELBO and each row's KL(q || p(z)) are known."""
    if not isinstance(truth, LinearGaussian):
        return None
    tril = truth.tril.double()
    loc = (x.double() - truth.bias.detach().double()) @ truth.gain.double().T
    kl = loc.square().sum(1) + (tril @ tril.T).trace() - truth.latent_dim - 2 * tril.diagonal().log().sum()
    return -(truth.elbo(x) + 0.5 * kl).mean()


def active(kind: str, size: float) -> list[Check]:
    """The number of units whose posterior mean varies, where it is known."""
    weight = rotated(6, 4, 0.6, 44)
    weight[:, 2:] = 0  # two units that x says nothing of
    seed = seed_of("active", kind)
    count = max(200, round(500 * size))
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    if kind == "by hand":
        program: Any = LinearGaussian(weight, 0.7)
        expected = 2
        x = program.draw(count, seed)
    elif kind == "declared":
        program, truth = declared(weight, 0.7)
        expected = 2
        x = truth.draw(count, seed)
    else:  # a flow on features that do not depend on x: its means are the same for all
        program = pv.build("ppca", kind, (6,), latent_dim=4, encoder="linear", seed=0)
        expected = 0
        x = torch.ones(count, 6) * 0.3
    found = pv.latent_information(program, x, seed=seed)
    largest = float(found.mean_variance.sort(descending=True).values[expected])
    return [
        within(f"active units - {expected}", found.num_active - expected, 0, 0, "units", 1),
        shown("largest variance of an inactive unit's mean", largest),
    ]


def _rows(result: LogLikelihood, first: int, count: int) -> LogLikelihood:
    """Some rows of a result."""
    part: dict[str, Any] = {}
    for f in fields(result):
        value = getattr(result, f.name)
        if isinstance(value, Tensor) and len(value) == len(result):
            part[f.name] = value[first : first + count]
    return replace(result, **part)


def compared(kind: str, size: float) -> list[Check]:
    """The paired difference of two programs on many small data sets: its interval, and its p-value where they are equal."""
    weight, images = rotated(6, 3, 0.6, 45), 40
    sets = max(100, round(2000 * size))
    turn, _ = torch.linalg.qr(rotated(3, 3, 1.0, 46))
    a = LinearGaussian(weight, 0.8, width=1.3)
    other = {"equal": (weight @ turn, 0.8), "another noise": (weight, 0.9), "another weight": (0.9 * weight, 0.8)}[kind]
    b = LinearGaussian(*other, width=1.3)
    x = a.draw(sets * images, seed_of("compare", kind))
    seeds = (seed_of("compare a", kind), seed_of("compare b", kind))
    found = [pv.log_likelihood(p, x, num_samples=100, seed=s) for p, s in zip((a, b), seeds, strict=True)]
    pairs = [compare(*(_rows(r, i * images, images) for r in found)) for i in range(sets)]
    truth = _divergence(a, b)
    held = np.mean([low <= truth <= high for low, high in (c.interval for c in pairs)])
    half = Z_LIMIT * math.sqrt(0.05 * 0.95 / sets)
    checks = [
        z_check("mean difference - exact", torch.tensor([c.mean for c in pairs]) - truth, "nats"),
        Check(
            f"coverage of {sets:,} intervals", "coverage", float(held), 0.95 - half, 0.95 + half, half, "of intervals"
        ),
    ]
    if kind == "equal":
        checks.append(uniform("p-values", [c.p_value for c in pairs]))
        z = np.array([c.mean / c.mc_se for c in pairs])
        room = Z_LIMIT / math.sqrt(2 * sets)
        checks.append(within("spread / stated Monte Carlo error", float(z.std()), 1 - room, 1 + room))
    return checks


def _divergence(a: LinearGaussian, b: LinearGaussian) -> float:
    """KL(p_a || p_b) of the two normals of x: the mean of log p_a(x) - log p_b(x) over data from a."""
    (ca, ma), (cb, mb) = (
        (m.weight.detach().double() @ m.weight.detach().double().T + m.variance.diag(), m.bias.detach().double())
        for m in (a, b)
    )
    normal = torch.distributions.MultivariateNormal
    return float(torch.distributions.kl_divergence(normal(ma, ca), normal(mb, cb)))


def anomalies(kind: str, size: float) -> list[Check]:
    """AUROC against itself, 1/2; and against other data, that of the exact log p(x) over a million draws."""
    truth: Any = (
        GammaPoisson() if kind == "gamma-Poisson, itself" else LinearGaussian(rotated(6, 3, 0.6, 47), 0.8, width=1.2)
    )
    count, sets = 200, max(10, round(60 * size))
    areas: dict[str, list[float]] = {"nll": [], "typicality": []}
    errors, places = [], []

    def other(num: int, seed: int) -> Tensor:
        drawn: Tensor = truth.draw(num, seed)
        if "itself" in kind:
            return drawn
        return drawn + 1.0 if kind == "shifted" else truth.bias.detach() + 1.4 * (drawn - truth.bias.detach())

    for index in range(sets):
        data = [truth.draw(count, seed_of("anomaly", kind, part, index)) for part in range(2)]
        found = detect(truth, *data, other(count, seed_of("anomaly, other", kind, index)), seed=index)
        for name, values in areas.items():
            values.append(found.auroc[name])
        errors.append(found.auroc_se["nll"])
        places += found.normal_p["nll"][:1].tolist()  # one of each: the others share its reference
    want = 0.5
    if "itself" not in kind:
        many = 200_000
        one, two = truth.log_px(truth.draw(many, 1)), truth.log_px(other(many, 2))
        want = auroc(-one.numpy(), -two.numpy())[0]
    room = Z_LIMIT / math.sqrt(2 * sets)
    spread = float(np.std(areas["nll"], ddof=1)) / math.sqrt(float(np.mean(np.square(errors))))
    checks = [
        z_check(f"AUROC of nll - {want:.3f}", torch.tensor(areas["nll"]) - want, "of AUROC"),
        within("spread / stated error", spread, 1 - room, 1 + room),
        uniform("p-values of normal images", np.array(places) - np.linspace(0, 1, len(places)) / (count + 1)),
    ]
    if "itself" in kind:
        checks.append(z_check("AUROC of typicality - 0.5", torch.tensor(areas["typicality"]) - 0.5, "of AUROC"))
    return checks


def cells() -> list[Cell]:
    """Every cell of these instruments."""
    found = []
    for kind in (
        "by hand, diagonal",
        "by hand, factor",
        "by hand, masked elements",
        "declared, diagonal",
        "declared, full-rank",
    ):
        found.append(Cell("inference gaps", kind, partial(gaps, kind), kind == "by hand, diagonal"))
    found.append(Cell("inference gaps", "declared, masked rows", masked_gaps))
    for kind in ("exact guide", "wide guide", "diagonal guide", "declared", "hierarchy"):
        found.append(Cell("information", kind, partial(information, kind), kind == "wide guide"))
    for kind in ("by hand", "declared", "coupling", "spline", "autoregressive"):
        found.append(Cell("active units", kind, partial(active, kind), kind == "by hand"))
    for kind in ("equal", "another noise", "another weight"):
        found.append(Cell("compare", kind, partial(compared, kind), kind == "equal"))
    for kind in ("PPCA, itself", "gamma-Poisson, itself", "shifted", "wider"):
        found.append(Cell("anomaly", kind, partial(anomalies, kind), kind == "PPCA, itself"))
    return found
