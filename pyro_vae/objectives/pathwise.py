"""Gradients of the guide by the path through its draws alone: sticking the landing, and doubly reparameterized.

Both drop the score of the guide, d/dphi log q(z; phi) at fixed z: for one draw its expectation is zero, for several it is
turned into a path gradient by reparameterizing a second time.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from pyro_vae.objectives.base import Objective
from pyro_vae.objectives.importance_weighted import Particles, bound
from pyro_vae.objectives.particles import draw
from pyro_vae.programs.trace import Program
from pyro_vae.registry import register


@register("objectives", "stl")
class StickingTheLanding(Objective):
    """loss = -ELBO, its gradient without the guide's score: zero variance where q is exact.

    An unbiased gradient of the ELBO for any number of draws averaged. It is not offered for the importance-weighted bound, where
    dropping the score is biased (Tucker et al. 2019): ``dreg`` is. Roeder, Wu & Duvenaud 2017, https://arxiv.org/abs/1703.09194.

    Args:
        num_particles: draws of z per image, averaged.
    """

    formula = "-E_q[log p(x, z) - log q(z | x)], with the gradient through z alone"

    def __init__(self, *, num_particles: Annotated[int, Field(ge=1, le=100_000)] = 1) -> None:
        self.num_particles, self.is_elbo = num_particles, num_particles == 1

    def __call__(
        self, program: Program, x: Tensor, y: Tensor | None = None, step: Tensor | int = 0
    ) -> tuple[Tensor, Tensor]:
        """Minus the ELBO, and its surrogate of the same value."""
        particles = draw(program, x, y, self.num_particles, reparameterized="stl", again=True)
        loss = -particles.log_weight(guide_parameters=False).mean()
        return loss.detach(), loss


@register("objectives", "dreg")
class DoublyReparameterized(Objective):
    """loss = -E log (1/K) sum_k w_k; model gradient sum_k v_k d log p, guide gradient sum_k v_k^2 (d log w_k / dz) dz/dphi.

    v_k = w_k / sum w. The guide's gradient has the expectation of ``iwae``'s for every K, and a signal-to-noise
    ratio that grows with K. Particles are independent of each other also where q is a mixture, where those of ``iwae`` are
    stratified, whose bound is tighter: of these this gradient would be biased. Tucker, Lawson, Gu & Maddison 2019, https://arxiv.org/abs/1810.04152.

    Args:
        num_particles: K, draws of z per image.
    """

    formula = "-E log (1/K) sum_k p(x, z_k) / q(z_k | x), doubly reparameterized"

    def __init__(self, *, num_particles: Particles = 5) -> None:
        self.num_particles = num_particles

    def __call__(
        self, program: Program, x: Tensor, y: Tensor | None = None, step: Tensor | int = 0
    ) -> tuple[Tensor, Tensor]:
        """Minus the bound, and a surrogate whose gradient is the estimate (and whose value means nothing)."""
        particles = draw(program, x, y, self.num_particles, reparameterized="dreg", again=True, stratified=False)
        log_joint, log_guide = particles.log_joint(), particles.log_guide(parameters=False)
        log_weight = (log_joint - log_guide).detach()
        weight, scale = log_weight.softmax(0), particles.row_scale("dreg")
        for (
            z
        ) in particles.latents.values():  # what the model's gradient is weighed by once more, on its way to the guide
            if z.requires_grad:
                z.register_hook(lambda g: g * weight.reshape(weight.shape + (1,) * (g.dim() - 2)))
        surrogate = -(scale * (weight * log_joint - weight.square() * log_guide).sum(0)).mean()
        return -bound(log_weight, scale=scale), surrogate
