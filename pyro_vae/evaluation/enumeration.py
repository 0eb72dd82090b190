"""log p(x) of discrete latents, summed over all their states.

    log p(x) = log sum_z p(x, z),   z every joint value of the latents: no draws, no error

For programs all of whose latents are discrete and have at most 1,024 joint values (:mod:`pyro_vae.programs.states`).
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from pyro_vae.evaluation.weights import Reduced
from pyro_vae.precision import casts
from pyro_vae.programs.trace import AtValues, Program, Terms, Traces, innermost, isolated, run
from pyro_vae.programs.walk import spans

LOST = 1e-3  # of the guide's probability on states that the model lacks: its KL to the prior is infinite


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
    """
    spanned = spans(len(next(iter(states.values()))), at_once)
    parts = [_terms(program, x, y, {n: s[span] for n, s in states.items()}, precision) for span in spanned]
    wide = torch.float64 if x.device.type != "mps" else torch.float32
    log_likelihood, log_prior, log_guide = (
        torch.cat([getattr(p, name).to(wide) for p in parts]) for name in ("log_likelihood", "log_prior", "log_guide")
    )
    evidence = torch.logsumexp(log_likelihood + log_prior, 0)
    q = log_guide.exp()
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
        reconstruction=mean(log_likelihood).cpu().double(),
        kl=kl.cpu().double(),
        draws=torch.full((len(x),), num_samples, dtype=torch.int64),
    )


def _terms(program: Program, x: Tensor, y: Tensor | None, states: dict[str, Tensor], precision: str) -> Terms:
    """Terms ``(states, batch)`` with the latents at these values."""
    size = len(next(iter(states.values())))
    values = {n: s[:, None].expand(size, len(x), *s.shape[1:]) for n, s in states.items()}
    with casts(precision, x.device), isolated():
        guide = run(program.guide, x, y, num_samples=size, at=_AsDrawn(values))
        model = run(program.model, x, y, num_samples=size, at=values)
    return Traces(model, guide).terms(size, len(x))


class _AsDrawn(AtValues):
    """Give the guide's sites the model's values in the guide's dtype: class numbers are integers, and bits are floats."""

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        if msg["name"] in self.values and msg["done"]:
            with contextlib.suppress(NotImplementedError):
                msg["value"] = msg["value"].to(innermost(msg["fn"]).enumerate_support(expand=False).dtype)
