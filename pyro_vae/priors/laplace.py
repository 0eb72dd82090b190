"""p(z) = prod_d Laplace(z_d; 0, b)."""

from __future__ import annotations

from typing import Annotated

import pyro.distributions as dist
from pydantic import Field
from torch import Tensor

from pyro_vae.priors.base import Distribution, GuideDensity, Prior, Shape, vector_zeros
from pyro_vae.registry import register


@register("priors", "laplace")
class Laplace(Prior):
    """p(z) = prod_d exp(-|z_d| / b) / (2 b): heavier tails than the normal, and not invariant to rotations.

    The sparse-coding prior of Olshausen & Field 1996, https://doi.org/10.1038/381607a0; in a VAE, Barello et al. 2018,
    https://doi.org/10.1101/399246.

    Args:
        scale: b; the default gives every latent a variance of 1.
    """

    formula = "p(z) = prod_d Laplace(0, b)"

    def __init__(self, latent_shape: Shape, *, scale: Annotated[float, Field(gt=0)] = 0.5**0.5) -> None:
        super().__init__(latent_shape)
        self.scale = scale

    def forward(self, like: Tensor, guide: GuideDensity | None = None) -> Distribution:
        """The product, with batch shape ``()``."""
        zeros = vector_zeros(like, self.latent_shape)
        return dist.Laplace(zeros, zeros + self.scale, validate_args=False).to_event(len(self.latent_shape))
