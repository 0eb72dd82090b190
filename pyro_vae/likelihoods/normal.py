"""p(x | z) = N(f(z), diag s^2)."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor

from pyro_vae.likelihoods.base import Distribution
from pyro_vae.likelihoods.location_scale import LocationScale
from pyro_vae.registry import register


@register("likelihoods", "normal")
class Normal(LocationScale):
    """Independent normal pixels with mean f(z), or sigmoid f(z) for data in [0, 1].

    Kingma & Welling 2014, https://arxiv.org/abs/1312.6114, appendix C.2; with a linear decoder and a shared scale,
    probabilistic PCA (Tipping & Bishop 1999, https://doi.org/10.1111/1467-9868.00196).

    Args:
        scale: a number (fixed), ``"shared"`` (one learned scale), ``"per-pixel"`` (one learned scale per pixel) or
            ``"decoder"`` (a function of z, per pixel), in the units of x.
        mean: ``"identity"`` or ``"sigmoid"``.
        min_scale: what a learned scale cannot fall below, in the units of x, or in standard units where x is standardized.
    """

    formula = "p(x | z) = prod_d N(f_d(z), s_d^2)"

    def forward(self, features: Tensor) -> Distribution:
        """Normal with event shape ``event_shape``."""
        loc, scale = self.location_and_scale(features)
        return dist.Normal(loc, scale, validate_args=False).to_event(len(self.event_shape))
