"""Bounds of log p(x) by several draws: the importance-weighted and the Renyi bound."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field
from torch import Tensor

from pyro_vae.objectives.base import Objective
from pyro_vae.objectives.particles import draw
from pyro_vae.programs.trace import Program
from pyro_vae.registry import register

Particles = Annotated[int, Field(ge=1, le=100_000)]


def bound(log_weight: Tensor, alpha: float = 0.0, scale: Tensor | float = 1.0) -> Tensor:
    """1/(1 - alpha) log (1/K) sum_k w_k^(1 - alpha), times the scale of the row, averaged over images.

    ``log_weight`` is ``(K, batch)``, without scales; ``scale`` a number or ``(batch,)``.
    """
    power = 1.0 - alpha
    return (scale * ((power * log_weight).logsumexp(0) - math.log(len(log_weight)))).mean() / power


@register("objectives", "iwae")
class IWAE(Objective):
    """loss = -E log (1/K) sum_k p(x, z_k) / q(z_k | x), z_k ~ q(z | x).

    A tighter bound than the ELBO, and the same for one particle. The guide's gradient loses its signal as 1/sqrt(K)
    (Rainforth et al. 2018, https://arxiv.org/abs/1802.04537): ``dreg`` has the same expectation and does not, but for
    mixtures of guides, whose particles are stratified here. Burda, Grosse & Salakhutdinov 2016,
    https://arxiv.org/abs/1509.00519.

    Args:
        num_particles: K, draws of z per image.
    """

    records = True
    formula = "-E log (1/K) sum_k p(x, z_k) / q(z_k | x)"

    def __init__(self, *, num_particles: Particles = 5) -> None:
        self.num_particles = num_particles

    def __call__(
        self, program: Program, x: Tensor, y: Tensor | None = None, step: Tensor | int = 0
    ) -> tuple[Tensor, Tensor]:
        """Minus the bound; the loss is its own surrogate."""
        particles = draw(program, x, y, self.num_particles, reparameterized="iwae")
        log_weight = particles.log_joint() - particles.log_guide()
        loss = -bound(log_weight, scale=particles.row_scale("iwae"))
        return loss.detach(), loss


@register("objectives", "renyi")
class Renyi(Objective):
    """loss = -1/(1 - alpha) E log (1/K) sum_k (p(x, z_k) / q(z_k | x))^(1 - alpha).

    alpha = 0 is the importance-weighted bound, alpha -> 1 the ELBO; negative alpha covers mass and is no lower bound.
    Li & Turner 2016, https://arxiv.org/abs/1602.02311.

    Args:
        alpha: the order of the divergence, not 1.
        num_particles: K, draws of z per image.
    """

    formula = "-1/(1 - alpha) E log (1/K) sum_k (p(x, z_k) / q(z_k | x))^(1 - alpha)"

    def __init__(self, *, alpha: Annotated[float, Field(ge=-100, lt=1)] = 0.5, num_particles: Particles = 5) -> None:
        self.alpha, self.num_particles = alpha, num_particles

    def __call__(
        self, program: Program, x: Tensor, y: Tensor | None = None, step: Tensor | int = 0
    ) -> tuple[Tensor, Tensor]:
        """Minus the bound; the loss is its own surrogate."""
        particles = draw(program, x, y, self.num_particles, reparameterized="renyi")
        log_weight = particles.log_joint() - particles.log_guide()
        loss = -bound(log_weight, self.alpha, particles.row_scale("renyi"))
        return loss.detach(), loss
