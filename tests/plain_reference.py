"""What is right for a program of :mod:`random_programs`: one row at a time, in float64, with torch alone."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from random_programs import DISCRETE, Declared, law
from torch import Tensor
from torch import distributions as td


@dataclass
class Row:
    """The terms of one row, ``(K,)`` each; ``score`` is log q of the sites without a path of gradients."""

    log_likelihood: Tensor
    log_prior: Tensor
    log_guide: Tensor
    score: Tensor
    observed: Tensor  # the part of the likelihood that is of x itself
    discrete: Tensor  # the part of log_guide that is of those sites: the score, but where they are masked
    auxiliary: Tensor  # log q of the guide's own site

    @property
    def log_weight(self) -> Tensor:
        return self.log_likelihood + self.log_prior - self.log_guide


class Plain:
    """The reference of one program; ``tensors`` are its parameters and buffers, in float64."""

    def __init__(self, declared: Declared, tensors: dict[str, Tensor]) -> None:
        self.declared, self.tensors = declared, tensors

    def prior(self, j: int, earlier: list[Tensor], y: float | None) -> Tensor:
        """The prior's real parameters of site j, ``(K, size)`` or ``(1, size)``."""
        return self._with(self.tensors[f"prior{j}"].reshape(1, -1), earlier, y)

    def guide(self, j: int, earlier: list[Tensor], x: Tensor, y: float | None) -> Tensor:
        return self._with(x.reshape(1, -1) @ self.tensors[f"encoder{j}"], earlier, y)

    def _with(self, a: Tensor, earlier: list[Tensor], y: float | None) -> Tensor:
        if self.declared.chained and earlier:
            a = a + 0.3 * earlier[-1].sum(1, keepdim=True)
        return a if y is None else a + 0.2 * y

    def loc(self, values: list[Tensor], y: float | None) -> Tensor:
        """The likelihood's real parameters ``(K, size)``."""
        found = self.tensors["bias"].reshape(1, -1)
        for j, value in enumerate(values):
            found = found + value @ self.tensors[f"decoder{j}"]
        return found if y is None else found + 0.2 * y

    def row(self, x: Tensor, y: float | None, draws: dict[str, Tensor]) -> Row:
        """The terms of one row x, given the guide's draws ``(K, *latent)`` of it."""
        d, twist = self.declared, self.declared.twist
        sites = [draws[f"z{j}"].double().reshape(len(draws[f"z{j}"]), -1) for j in range(len(d.sites))]
        kept = twist != "latent mask" or y is None or y > 0
        prior = guide = score = discrete = auxiliary = torch.zeros(1, dtype=torch.float64)
        for j, site in enumerate(d.sites):
            prior = prior + kept * density(site.prior, self.prior(j, sites[:j], y), sites[j])
            a = self.guide(j, sites[:j], x, y)
            if j == 0 and twist == "change of variables":
                own = draws["a"].double().reshape(len(sites[0]), -1)
                auxiliary = td.Normal(a, 1.0).log_prob(own).sum(1)
                q = auxiliary - site.size * math.log(2.0)
            elif j == 0 and twist == "point":
                q = torch.zeros(1, dtype=torch.float64)
            else:
                q = density(site.guide, a, sites[j])
            guide = guide + kept * q
            if site.guide in DISCRETE and not (j == 0 and twist == "point"):
                discrete = discrete + kept * q
                score = score + q  # what is drawn moves what comes after it, masked or not
        each = density(d.likelihood, self.loc(sites, y), x.reshape(1, -1), by_element=True)
        if twist == "element mask":
            each = each[:, torch.arange(d.size) % 2 == 0]
        observed = each.sum(1) * (twist != "row mask" or y is None or y > 0)
        total = sum((z.sum(1) for z in sites), torch.zeros(1, dtype=torch.float64))
        bonus = {"factor": -0.1 * total**2, "factor of x": -0.1 * (x.sum() - total) ** 2}.get(twist, 0.0)
        return Row(observed + bonus, prior, guide, score, observed, discrete, auxiliary)

    def log_likelihood(self, x: Tensor, y: float | None, draws: dict[str, Tensor]) -> float:
        """log (1/K) sum of w, or the sum over all states where every latent is discrete and has few."""
        if self.states is not None:
            terms = self.row(x, y, self.states)
            return float(torch.logsumexp(terms.log_likelihood + terms.log_prior, 0))
        weights = self.row(x, y, draws).log_weight
        if not self.declared.sites:
            return float(weights[0])
        return float(torch.logsumexp(weights, 0)) - math.log(len(weights))

    @property
    def states(self) -> dict[str, Tensor] | None:
        """Every joint value of the latents; None where one is not of few."""
        sites = self.declared.sites
        if not sites or any(s.prior not in ("bernoulli", "categorical") for s in sites):
            return None
        if any(s.guide not in ("bernoulli", "categorical") for s in sites):
            return None
        counts = [2 if s.prior == "bernoulli" else 3 for s in sites for _ in range(s.size)]
        every = torch.tensor(list(itertools.product(*(range(n) for n in counts))), dtype=torch.float64)
        parts = every.split([s.size for s in sites], 1)
        return {f"z{j}": part for j, part in enumerate(parts)}

    def encoded(self, x: Tensor, y: float | None) -> list[Tensor]:
        """The guide's mean of each site given those before, flat; of classes the most probable."""
        values: list[Tensor] = []
        for j, site in enumerate(self.declared.sites):
            a = self.guide(j, values, x, y)
            if j == 0 and self.declared.twist in ("point", "change of variables"):
                values.append(a * (2 if self.declared.twist != "point" else 1))
            elif site.guide == "categorical":
                values.append(law(site.guide, a, td).probs.argmax(-1).double())
            else:
                values.append(law(site.guide, a, td).mean)
        return [v[0] for v in values]


