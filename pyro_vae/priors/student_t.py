"""p(z) = prod_d t_df(z_d)."""

from __future__ import annotations

from typing import Annotated

import pyro.distributions as dist
from pydantic import Field
from torch import Tensor

from pyro_vae.priors.base import Distribution, GuideDensity, Prior, Shape, vector_zeros
from pyro_vae.registry import register


@register("priors", "student-t")
class StudentT(Prior):
    """Independent Student t latents: tails that fall as a power of z, so that outlying codes cost little.

    Mathieu et al. 2019, Disentangling Disentanglement, https://arxiv.org/abs/1812.02833, section 5.

    Args:
        df: degrees of freedom; the mean exists above 1, the variance above 2.
        scale: the scale of each latent.
    """

    formula = "p(z) = prod_d t_df(0, s)"

    def __init__(
        self,
        latent_shape: Shape,
        *,
        df: Annotated[float, Field(gt=0)] = 5.0,
        scale: Annotated[float, Field(gt=0)] = 1.0,
    ) -> None:
        super().__init__(latent_shape)
        self.df, self.scale = df, scale

    def forward(self, like: Tensor, guide: GuideDensity | None = None) -> Distribution:
        """The product, with batch shape ``()``."""
        zeros = vector_zeros(like, self.latent_shape)
        t = dist.StudentT(zeros + self.df, zeros, zeros + self.scale, validate_args=False)
        return t.to_event(len(self.latent_shape))
