"""q(z | x) = prod_d Bernoulli(z_d; p_d(x)), with the score-function gradient."""

from __future__ import annotations

import pyro.distributions as dist
from pyro.distributions import constraints
from torch import Tensor

from pyro_vae.networks.heads import Head
from pyro_vae.posteriors.base import Distribution, Posterior, Shape
from pyro_vae.registry import register


@register("posteriors", "bernoulli")
class Bernoulli(Posterior):
    """Binary latents, not reparameterized: the gradient is E[(log p(x, z) - log q(z | x)) grad log q(z | x)].

    Unbiased, and of high variance: Mnih & Gregor 2014, NVIL, https://arxiv.org/abs/1402.0030.
    """

    formula = "q(z | x) = prod_d Bernoulli(p_d(x))"
    support = constraints.independent(constraints.boolean, 1)
    reparameterized = False

    def __init__(self, feature_shape: Shape, latent_shape: Shape) -> None:
        super().__init__(feature_shape, latent_shape)
        self.head = Head(feature_shape, latent_shape)

    def forward(self, features: Tensor) -> Distribution:
        """The product, with batch shape the leading axes of ``features``."""
        (logits,) = self.head(features)
        return dist.Bernoulli(logits=logits, validate_args=False).to_event(len(self.latent_shape))
