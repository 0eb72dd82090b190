"""Rows drawn from the model, with the latents that they were drawn from, weighed beside draws of the guide."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.errors import said
from pyro_vae.evaluation.estimators import good_khat, pareto_khat
from pyro_vae.evaluation.places import features, p_values, usable
from pyro_vae.precision import wide
from pyro_vae.programs.dreams import dream
from pyro_vae.programs.masks import counted
from pyro_vae.programs.trace import Program, is_random, latent_sites, run, site_log_prob

DOMINATED = 0.95  # of the weight
SAME = 1e-3  # nats, and relative, by which a density may differ between two runs: they round in different ways


class NotSimulated(Exception):
    """Why exact draws cannot be had, or not be weighed."""


@dataclass(frozen=True)
class Simulated:
    """A block of drawn rows; of each the exact draw first, and then K of the guide.

    Attributes:
        x: the rows; ``y`` goes with them.
        exact: the draws that they were made from, ``(rows, *latent)`` by site.
        log_weight: ``(K + 1, rows)``; +inf for an exact draw that has no density under the guide.
        names, values: of the functions that the weights are tested by, ``(K + 1, rows, functions)``.
    """

    x: Tensor
    y: Tensor | None
    exact: dict[str, Tensor]
    log_weight: Tensor
    names: list[str]
    values: Tensor


def simulated(program: Program, x: Tensor, y: Tensor | None, num_samples: int) -> Simulated:
    """Draw rows from the model and weigh them; inside of ``isolated``, with torch's generators.

    Args:
        program: the Program.
        x: rows of data ``(rows, *event)``, whose missing entries are missing in what is drawn.
        y: what a conditional program is conditioned on.
        num_samples: K.

    Raises:
        NotSimulated: with the reason.
    """
    exact, drawn = _draw(program, x, y)
    log_guide, terms, theirs, model = _terms(program, exact, drawn, y, num_samples)
    densities = {f"log q({n})": v for n, v in log_guide.items()} | {f"log p({n})": v for n, v in terms.items()}
    log_weight = _log_weight(log_guide, terms)
    latents = {n: _elements(model.nodes[n], v) for n, v in theirs.items()}
    return Simulated(
        drawn, y, exact, log_weight, *features(log_weight, {n: wide(v) for n, v in densities.items()}, latents)
    )


def weighed_again(program: Program, rows: Simulated, places: Tensor, num_samples: int) -> Tensor:
    """Log-weights ``(K + 1, places)`` of some rows once more, with other draws of the guide; inside of ``isolated``."""
    exact = {n: v[places] for n, v in rows.exact.items()}
    y = None if rows.y is None else rows.y[places]
    return _log_weight(*_terms(program, exact, rows.x[places], y, num_samples)[:2])


def _terms(
    program: Program, exact: dict[str, Tensor], x: Tensor, y: Tensor | None, num_samples: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], Any]:
    """Log-densities of the guide's and the model's sites ``(K + 1, rows)``, the latents, and the model's run on them."""
    guide = run(program.guide, x, y, num_samples=num_samples)
    ours = latent_sites(guide)
    if extra := [name for name in ours if name not in exact]:
        raise NotSimulated(f"the guide makes its draws of {extra[0]!r}, and cannot score others")
    at = {n: v.unsqueeze(0).to(ours[n]["value"].dtype) for n, v in exact.items()}
    try:
        star = run(program.guide, x, y, num_samples=1, at=at)
        log_guide = {
            n: torch.cat([_scored(star.nodes[n], len(x)), _by_row(s, num_samples, len(x))]) for n, s in ours.items()
        }
    except (NotImplementedError, RuntimeError, ValueError, IndexError, KeyError) as error:
        raise NotSimulated(f"the guide cannot score other draws than its own: {said(error, 60)}") from error
    theirs = {
        n: torch.cat([v.unsqueeze(0), ours[n]["value"].to(v.dtype).expand(num_samples, *v.shape)])
        for n, v in exact.items()
    }
    model = run(program.model, x, y, num_samples=num_samples + 1, at=theirs)
    terms = {n: _by_row(s, num_samples + 1, len(x)) for n, s in model.nodes.items() if is_random(s)}
    return log_guide, terms, theirs, model


def _log_weight(log_guide: dict[str, Tensor], terms: dict[str, Tensor]) -> Tensor:
    log_p, log_q = (wide(torch.stack([*parts.values()])).sum(0) for parts in (terms, log_guide))
    log_weight = log_p - log_q
    log_weight[0] = torch.where(torch.isneginf(log_q[0]) & torch.isfinite(log_p[0]), torch.inf, log_weight[0])
    return log_weight