def density(family: str, a: Tensor, value: Tensor, by_element: bool = False) -> Tensor:
    """Log-density of values ``(K, size)`` summed over elements, -inf where the family cannot be."""
    fn = law(family, a, td)
    a, value = torch.broadcast_tensors(a, value)
    inside = fn.support.check(value)
    safe = torch.where(inside, value, torch.full_like(value, 0.0 if family in DISCRETE else 0.5))
    found = torch.where(inside, fn.log_prob(safe), torch.full_like(value, -math.inf))
    return found if by_element else found.sum(1)


def trained(
    declared: Declared, before: dict[str, Tensor], frozen: set[str], calls: list[Any], lr: float
) -> tuple[dict[str, Tensor], list[float]]:
    """Plain gradient descent on minus the mean ELBO of these calls: the parameters after it, and each step's loss."""
    values = {n: t.clone() for n, t in before.items()}
    losses = []
    for x, y, draws in calls:
        leaves = {n: t.clone().requires_grad_(n not in frozen) for n, t in values.items()}
        plain = Plain(declared, leaves)
        loss = surrogate = torch.zeros(1, dtype=torch.float64)
        for i in range(len(x)):
            row_y = None if y is None else float(y[i])
            drawn = {n: v[i : i + 1] for n, v in draws.items()}
            terms = plain.row(x[i].double(), row_y, along_paths(plain, x[i].double(), row_y, drawn))
            more = terms.observed * (declared.twist == "scale")
            elbo = terms.log_weight + more
            loss = loss - elbo.detach() / len(x)
            reward = (elbo + terms.auxiliary).detach()  # of a discrete draw, which comes after the auxiliary site
            objective = elbo + terms.discrete + terms.score * reward  # no path leads through discrete draws
            surrogate = surrogate - objective / len(x)
        grads = torch.autograd.grad(surrogate, [leaves[n] for n in leaves if n not in frozen], allow_unused=True)
        for n, g in zip([n for n in leaves if n not in frozen], grads, strict=True):
            values[n] = values[n] if g is None else values[n] - lr * g
        losses.append(float(loss))
    return values, losses


def along_paths(plain: Plain, x: Tensor, y: float | None, drawn: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same draws, as functions of the guide's parameters and of noise that has none."""
    values: list[Tensor] = []
    found: dict[str, Tensor] = {}
    for j, site in enumerate(plain.declared.sites):
        a, z = plain.guide(j, values, x, y), drawn[f"z{j}"].double().reshape(1, -1)
        if j == 0 and plain.declared.twist == "change of variables":
            found["a"] = a + (drawn["a"].double().reshape(1, -1) - a).detach()
            moved = 2 * found["a"]
        elif j == 0 and plain.declared.twist == "point":
            moved = a
        elif site.guide == "half":
            scale = law("half", a, td).scale
            moved = scale * (z / scale).detach()
        elif site.guide == "lognormal":
            moved = (a + (z.log() - a).detach()).exp()
        elif site.guide in ("normal", "student"):
            moved = a + (z - a).detach()
        else:
            moved = z
        values.append(moved)
        found[f"z{j}"] = moved
    return found
