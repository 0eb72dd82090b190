"""p(x | z) = prod_d Laplace(f_d(z), s_d)."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor

from pyro_vae.likelihoods.base import Distribution
from pyro_vae.likelihoods.location_scale import LocationScale
from pyro_vae.registry import register


@register("likelihoods", "laplace")
class Laplace(LocationScale):
    """Independent Laplace pixels: the normalised form of an L1 reconstruction loss, less swayed by outlying pixels.

    Its options are those of :class:`LocationScale`. Reference: Kotz, Kozubowski & Podgorski 2001,
    https://doi.org/10.1007/978-1-4612-0173-1.
    """

    formula = "p(x | z) = prod_d Laplace(f_d(z), s_d)"

    def forward(self, features: Tensor) -> Distribution:
        """The product, event shape ``event_shape``."""
        loc, scale = self.location_and_scale(features)
        return dist.Laplace(loc, scale, validate_args=False).to_event(len(self.event_shape))
