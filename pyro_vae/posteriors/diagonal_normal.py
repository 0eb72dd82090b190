"""q(z | x) = N(mu(x), diag s(x)^2)."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor

from pyro_vae.networks.heads import Head, positive, positive_inverse
from pyro_vae.posteriors.base import Distribution, Posterior, Shape
from pyro_vae.registry import register


@register("posteriors", "diagonal-normal")
class DiagonalNormal(Posterior):
    """q(z | x) = N(z; mu(x), diag s(x)^2), reparameterized as z = mu(x) + s(x) * e, e ~ N(0, I).

    Kingma & Welling 2014, https://arxiv.org/abs/1312.6114, equation 9. Scales start at about 1.
    """

    formula = "q(z | x) = N(mu(x), diag s(x)^2)"

    def __init__(self, feature_shape: Shape, latent_shape: Shape) -> None:
        super().__init__(feature_shape, latent_shape)
        self.head = Head(feature_shape, latent_shape, num_params=2)
        self.head.set_bias(positive_inverse(1.0), param=1)

    def forward(self, features: Tensor) -> Distribution:
        """The normal, with batch shape the leading axes of ``features``."""
        loc, raw = self.head(features)
        return dist.Normal(loc, positive(raw), validate_args=False).to_event(len(self.latent_shape))
