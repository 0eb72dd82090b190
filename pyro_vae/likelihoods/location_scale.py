"""What the normal, Laplace and Student t likelihoods share: a location from the decoder, and a scale."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_vae.likelihoods.base import Likelihood, Shape
from pyro_vae.likelihoods.units import By
from pyro_vae.networks.heads import Head, positive, positive_inverse

START_SCALE = 0.3  # a typical scale of a pixel in [0, 1]


class LocationScale(Likelihood):
    """Independent entries with location f(z), or sigmoid f(z) for data in [0, 1], and scale s.

    Args:
        scale: a number (fixed), ``"shared"`` (one learned scale), ``"per-pixel"`` (one learned scale per pixel) or
            ``"decoder"`` (a function of z, per pixel), in the units of x.
        mean: ``"identity"`` or ``"sigmoid"``.
        min_scale: what a learned scale cannot fall below, in the units of x, or in standard units where x is standardized.
    """

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

    def location_and_scale(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Both ``(*leading, *event_shape)``, or of a shape that broadcasts to it."""
        loc, *raw = self.head(features)
        loc = loc.sigmoid() if self.mean == "sigmoid" else loc
        loc = loc if self.units is None else self.units.back(loc)
        if not isinstance(self.scale, str):
            return loc, torch.full((), self.scale, dtype=loc.dtype, device=loc.device)
        scale = positive(raw[0] if raw else self.raw_scale, self.min_scale)
        return loc, scale if self.units is None else self.units.scale * scale

    @property
    def standardizes(self) -> By | None:
        """By columns where each has a scale of its own; not where the mean is declared to lie in (0, 1)."""
        if self.mean == "sigmoid":
            return None
        return "columns" if self.scale in ("per-pixel", "decoder") else "one"

    @torch.no_grad()
    def start_at(self, mean: Tensor, spread: float | None = None) -> None:
        """Output bias = the mean image, through the inverse of the mean's transformation; learned scales = the spread."""
        self.head.set_bias(mean.clamp(1e-3, 1 - 1e-3).logit() if self.mean == "sigmoid" else mean)
        if spread is not None and isinstance(self.scale, str):
            raw = positive_inverse(max(spread, 2 * self.min_scale), self.min_scale)
            if self.scale == "decoder":
                self.head.set_bias(raw, param=1)
            else:
                self.raw_scale.fill_(raw)
