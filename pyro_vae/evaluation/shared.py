"""log p(x_A | x_B) from one set of draws: those of the guide that is given x_B serve both terms.

    log sum_k v_k - log sum_k w_k,     w_k = p(x_B, z_k) / q(z_k | x_B),   v_k = p(x_A, x_B, z_k) / q(z_k | x_B)

What both sums owe to the draws cancels: the error is that of the difference (the delta method, by the jackknife that leaves a
draw out of both). Small where x_A adds little to what x_B says of z; where it adds much, few draws carry v, which k tells, and
draws of the guide that is given both do better. A column of A that the guide draws where it is missing takes its value in v,
without the density of its draw in q; of one that is summed over, v has the draws of its own state alone, so that the
probabilities of classes add up to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_vae.errors import UserError, tell
from pyro_vae.evaluation.blind import require_weights
from pyro_vae.evaluation.estimators import Estimate, estimate
from pyro_vae.evaluation.result import LogLikelihood, UnreliableEstimateWarning
from pyro_vae.precision import wide
from pyro_vae.programs.columns import Layout, layout_of
from pyro_vae.programs.contract import admit
from pyro_vae.programs.summing import AsDrawn, states_of, summed
from pyro_vae.programs.trace import (
    Program,
    Traced,
    isolated,
    latent_values,
    run,
    site_log_prob,
    sum_log_prob,
    to_program,
    y_to_program,
)
from pyro_vae.programs.walk import Walk, at_once, spans
from pyro_vae.seeding import derive_seed, seeded

Pair = tuple[Estimate, Estimate, Tensor]  # of v, of w, and the error (batch,) of their difference


def shared_terms(
    program: Program,
    joint: Tensor,
    evidence: Tensor,
    y: Tensor | None,
    of: list[str],
    num_samples: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[LogLikelihood, LogLikelihood, Tensor]:
    """log p(x_A, x_B), log p(x_B), and the error of their difference ``(N,)``, of the same draws.

    Args:
        program: any Program with columns.
        joint: the packed record with A and B.
        evidence: the same with B alone.
        y: what a conditional program is conditioned on.
        of: the columns A.
        num_samples: K, draws of each row, of each state where discrete latents are summed over.
        seed: of the draws.
        progress: called with the number of rows after every block.

    Raises:
        UserError: columns of A of which elements are missing, and that the guide draws.
    """
    admit(program, joint, y)
    require_weights(admit(program, evidence, y))
    layout = layout_of(program, joint)
    if layout is None:
        raise UserError("expected a record")
    for column in layout.columns:
        if column.name in of and column.name in layout.guided and column.missing == "elements":
            raise UserError(
                f"the guide draws elements of {column.name!r} that are missing, and its draws serve one kind of rows: leave "
                "common=True out, or say by row what is missing"
            )
    states = states_of(program, evidence)
    size = evidence[0].numel() * (1 if states is None else len(next(iter(states.values()))))
    chunk = at_once("importance weights", size, 64)
    walk = Walk(program, joint, y, rows=max(1, chunk // num_samples), draws=min(num_samples, chunk), progress=progress)
    for block in walk:
        rows = slice(block.first, block.first + len(block))
        with block, isolated():
            given, parts = to_program(program, evidence[rows]), []
            for span in spans(num_samples, walk.draws):
                with seeded(derive_seed("shared draws of columns", seed, block.first, span.start), given.device):
                    parts.append(_weights(program, layout, block.x, given, block.y, of, states, span.stop - span.start))
            walk.keep(_estimated(*(torch.cat(two) for two in zip(*parts, strict=True))))
    found: list[Pair] = walk.gathered()
    error = torch.cat([part[2] for part in found])
    size = walk.rows * walk.draws
    both, alone = (_result(list(part), num_samples, seed, size) for part in list(zip(*found, strict=True))[:2])
    for result in (both, alone):
        tell(result.warnings, UnreliableEstimateWarning)
    return both, alone, error


def _weights(
    program: Program,
    layout: Layout,
    joint: Tensor,
    given: Tensor,
    y: Tensor | None,
    of: list[str],
    states: dict[str, Tensor] | None,
    num: int,
) -> tuple[Tensor, Tensor]:
    """log v and log w ``(num, batch)``."""
    batch, present = len(joint), layout.unpacked(joint).present
    y = y_to_program(program, y)
    if states is None:
        guide = run(program.guide, given, y, num_samples=num)
        model = run(program.model, given, y, num_samples=num, at=guide)
        other = run(program.model, joint, y, num_samples=num, at=latent_values(guide, num, batch))
        q = sum_log_prob(guide, num, batch)
        w = sum_log_prob(model, num, batch) - q
        return sum_log_prob(other, num, batch) - q + _of_given(guide, present, of, [], num), w
    runs = summed(program, given, y, states, num)
    count = runs.log_chance.shape[0] * num
    values = latent_values(runs.guide, count, batch)
    other = run(program.model, joint, y, num_samples=count, at=AsDrawn(values))
    v = runs.by_state(
        sum_log_prob(other, count, batch)
        - runs.terms().log_guide
        + _of_given(runs.guide, present, of, list(states), count)
    )
    counts = runs.log_chance > -math.inf
    v = v + torch.where(counts, runs.log_chance, torch.zeros_like(v))
    column = layout.columns_of(joint)
    for name in [n for n in states if n in of]:
        own = states[name].to(column[name]).reshape(len(states[name]), 1, -1)
        same = (own == column[name].reshape(1, batch, -1)).all(-1)  # (states, batch)
        counts = counts & (same | ~present[name].reshape(batch, -1).all(1))[:, None]
    return torch.logsumexp(torch.where(counts, v, torch.full_like(v, -math.inf)), 0), runs.log_weight(runs.terms())


def _of_given(guide: Traced, present: dict[str, Tensor], of: list[str], but: list[str], num: int) -> Any:
    """log q of draws in whose place the values of A stand ``(num, batch)``; those that are summed over are none."""
    total: Any = 0.0
    for name in [n for n in of if n in guide.nodes and n not in but]:
        density = site_log_prob(guide.nodes[name])
        total = total + torch.where(present[name], density, torch.zeros_like(density)).expand(num, len(present[name]))
    return total


def _estimated(v: Tensor, w: Tensor) -> Pair:
    """Both sums, and the jackknife error of the difference of their logarithms."""
    shifts = []
    for log_weight in (v, w):
        share = wide(log_weight).softmax(0)
        shifts.append(torch.log1p(-share.clamp(max=1.0)))
    off = shifts[0] - shifts[1]
    error = ((len(off) - 1) * off.var(0, correction=0)).sqrt().nan_to_num(nan=math.inf)
    return estimate(v), estimate(w), error.cpu()


def _result(parts: list[Estimate], num_samples: int, seed: int, chunk_size: int) -> LogLikelihood:
    found: dict[str, Any] = {name: torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])}
    nothing = torch.full_like(found["bias"], torch.nan)
    return LogLikelihood(
        **found, reconstruction=nothing, kl=nothing, num_samples=num_samples, seed=seed, chunk_size=chunk_size
    )