def _draw(program: Program, x: Tensor, y: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
    """Latents and data from the model; and whether the model, run again on them, says the density that they were drawn from."""
    first, name, latents, drawn = dream(program, x, y)
    again = run(program.model, drawn, y, at=latents)
    if moved := [n for n in latents if not _same(first.nodes[n], again.nodes[n])]:
        # a reverse model r(a | z, x) of the guide's auxiliary sites, which nothing else depends on: drawn when x is known
        latents |= {n: again.nodes[n]["fn"].sample().expand(latents[n].shape) for n in moved}
        again = run(program.model, drawn, y, at=latents)
    for n in (*latents, name):
        if n not in moved and not _same(first.nodes[n], again.nodes[n]):
            raise NotSimulated(f"the model's site {n!r} has another density when it is run on its own draws")
    return latents, drawn


def _same(first: Any, again: Any) -> bool:
    """Whether a site has in two runs the same density, at the value of the second."""
    a, b = (wide(site_log_prob(site, again["value"], mask=False)) for site in (first, again))
    known = torch.isfinite(b)
    return bool(((a - b).abs() <= SAME * (1 + b.abs()))[known].all())


def _by_row(site: Any, samples: int, rows: int) -> Tensor:
    return site_log_prob(site).expand(samples, rows)


def _scored(site: Any, rows: int) -> Tensor:
    """The log-density of a site of the guide at a value that it did not draw; -inf where it cannot be there."""
    found = _by_row(site, 1, rows)
    try:
        inside = site["fn"].support.check(site["value"])
    except (NotImplementedError, RuntimeError, ValueError):
        inside = torch.ones_like(found, dtype=torch.bool)
    inside = (
        inside.reshape(*inside.shape[:2], -1).all(-1).expand(1, rows) if inside.dim() > 1 else inside.expand(1, rows)
    )
    if (mask := counted(site)) is not None:  # what is masked may be anywhere
        kept = mask.to(inside.device).expand(1, rows, *site["fn"].event_shape)
        inside = inside | ~kept.reshape(1, rows, -1).all(-1)
    return torch.where(inside.to(found.device) & ~found.isnan(), found, -torch.inf)


def _elements(site: Any, value: Tensor) -> Tensor:
    """Values by element ``(K + 1, rows, elements)``, in float64, 0 where a mask leaves them out."""
    if (mask := counted(site)) is not None:
        value = torch.where(mask.to(value.device), value, torch.zeros_like(value))
    return wide(value.reshape(*value.shape[:2], -1))


class DrawnRows:
    """Blocks of drawn rows: which of them are blind, their figures, and the test of their weights."""

    def __init__(self, blocks: Iterator[Simulated]) -> None:
        self.blocks = list(blocks)
        weights = [block.log_weight for block in self.blocks]
        self.figures = torch.cat([figures_of(w[1:]) for w in weights], 1)
        log_weight = torch.cat(weights, 1)
        self.rows = log_weight.shape[1]
        self.blind_rows = [blind(w).nonzero()[:, 0] for w in weights]
        self.blind = sum(len(rows) for rows in self.blind_rows)
        upper = log_weight.logsumexp(0) - math.log(len(log_weight))
        self.looseness = float((upper.cpu() - self.figures[0]).mean())

    def functions(self) -> tuple[list[str], Tensor, Tensor, int]:
        """Names, p-values and variances of the functions, and of how many rows."""
        log_weight, values = (
            torch.cat([getattr(b, name) for b in self.blocks], 1) for name in ("log_weight", "values")
        )
        rows = usable(log_weight)
        return self.blocks[0].names, *p_values(log_weight[:, rows], values[:, rows]), int(rows.sum())


def blind(log_weight: Tensor) -> Tensor:
    """Which rows ``(rows,)`` are blind: the exact draw, the first, outweighs the others by far, and their k is good or none."""
    found = torch.isposinf(log_weight[0]) | (log_weight.softmax(0)[0].nan_to_num(0.0) > DOMINATED)
    far = found.nonzero()[:, 0]
    khat = pareto_khat(log_weight[1:, far])
    silent = khat.isnan() | (khat <= good_khat(len(log_weight) - 1))
    found[far] = silent.to(found.device)
    return found


def figures_of(log_weight: Tensor) -> Tensor:
    """L, the effective sample size and the largest share of log-weights ``(K, rows)``, as ``(3, rows)``."""
    log_weight = log_weight.detach().cpu().double()
    weight = log_weight.softmax(0).nan_to_num(0.0)
    bound = log_weight.logsumexp(0) - math.log(len(log_weight))
    return torch.stack([bound, 1 / weight.square().sum(0), weight.amax(0)]).nan_to_num(0.0)
