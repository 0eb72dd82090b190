"""The importance weights of draws from the guide, and what is kept of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pyro_vae.evaluation.estimators import Estimate, estimate
from pyro_vae.precision import casts
from pyro_vae.programs.contract import Program, draw_terms

Weighed = tuple[Tensor, Tensor, Tensor, Tensor]


def weigh(program: Program, x: Tensor, y: Tensor | None, num_samples: int, precision: str = "full") -> Weighed:
    """Log-weights ``(num_samples, batch)``, and what else is kept of the draws, ``(batch,)`` each.

    That is the sums of log p(x | z) and of log q(z | x) - log p(z), and the size of the largest terms, which says how far
    rounding can tell weights apart.
    """
    with casts(precision, x.device):
        terms = draw_terms(program, x, y, num_samples=num_samples)
    total = torch.float64 if x.device.type != "mps" else torch.float32
    kl = (terms.log_guide - terms.log_prior).sum(0, dtype=total)
    size = terms.log_likelihood.abs() + terms.log_prior.abs() + terms.log_guide.abs()
    # a draw where the model cannot be has a weight of 0, and no rounding
    size = torch.where(torch.isfinite(size), size, torch.zeros_like(size)).amax(0)
    return terms.log_weight, terms.log_likelihood.sum(0, dtype=total), kl, size


@dataclass(frozen=True)
class Reduced:
    """What is kept of a block's draws; tensors are ``(batch,)``, float64, on the CPU, ``estimate.interval`` ``(batch, 2)``.

    ``reconstruction`` and ``kl`` are means over the draws; ``draws`` is how many each image got, int64.
    """

    estimate: Estimate
    reconstruction: Tensor
    kl: Tensor
    draws: Tensor


def reduced(draw: Callable[[int, int], Weighed], num_samples: int, samples: int, length: int = 1) -> Reduced:
    """What ``num_samples`` draws of each image say, made at most ``samples`` at a time.

    Args:
        draw: from which draw on, and how many: their weights.
        num_samples: K.
        samples: draws in one pass.
        length: draws in a row that depend on each other.
    """
    parts = [draw(first, min(samples, num_samples - first)) for first in range(0, num_samples, samples)]
    found = estimate(torch.cat([part[0] for part in parts]), torch.stack([part[3] for part in parts]).amax(0), length)
    sums = [torch.stack([part[i].cpu().double() for part in parts]).sum(0) for i in (1, 2)]
    draws = torch.full((len(sums[0]),), num_samples, dtype=torch.int64)
    return Reduced(found, sums[0] / num_samples, sums[1] / num_samples, draws)


def in_place(parts: list[tuple[Tensor, Reduced]]) -> Reduced:
    """Parts of a block put together, each with the places of its images in the block."""
    order = torch.cat([rows for rows, _ in parts]).argsort()
    joined = lambda get: torch.cat([get(part) for _, part in parts])[order]  # noqa: E731
    found = {f.name: joined(lambda part, name=f.name: getattr(part.estimate, name)) for f in fields(Estimate)}
    rest = {name: joined(lambda part, name=name: getattr(part, name)) for name in ("reconstruction", "kl", "draws")}
    return Reduced(Estimate(**found), **rest)
