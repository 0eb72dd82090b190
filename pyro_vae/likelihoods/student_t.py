"""p(x | z) = prod_d t_nu(f_d(z), s_d)."""

from __future__ import annotations

from typing import Annotated, Literal

import pyro.distributions as dist
import torch
from pydantic import Field
from torch import Tensor, nn

from pyro_vae.likelihoods.base import Distribution, Shape
from pyro_vae.likelihoods.location_scale import LocationScale
from pyro_vae.networks.heads import positive, positive_inverse
from pyro_vae.registry import register

MIN_DF = 1.0  # below it there is no mean


@register("likelihoods", "student-t")
class StudentT(LocationScale):
    """Independent Student t pixels: outliers cost the logarithm of their distance.

    Lange, Little & Taylor 1989, https://doi.org/10.1080/01621459.1989.10478852; in VAEs, Takahashi et al. 2018,
    https://doi.org/10.24963/ijcai.2018/374.

    Args:
        df: degrees of freedom: a number (fixed), or ``"learned"`` (one for all pixels, above 1, starting at 5).
        scale: a number (fixed), ``"shared"``, ``"per-pixel"`` or ``"decoder"``, as in :class:`LocationScale`.
        mean: ``"identity"`` or ``"sigmoid"``.
        min_scale: what a learned scale cannot fall below, in the units of x, or in standard units where x is standardized.
    """

    formula = "p(x | z) = prod_d t_nu(f_d(z), s_d)"

    def __init__(
        self,
        feature_shape: Shape,
        event_shape: Shape,
        *,
        df: Annotated[float, Field(gt=0)] | Literal["learned"] = "learned",
        scale: Annotated[float, Field(gt=0)] | Literal["shared", "per-pixel", "decoder"] = "shared",
        mean: Literal["identity", "sigmoid"] = "identity",
        min_scale: Annotated[float, Field(gt=0)] = 1e-3,
    ) -> None:
        super().__init__(feature_shape, event_shape, scale=scale, mean=mean, min_scale=min_scale)
        self.df = df
        if isinstance(df, str):
            self.raw_df = nn.Parameter(torch.tensor(positive_inverse(5.0, MIN_DF)))

    def forward(self, features: Tensor) -> Distribution:
        """The product, event shape ``event_shape``."""
        loc, scale = self.location_and_scale(features)
        df = positive(self.raw_df, MIN_DF) if isinstance(self.df, str) else loc.new_full((), self.df)
        return dist.StudentT(df, loc, scale, validate_args=False).to_event(len(self.event_shape))
