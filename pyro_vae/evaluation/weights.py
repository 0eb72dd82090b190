"""The importance weights of draws from the guide, and what is kept of them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from pyro_vae.evaluation.estimators import Estimate, estimate
from pyro_vae.precision import casts
from pyro_vae.programs.summing import states_of, summed
from pyro_vae.programs.trace import Program, draw_terms, isolated

Weighed = tuple[Tensor, Tensor, Tensor, Tensor]


def weigh(program: Program, x: Tensor, y: Tensor | None, num_samples: int, precision: str = "full") -> Weighed:
    """Log-weights ``(num_samples, batch)``, and what else is kept of the draws, ``(batch,)`` each.

    That is the sums of log p(x | z) and of log q(z | x) - log p(z), and the size of the largest terms, which says how far
    rounding can tell weights apart.
    """
    states = states_of(program, x)
    if states is not None:
        return _summed(program, x, y, states, num_samples, precision)
    with casts(precision, x.device):
        terms = draw_terms(program, x, y, num_samples=num_samples)
    total = torch.float64 if x.device.type != "mps" else torch.float32
    kl = (terms.log_guide - terms.log_prior).sum(0, dtype=total)
    size = terms.log_likelihood.abs() + terms.log_prior.abs() + terms.log_guide.abs()
    # a draw where the model cannot be has a weight of 0, and no rounding
    size = torch.where(torch.isfinite(size), size, torch.zeros_like(size)).amax(0)
    return terms.log_weight, terms.log_likelihood.sum(0, dtype=total), kl, size


def _summed(
    program: Program, x: Tensor, y: Tensor | None, states: dict[str, Tensor], num_samples: int, precision: str
) -> Weighed:
    """The same, the discrete latents summed over: a weight is that of the draws of all states together."""
    with casts(precision, x.device), isolated():
        found = summed(program, x, y, states, num_samples)
        terms = found.terms()
    total = torch.float64 if x.device.type != "mps" else torch.float32
    kl = found.mean(terms.log_guide - terms.log_prior).sum(0, dtype=total)
    size = terms.log_likelihood.abs() + terms.log_prior.abs() + terms.log_guide.abs()
    size = torch.where(torch.isfinite(size), size, torch.zeros_like(size)).amax(0)
    return found.log_weight(terms), found.mean(terms.log_likelihood).sum(0, dtype=total), kl, size


@dataclass(frozen=True)
class Reduced(Estimate):
    """What is kept of a block's draws, beside the estimate; ``(batch,)``, float64, on the CPU.

    ``reconstruction`` and ``kl`` are means over the draws; ``draws`` is how many each image got, int64; ``rounding`` what of
    ``kl`` rounding may be.
    """

    reconstruction: Tensor
    kl: Tensor
    draws: Tensor
    rounding: Tensor


def reduced(parts: list[Weighed], length: int = 1, stratified: bool = False) -> Reduced:
    """What the draws of each image say, which were made in parts; see :func:`estimate`."""
    log_weight = torch.cat([part[0] for part in parts])
    size = torch.stack([part[3] for part in parts]).amax(0)
    found = estimate(log_weight, size, length, stratified)
    sums = [torch.stack([part[i].cpu().double() for part in parts]).sum(0) for i in (1, 2)]
    reconstruction, kl = (total / len(log_weight) for total in sums)
    draws = torch.full((len(kl),), len(log_weight), dtype=torch.int64)
    rounding = 8 * torch.finfo(log_weight.dtype).eps * size.cpu().double()
    return Reduced(**vars(found), reconstruction=reconstruction, kl=kl, draws=draws, rounding=rounding)


def joined(parts: list[Reduced], order: Tensor | slice = slice(None)) -> dict[str, Any]:
    """Parts put together by field, and in an order."""
    return {f.name: torch.cat([getattr(part, f.name) for part in parts])[order] for f in fields(Reduced)}
