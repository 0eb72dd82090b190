"""What is asked of every row of data, without a number: masks, supports, points and changes of variables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_vae.programs.auxiliary import check_auxiliary, free_values, is_delta, log_det
from pyro_vae.programs.masks import counted
from pyro_vae.programs.supports import describe, is_discrete, narrower
from pyro_vae.programs.trace import Program, Traces, isolated, latent_sites, run, sum_log_prob, trace
from pyro_vae.programs.walk import Block, Walk, at_once
from pyro_vae.seeding import derive_seed, seeded

DRAWS = 4  # of each row
FOLDED = 10  # elements of a change of variables
NARROWED = 0.7  # standard deviations of g, so that g / q is small where q is
MOST = 64  # rows whose draws are the same that are asked again, for as many draws


@dataclass
class EveryRow:
    """Lines on what was found, by question; none where nothing was."""

    masks: list[str] = field(default_factory=list)
    supports: list[str] = field(default_factory=list)
    points: list[str] = field(default_factory=list)


def look_at_every_row(program: Program, x: Tensor, y: Tensor | None, seed: int) -> EveryRow:
    """Look at all rows of x ``(N, *event)``.

    Raises:
        ProgramError: a change of variables with another Jacobian than is said.
    """
    found = EveryRow()
    walk = Walk(program, x, y, rows=at_once("importance weights", DRAWS * x[0].numel()))
    for block in walk:
        with block, isolated(), seeded(derive_seed("proof: every row", seed, block.first), block.x.device):
            traces = trace(program, block.x, block.y, num_samples=DRAWS)
            if set(latent_sites(traces.guide)) - set(latent_sites(traces.model)):
                check_auxiliary(program, traces, block.x, block.y)
            found.masks = found.masks or _other_masks(traces)
            found.supports = found.supports or narrow_sites(traces)
            _points(found, program, block, traces)
    return found


def look_for_points(program: Program, x: Tensor, y: Tensor | None) -> list[str]:
    """A line for each latent whose draws are one number in some of these rows, whose weights are all equal."""
    found = EveryRow()
    walk = Walk(program, x, y, rows=at_once("importance weights", DRAWS * x[0].numel()))
    for block in walk:
        with block, isolated(), seeded(derive_seed("proof: equal weights", block.first), block.x.device):
            _points(found, program, block, trace(program, block.x, block.y, num_samples=DRAWS))
    return found.points


def pairs(traces: Traces) -> dict[str, tuple[Any, Any]]:
    """The sites of guide and model, by name, but for those that are a change of variables."""
    guide = latent_sites(traces.guide)
    return {n: (guide[n], s) for n, s in latent_sites(traces.model).items() if n in guide and not is_delta(guide[n])}


def narrow_sites(traces: Traces) -> list[str]:
    """A line for each latent whose guide, as its structure says, cannot be where the model can."""
    found = []
    for name, (ours, theirs) in pairs(traces).items():
        beyond, mask = narrower(ours["fn"], theirs["fn"]), counted(theirs)
        if beyond is None or not bool(beyond.any()) or (mask is not None and not bool(mask.any())):
            continue
        found.append(
            f"the guide's site {name!r} lives on {describe(ours['fn'])}, and the model's on {describe(theirs['fn'])}: log p(x) "
            "leaves out what lies beyond, however many draws there are, and neither Pareto k nor the standard error tells; give "
            "the guide the model's support"
        )
    return found


def _other_masks(traces: Traces) -> list[str]:
    found = []
    for name, sites in pairs(traces).items():
        ours, theirs = (
            torch.ones((), dtype=torch.bool) if m is None else m.cpu() for m in (counted(site) for site in sites)
        )
        if bool((ours != theirs).any()):
            where = "the guide" if not bool(ours.all()) else "the model"
            found.append(
                f"the site {name!r} is masked in {where} where it is not in the other: its density counts on one side alone, and "
                "the ratio is no weight; set the same mask in both"
            )
    return found


def _points(found: EveryRow, program: Program, block: Block, traces: Traces) -> None:
    """Elements that are one number in all draws of a row, and are not in the model's."""
    for name, (site, _) in pairs(traces).items():
        rows = _constant(site, DRAWS, len(block.x)).any(-1).nonzero()[:MOST, 0]
        if found.points or len(rows) == 0:
            continue
        x, y = block.x[rows], None if block.y is None else block.y[rows]
        again = run(program.guide, x, y, num_samples=MOST)
        prior = run(program.model, x, y, num_samples=MOST)
        value = latent_sites(prior)[name]["value"].reshape(-1, *site["fn"].event_shape)
        free = (value != value[:1]).any(0).flatten()  # others are so by structure
        stuck = _constant(latent_sites(again)[name], MOST, len(rows)) & free.to(value.device)
        if bool(stuck.any()):
            row = int(rows[stuck.any(-1).nonzero()[0, 0]]) + block.first
            found.points.append(
                f"the guide's draws of {name!r} are all one number (first in row {row}), to the precision of "
                f"{str(site['value'].dtype).removeprefix('torch.')}: its scale is lost beside its mean, and log p(x) is far too "
                "low there while its error seems small; look at how the scale is made, bound it from below, or train anew"
            )


def _constant(site: Any, draws: int, rows: int) -> Tensor:
    """Which elements ``(rows, elements)`` are one number in all draws; none of a discrete site, or where they are masked."""
    fn, value = site["fn"], site["value"]
    value = value.expand(draws, rows, *fn.event_shape)
    if is_discrete(fn):
        return torch.zeros(rows, 1, dtype=torch.bool)
    same = (value == value[:1]).all(0)
    if (mask := counted(site)) is not None:
        same = same & mask.to(same.device).expand(draws, *same.shape).any(0)
    return same.reshape(rows, -1)


def folds(program: Program, x: Tensor, y: Tensor | None) -> tuple[float, float] | None:
    """Whether the guide's changes of variables take two points to one: mean and standard error over rows of E_q[g / q].

    That is at most 1 for a density g, here a normal on the real line, and up to 2 where each of two points counts once; None
    where nothing is asked: no changes of variables, or of more than 10 elements. Inside of ``isolated``.
    """
    pilot = trace(program, x, y, num_samples=MOST)
    model = latent_sites(pilot.model)
    deltas = [n for n in model if is_delta(latent_sites(pilot.guide)[n])]
    if not deltas or sum(model[n]["fn"].event_shape.numel() for n in deltas) > FOLDED:
        return None

    def free(guide: Any) -> Tensor:
        parts = [free_values(model[n]["fn"], guide.nodes[n]["value"]) for n in deltas]
        return torch.cat([p.reshape(*p.shape[:2], -1) for p in parts], -1).double()

    ours = free(pilot.guide)
    g = torch.distributions.Normal(ours.mean(0), NARROWED * ours.std(0) + 1e-12, validate_args=False)
    guide = run(program.guide, x, y, num_samples=MOST**2)
    back = sum(
        log_det(model[n]["fn"], guide.nodes[n]["value"]).double().reshape(MOST**2, len(x), -1).sum(-1) for n in deltas
    )
    log_q = sum_log_prob(guide, MOST**2, len(x)).double()
    ratio = (g.log_prob(free(guide)).sum(-1) - back - log_q).exp().mean(0)
    return float(ratio.mean()), float(ratio.std() / len(x) ** 0.5)
