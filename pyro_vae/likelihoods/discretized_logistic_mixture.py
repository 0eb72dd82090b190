"""p(x | z) = prod_d a mixture of discretized logistics."""

from __future__ import annotations

from typing import Annotated

import pyro.distributions as dist
import torch
from pydantic import Field
from torch import Tensor

from pyro_vae.likelihoods.base import Distribution, Likelihood, Shape
from pyro_vae.likelihoods.discretized_logistic import MIN_SCALE, START_SCALE, LogisticLevel
from pyro_vae.likelihoods.lattice import Lattice, lattice
from pyro_vae.networks.heads import Head, positive, positive_inverse
from pyro_vae.registry import register


@register("likelihoods", "discretized-logistic-mixture")
class DiscretizedLogisticMixture(Likelihood):
    """P(level) = sum_k w_k(z) [sigma((x + h - m_k(z)) / s_k(z)) - sigma((x - h - m_k(z)) / s_k(z))], outermost bins open.

    Salimans et al. 2017, PixelCNN++, https://arxiv.org/abs/1701.05517; pixels and colours are independent given z (their
    mixtures share one indicator per pixel and chain the colours). Components start spread evenly over [0, 1].

    Args:
        levels: what the data declare: 256 for 8-bit images, 17 for the digits.
        components: of each pixel's mixture.
    """

    formula = "p(x | z) = prod_d sum_k w_dk(z) Logistic(bin of x_d; m_dk(z), s_dk(z))"
    data = "lattice"
    support = lattice(256)

    def __init__(
        self,
        feature_shape: Shape,
        event_shape: Shape,
        *,
        levels: Annotated[int, Field(ge=2, le=65_536)] = 256,
        components: Annotated[int, Field(ge=1, le=1000)] = 5,
    ) -> None:
        super().__init__(feature_shape, event_shape)
        self.levels, self.support, self.components = levels, lattice(levels), components  # type: ignore[misc]
        self.head = Head(feature_shape, event_shape, num_params=3 * components)
        for k in range(components):
            self.head.set_bias((k + 0.5) / components, param=components + k)
            self.head.set_bias(positive_inverse(START_SCALE, MIN_SCALE), param=2 * components + k)

    def forward(self, features: Tensor) -> Distribution:
        """The product of mixtures, event shape ``event_shape``."""
        logits, loc, raw = torch.stack(self.head(features), -1).chunk(3, -1)
        parts = LogisticLevel(loc, positive(raw, MIN_SCALE), self.levels)
        weights = dist.Categorical(logits=logits, validate_args=False)
        mixture = dist.MixtureSameFamily(weights, parts, validate_args=False)
        return Lattice(mixture, self.levels).to_event(len(self.event_shape))
