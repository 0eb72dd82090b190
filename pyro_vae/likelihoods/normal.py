"""p(x | z) = N(f(z), diag s^2)."""

from __future__ import annotations

from typing import Annotated, Literal

import pyro.distributions as dist
import torch
from pydantic import Field
from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_vae.likelihoods.base import Distribution, Likelihood, Shape
from pyro_vae.networks.heads import Head, positive, positive_inverse
from pyro_vae.registry import register

START_SCALE = 0.3  # a typical standard deviation of a pixel in [0, 1]


@register("likelihoods", "normal")
class Normal(Likelihood):
    """Independent normal pixels with mean f(z), or sigmoid f(z) for data in [0, 1].

    Kingma & Welling 2014, https://arxiv.org/abs/1312.6114, appendix C.2; with a linear decoder and a shared scale,
    probabilistic PCA (Tipping & Bishop 1999, https://doi.org/10.1111/1467-9868.00196).

    Args:
        scale: a number (fixed), ``"shared"`` (one learned scale), ``"per-pixel"`` (one learned scale per pixel) or
            ``"decoder"`` (a function of z, per pixel), in the units of x.
        mean: ``"identity"`` or ``"sigmoid"``.
        min_scale: what a learned scale cannot fall below, in the units of x.
    """

    formula = "p(x | z) = prod_d N(f_d(z), s_d^2)"
    data = "real"
    support = constraints.real

    def __init__(
        self,
        feature_shape: Shape,
        event_shape: Shape,
        *,
        scale: Annotated[float, Field(gt=0)] | Literal["shared", "per-pixel", "decoder"] = "shared",
        mean: Literal["identity", "sigmoid"] = "identity",
        min_scale: Annotated[float, Field(gt=0)] = 1e-3,
    ) -> None:
        super().__init__(feature_shape, event_shape)
        self.scale, self.mean, self.min_scale = scale, mean, min_scale
        self.head = Head(feature_shape, event_shape, num_params=2 if scale == "decoder" else 1)
        raw = positive_inverse(max(START_SCALE, 2 * min_scale), min_scale)
        if scale == "decoder":
            self.head.set_bias(raw, param=1)
        elif isinstance(scale, str):
            self.raw_scale = nn.Parameter(
                torch.full((1,) * len(event_shape) if scale == "shared" else event_shape, raw)
            )

    def forward(self, features: Tensor) -> Distribution:
        """Normal with event shape ``event_shape``."""
        loc, *raw = self.head(features)
        if self.mean == "sigmoid":
            loc = loc.sigmoid()
        if isinstance(self.scale, str):
            scale = positive(raw[0] if raw else self.raw_scale, self.min_scale)
        else:
            scale = torch.full((), self.scale, dtype=loc.dtype, device=loc.device)
        return dist.Normal(loc, scale, validate_args=False).to_event(len(self.event_shape))

    def start_at(self, mean: Tensor) -> None:
        """Output bias = the mean image, through the inverse of the mean's transformation."""
        self.head.set_bias(mean.clamp(1e-3, 1 - 1e-3).logit() if self.mean == "sigmoid" else mean)
