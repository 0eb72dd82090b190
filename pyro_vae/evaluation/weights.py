"""The importance weights of draws from the guide."""

from __future__ import annotations

import torch
from torch import Tensor

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
    size = (terms.log_likelihood.abs() + terms.log_prior.abs() + terms.log_guide.abs()).amax(0)
    return terms.log_weight, terms.log_likelihood.sum(0, dtype=total), kl, size
