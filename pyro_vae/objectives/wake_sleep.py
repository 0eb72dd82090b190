"""Reweighted wake-sleep: the model and the guide each follow their own divergence, and z need not be differentiable."""

from __future__ import annotations

from torch import Tensor

from pyro_vae.objectives.base import Objective
from pyro_vae.objectives.importance_weighted import Particles, bound
from pyro_vae.objectives.particles import draw
from pyro_vae.programs.trace import Program
from pyro_vae.registry import register


@register("objectives", "wake-sleep")
class ReweightedWakeSleep(Objective):
    """Model: ascend sum_k v_k log p(x, z_k); guide: ascend sum_k v_k log q(z_k | x) (wake-phase phi); v_k = w_k / sum w.

    The guide minimises KL(p(z | x) || q(z | x)), which covers mass where the ELBO seeks modes. It works for discrete latents,
    without the variance of a score function. Bornschein & Bengio 2015, https://arxiv.org/abs/1406.2751; Le et al. 2019,
    https://arxiv.org/abs/1805.10469.

    Args:
        num_particles: K, draws of z per image; with one, the guide is not trained towards anything.
    """

    records = True
    formula = "-E sum_k v_k [log p(x, z_k) + log q(z_k | x)], v_k = w_k / sum w held fixed"

    def __init__(self, *, num_particles: Particles = 10) -> None:
        self.num_particles = num_particles

    def __call__(
        self, program: Program, x: Tensor, y: Tensor | None = None, step: Tensor | int = 0
    ) -> tuple[Tensor, Tensor]:
        """Minus the importance-weighted bound, and a surrogate whose gradient is the estimate."""
        particles = draw(program, x, y, self.num_particles)
        log_joint, log_guide = particles.log_joint(), particles.log_guide()
        log_weight = (log_joint - log_guide).detach()
        scale = particles.row_scale("wake-sleep")
        surrogate = -(scale * (log_weight.softmax(0) * (log_joint + log_guide)).sum(0)).mean()
        return -bound(log_weight, scale=scale), surrogate
