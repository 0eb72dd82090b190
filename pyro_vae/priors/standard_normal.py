"""p(z) = N(0, I)."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor

from pyro_vae.priors.base import Distribution, GuideDensity, Prior, vector_zeros
from pyro_vae.registry import register


@register("priors", "standard-normal")
class StandardNormal(Prior):
    """p(z) = N(z; 0, I).

    Kingma & Welling 2014, https://arxiv.org/abs/1312.6114.
    """

    formula = "p(z) = N(0, I)"

    def forward(self, like: Tensor, guide: GuideDensity | None = None) -> Distribution:
        """N(0, I) with batch shape ``()``."""
        zeros = vector_zeros(like, self.latent_shape)
        return dist.Normal(zeros, zeros + 1, validate_args=False).to_event(len(self.latent_shape))
