"""p(z) = prod_d Bernoulli(z_d; p_d)."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_vae.priors.base import Distribution, GuideDensity, Prior, Shape
from pyro_vae.registry import register


@register("priors", "bernoulli")
class Bernoulli(Prior):
    """Independent binary latents; their probabilities start at one half.

    A relaxed guide in training hands over numbers between 0 and 1: the log-probability is then the linear form
    z log p + (1 - z) log(1 - p), which agrees with the mass at 0 and 1. Maddison, Mnih & Teh 2017,
    https://arxiv.org/abs/1611.00712.

    Args:
        learned: whether the probabilities are trained.
    """

    formula = "p(z) = prod_d Bernoulli(p_d)"
    support = constraints.independent(constraints.boolean, 1)

    def __init__(self, latent_shape: Shape, *, learned: bool = True) -> None:
        super().__init__(latent_shape)
        self.logits = nn.Parameter(torch.zeros(latent_shape), requires_grad=learned)

    def forward(self, like: Tensor, guide: GuideDensity | None = None) -> Distribution:
        """The product, with batch shape ``()``."""
        return dist.Bernoulli(logits=self.logits, validate_args=False).to_event(len(self.latent_shape))
