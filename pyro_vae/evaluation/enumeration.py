"""log p(x) of discrete latents, summed over all their states.

    log p(x) = log sum_z p(x, z),   z every joint value of the latents: no draws, no error

For programs all of whose latents are discrete and have at most 1,024 joint values (:mod:`pyro_vae.programs.states`); one without
latents, a tractable density, has one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_vae.errors import ProgramError
from pyro_vae.evaluation.estimators import GROUPS
from pyro_vae.evaluation.weights import Reduced
from pyro_vae.precision import casts
from pyro_vae.programs.states import for_rows
from pyro_vae.programs.summing import AsDrawn, counting
from pyro_vae.programs.trace import Program, Terms, Traces, isolated, run
from pyro_vae.programs.walk import spans

LOST = 1e-3  # of a probability: where the guide's lies on states that the model lacks, its KL to the prior is infinite


def summed(
    program: Program,
    x: Tensor,
    y: Tensor | None,
    states: dict[str, Tensor],
    at_once: int,
    num_samples: int,
    precision: str = "full",
) -> Reduced:
    """What is reported of each row of x: log p(x) without error, and E_q log p(x | z) and KL(q || p) without noise.

    Args:
        program: the Program.
        x: data ``(batch, *event)``, in its dtype and on its device.
        y: what a conditional program is conditioned on.
        states: every joint value of the latents, ``(states, *latent)`` by site.
        at_once: states in one pass.
        num_samples: what the effective sample size of equal weights is reported as.
        precision: of matrix products.

    Raises:
        ProgramError: a prior whose probabilities do not add up to 1 over these states, in any row.
    """
    spanned = spans(number_of_joint(states), at_once)
    parts = [_terms(program, x, y, states, span, precision) for span in spanned]
    wide = torch.float64 if x.device.type != "mps" else torch.float32
    log_likelihood, log_prior, log_guide = (
        torch.cat([getattr(p, name).to(wide) for p, _ in parts])
        for name in ("log_likelihood", "log_prior", "log_guide")
    )
    counts = torch.cat([counts for _, counts in parts])
    total = torch.logsumexp(log_prior.where(counts, -math.inf), 0).exp()
    if bool((off := (total - 1).abs() > LOST).any()):
        raise ProgramError(
            f"model: the probabilities of the latents' {len(counts):,} states add up to {float(total[off][0]):.4g}, not 1: the "
            f"sum over them is not log p(x); look at log_prob and enumerate_support of {', '.join(states)}"
        )
    evidence = torch.logsumexp((log_likelihood + log_prior).where(counts, -math.inf), 0)
    q = log_guide.exp().where(counts, 0.0)
    mean = lambda t: torch.where(q > 0, q * t, torch.zeros_like(q)).sum(0)  # noqa: E731
    kl = torch.where(q.sum(0) < 1 - LOST, torch.full_like(evidence, math.inf), mean(log_guide - log_prior))
    same = lambda value: torch.full_like(evidence, value).cpu().double()  # noqa: E731
    exact = evidence.cpu().double()
    return Reduced(
        log_likelihood=exact,
        bias=same(0.0),
        mc_se=same(0.0),
        ess=same(num_samples),
        khat=same(-math.inf),
        interval=torch.stack([exact, exact], -1),
        groups=exact[:, None].expand(-1, GROUPS),
        reconstruction=mean(log_likelihood).cpu().double(),
        kl=kl.cpu().double(),
        draws=torch.full((len(x),), num_samples, dtype=torch.int64),
        rounding=same(1e-4),
    )


def number_of_joint(states: dict[str, Tensor]) -> int:
    """How many joint states there are; without latents one."""
    return len(next(iter(states.values()))) if states else 1


def _terms(
    program: Program, x: Tensor, y: Tensor | None, states: dict[str, Tensor], span: slice, precision: str
) -> tuple[Terms, Tensor]:
    """Terms ``(states, batch)`` with the latents at these values, and which of them count: of masked elements the first alone."""
    size, rows = min(span.stop, number_of_joint(states)) - span.start, len(x)
    values = {n: for_rows(program, s[span], rows) for n, s in states.items()}
    with casts(precision, x.device), isolated():
        guide = run(program.guide, x, y, num_samples=size, at=AsDrawn(values))
        model = run(program.model, x, y, num_samples=size, at=values)
    counts = torch.ones(size, rows, dtype=torch.bool, device=x.device)
    if states:
        counts = counting(model, values, {n: s[0] for n, s in states.items()})
    return Traces(model, guide).terms(size, rows), counts
