"""p(x | z) = prod_d Poisson(mu_d(z))."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.likelihoods.base import Distribution, InFloat64, Shape
from pyro_vae.likelihoods.counts import Counts, Library
from pyro_vae.networks.heads import positive
from pyro_vae.registry import register


@register("likelihoods", "poisson")
class Poisson(Counts):
    """Independent counts whose variance is their mean.

    For counts of words or molecules; Zhao et al. 2020, https://arxiv.org/abs/1905.00616, compare it with the negative
    binomial.

    Args:
        library: the mean of the total count of an event, shared out by a softmax; None for rates of their own.
    """

    formula = "p(x | z) = prod_d Poisson(mu_d(z))"

    def __init__(self, feature_shape: Shape, event_shape: Shape, *, library: Library = None) -> None:
        super().__init__(feature_shape, event_shape, 1, library)

    def forward(self, features: Tensor) -> Distribution:
        """The product, event shape ``event_shape``."""
        f = self.head(features)[0]
        # of a rate in float32 its logarithm, and what is made of that again, would lose digits
        rate = positive(f) if self.size_factor is None else self.log_mean(f).exp()
        # a rate that underflows to 0 would make every count but 0 impossible
        rate = rate.clamp(min=torch.finfo(rate.dtype).tiny)
        return PoissonInFloat64(rate, validate_args=False).to_event(len(self.event_shape))


class PoissonInFloat64(InFloat64, dist.Poisson):
    """The Poisson distribution."""
