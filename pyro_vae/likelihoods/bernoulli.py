"""p(x | z) = prod_d Bernoulli(x_d; sigmoid(f_d(z)))."""

from __future__ import annotations

import pyro.distributions as dist
import torch.nn.functional as F
from pyro.distributions import constraints
from torch import Tensor

from pyro_vae.likelihoods.base import Distribution, Likelihood, Shape
from pyro_vae.networks.heads import Head
from pyro_vae.registry import register


class BinaryBernoulli(dist.Bernoulli):
    """Bernoulli on logits l whose values are 0 or 1 and nothing between: log p(x) = log sigmoid((2 x - 1) l).

    As exact as the cross-entropy, which is defined between 0 and 1 too, in half its time.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Of every pixel."""
        if self._validate_args:
            self._validate_sample(value)
        return F.softplus((2 * value - 1) * self.logits, beta=-1)  # log sigmoid, in one pass over memory


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
        return BinaryBernoulli(logits=logits, validate_args=False).to_event(len(self.event_shape))

    def start_at(self, mean: Tensor) -> None:
        """Output bias = logit of the mean image."""
        self.head.set_bias(mean.clamp(1e-3, 1 - 1e-3).logit())
