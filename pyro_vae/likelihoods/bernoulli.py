"""p(x | z) = prod_d Bernoulli(x_d; sigmoid(f_d(z)))."""

from __future__ import annotations

import pyro.distributions as dist
from pyro.distributions import constraints
from torch import Tensor

from pyro_vae.likelihoods.base import Distribution, Likelihood, Shape
from pyro_vae.networks.heads import Head
from pyro_vae.registry import register


@register("likelihoods", "bernoulli")
class Bernoulli(Likelihood):
    """Independent pixels in {0, 1} with logits f(z); grey values are not in its support.

    Kingma & Welling 2014, https://arxiv.org/abs/1312.6114, appendix C.1. The output bias starts at the logit of the
    training mean, clipped to [0.001, 0.999], as in Burda, Grosse & Salakhutdinov 2016.
    """

    formula = "p(x | z) = prod_d Bernoulli(sigmoid f_d(z))"
    data = "binary"
    support = constraints.boolean

    def __init__(self, feature_shape: Shape, event_shape: Shape) -> None:
        super().__init__(feature_shape, event_shape)
        self.head = Head(feature_shape, event_shape)

    def forward(self, features: Tensor) -> Distribution:
        """Bernoulli on logits, event shape ``event_shape``."""
        (logits,) = self.head(features)
        return dist.Bernoulli(logits=logits, validate_args=False).to_event(len(self.event_shape))

    def start_at(self, mean: Tensor) -> None:
        """Output bias = logit of the mean image."""
        self.head.set_bias(mean.clamp(1e-3, 1 - 1e-3).logit())
