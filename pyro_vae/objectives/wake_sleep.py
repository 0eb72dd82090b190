"""Reweighted wake-sleep: the model and the guide each follow their own divergence, and z need not be differentiable."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from pyro_vae.objectives.base import Objective
from pyro_vae.objectives.importance_weighted import Particles, bound
from pyro_vae.objectives.particles import draw
from pyro_vae.programs.dreams import dream
from pyro_vae.programs.functional import OfProgram
from pyro_vae.programs.trace import Program, isolated, run, sum_log_prob
from pyro_vae.registry import register


@register("objectives", "wake-sleep")
class ReweightedWakeSleep(Objective):
    """Model: ascend sum_k v_k log p(x, z_k), v_k = w_k / sum w; guide: sum_k v_k log q(z_k | x), or log q(z | x) of dreams.

    The guide minimises KL(p(z | x) || q(z | x)), which covers mass where the ELBO seeks modes. It works for discrete latents,
    without the variance of a score function. Bornschein & Bengio 2015, https://arxiv.org/abs/1406.2751; Le et al. 2019,
    https://arxiv.org/abs/1805.10469. With one particle and ``phase="sleep"`` it is the wake-sleep algorithm: the guide learns to
    invert rows that the model dreams. Parameters that model and guide have in common (a ladder's, a residual guide's, a
    VampPrior's encoder) follow the sum of both. Hinton, Dayan, Frey & Neal 1995, https://doi.org/10.1126/science.7761831.

    Args:
        num_particles: K, draws of z per image; with one, a guide of the wake phase is not trained towards anything.
        phase: in which the guide learns.
    """

    records = True
    formula = "-E sum_k v_k [log p(x, z_k) + log q(z_k | x)], v_k = w_k / sum w held fixed"

    def __init__(self, *, num_particles: Particles = 10, phase: Literal["wake", "sleep"] = "wake") -> None:
        self.num_particles, self.phase = num_particles, phase
        self.records = phase == "wake"  # type: ignore[misc]

    def __call__(
        self, program: Program, x: Tensor, y: Tensor | None = None, step: Tensor | int = 0
    ) -> tuple[Tensor, Tensor]:
        """Minus the importance-weighted bound, and a surrogate whose gradient is the estimate."""
        particles = draw(program, x, y, self.num_particles)
        log_joint, log_guide = particles.log_joint(), particles.log_guide()
        log_weight = (log_joint - log_guide).detach()
        scale = particles.row_scale("wake-sleep")
        learned = log_joint if self.phase == "sleep" else log_joint + log_guide
        surrogate = -(scale * (log_weight.softmax(0) * learned).sum(0)).mean()
        if self.phase == "sleep":
            surrogate = surrogate - (scale * _of_dreams(program, x, y)).mean()
        return -bound(log_weight, scale=scale), surrogate


def _of_dreams(program: Any, x: Tensor, y: Tensor | None) -> Tensor:
    """log q(z | x) ``(batch,)`` of as many rows that the model draws; what it does to buffers (of a BatchNorm) is forgotten."""

    def log_guide(program: Any) -> Tensor:
        with isolated():
            with torch.no_grad():
                *_, latents, dreamt = dream(program, x, y)
            guide = run(program.guide, dreamt, y, num_samples=1, at={n: z.unsqueeze(0) for n, z in latents.items()})
            return sum_log_prob(guide, 1, len(x))[0]

    bound = OfProgram(program, log_guide)
    return bound.at({**dict(program.named_parameters()), **bound.copied()})
