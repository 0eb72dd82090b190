"""Hamiltonian Monte Carlo on every chain of every image at once.

    H(u, m) = -log f_b(u) + |m|^2 / 2;   L leapfrog steps of size e, accepted with probability min(1, exp(H_old - H_new))

Neal 2011, MCMC using Hamiltonian dynamics, https://arxiv.org/abs/1206.1901. A transition leaves f_b invariant and is
reversible, whatever the step size, as long as that does not depend on the state of the chain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.evaluation.path import Path, Point

JITTER = (
    0.2  # each trajectory's step size is drawn within +-20 %, so that none returns to where it began (Neal 2011, 3.2)
)


def transition(
    path: Path, point: Point, beta: Tensor, step_size: Tensor, num_leapfrog: int, generator: torch.Generator
) -> tuple[Point, Tensor]:
    """One trajectory per chain, accepted or rejected; nothing is read to the host.

    Args:
        path: the densities.
        point: where the chains stand.
        beta: the temperature, a scalar tensor.
        step_size: per image ``(batch,)``, in units of u.
        num_leapfrog: leapfrog steps, at least 1; each takes one gradient.
        generator: of the momenta, the jitter and the acceptances, on the device of u.

    Returns:
        The new point, and the probability with which each chain's proposal was accepted, ``(chains, batch)``. A proposal
        of no finite log-density is rejected.
    """
    u = point.u
    start = torch.randn(u.shape, generator=generator, dtype=u.dtype, device=u.device)
    uniform = torch.rand((2, *u.shape[:2]), generator=generator, dtype=u.dtype, device=u.device)
    step = (step_size * (1 - JITTER + 2 * JITTER * uniform[0])).unsqueeze(-1)
    momentum = start + 0.5 * step * point.gradient(beta)
    for _ in range(num_leapfrog - 1):
        u = u + step * momentum
        momentum = momentum + step * path.gradient(u, beta)
    new = path(u + step * momentum)
    momentum = momentum + 0.5 * step * new.gradient(beta)
    change = new.log_density(beta) - point.log_density(beta)
    change = change + 0.5 * (start.square().sum(-1) - momentum.square().sum(-1))
    valid = torch.isfinite(new.base) & torch.isfinite(new.tilt) & ~torch.isnan(change)
    probability = torch.where(valid, change.clamp(max=0.0).exp(), torch.zeros_like(change))
    return new.where(uniform[1] < probability, point), probability


@dataclass
class StepSizes:
    """Step sizes per image as a function of the position s in [0, 1] along the path.

    Attributes:
        log_step: ``(M, batch)``, at s = 0, 1/(M-1), ..., 1.
    """

    log_step: Tensor

    def at(self, positions: Tensor) -> Tensor:
        """Step sizes ``(len(positions), batch)``, interpolated in their logarithm."""
        last = len(self.log_step) - 1
        where = positions.to(self.log_step) * last
        low = where.floor().long().clamp(max=max(last - 1, 0))
        weight = (where - low).unsqueeze(-1)
        return torch.lerp(self.log_step[low], self.log_step[(low + 1).clamp(max=last)], weight).exp()


def adapt(log_step: Tensor, probability: Tensor, target_accept: float, rate: float) -> Tensor:
    """The log step sizes ``(batch,)`` after chains accepted with ``probability`` ``(chains, batch)``: Robbins & Monro 1951."""
    return log_step + rate * (probability.mean(0) - target_accept)
