"""Hamiltonian Monte Carlo on every chain of every image at once, with trajectories of a quarter of a period.

    H(v, r) = -log p(x, s * v) + |r|^2 / 2

On a Gaussian in units of its standard deviations a trajectory of length pi / 2 forgets where it began; the steps of
each are jittered, so that no direction returns to its start. Neal 2011, MCMC using Hamiltonian dynamics,
https://arxiv.org/abs/1206.1901.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_vae.analysis.nuts import MAX_ENERGY_ERROR, Adapt, Report
from pyro_vae.analysis.target import Record, Target

JITTER = 0.2  # each trajectory's step is drawn within +-20 % (Neal 2011, 3.2)
LENGTH = math.pi / 2  # of a trajectory, in standard deviations
MOST_STEPS = 64


class HMC:
    """Chains ``(chains, batch, D)`` that move by HMC, in step with each other.

    Args:
        target: the density, in the units of v.
        position: where the chains start, in units of v.
        generator: of all random numbers, on the device.
    """

    def __init__(self, target: Target, position: Tensor, generator: torch.Generator) -> None:
        self.target, self.position, self.generator = target, position, generator

    def run(self, num_draws: int, step: Tensor, adapt: Adapt | None = None, report: Report | None = None) -> Record:
        """``num_draws`` draws of every chain; see :meth:`pyro_vae.analysis.nuts.NUTS.run`.

        The number of steps is that which the median image needs for a trajectory's length, set once.
        """
        v = self.position
        record = Record.empty(num_draws, v)
        shape = v.shape[:2]
        draw: dict[str, Any] = {"generator": self.generator, "dtype": v.dtype, "device": v.device}
        density, gradient = self.target(v)
        steps = int(min(MOST_STEPS, max(1, math.ceil(LENGTH / float(step.median())))))
        everyone = torch.ones(shape, dtype=torch.bool, device=v.device)
        for index in range(num_draws):
            momentum = torch.randn(v.shape, **draw)
            jitter, uniform = torch.rand(2, *shape, **draw)
            size = (step * (1 - JITTER + 2 * JITTER * jitter)).unsqueeze(-1)
            energy = 0.5 * momentum.square().sum(-1) - density
            u, slope, r = v, gradient, momentum
            for _ in range(steps):
                r = r + 0.5 * size * slope
                u = u + size * r
                value, slope = self.target(u)
                r = r + 0.5 * size * slope
            new = 0.5 * r.square().sum(-1) - value
            change = (energy - new).nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
            probability = change.clamp(max=0).exp()
            accept = uniform < probability
            wide = accept.unsqueeze(-1)
            v, gradient = torch.where(wide, u, v), torch.where(wide, slope, gradient)
            density = torch.where(accept, value, density)
            record.write(
                torch.full(shape, index, device=v.device), v, density, acceptance_rate=probability, step_size=size[..., 0],
                diverging=change < -MAX_ENERGY_ERROR, energy=torch.where(accept, new, energy),
                tree_depth=torch.zeros_like(density), n_steps=torch.full_like(density, steps),
            )  # fmt: skip
            if adapt is not None:
                step = adapt(probability, everyone)
            if report is not None:
                report(1 / num_draws)
        self.position = v
        return record.in_units_of(self.target.scale)
