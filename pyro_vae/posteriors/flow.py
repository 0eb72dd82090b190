"""q(z | x) by a flow conditioned on the features: what the flow posteriors share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import pyro.distributions as dist
from pyro.distributions import transforms as T
from torch import Tensor

from pyro_vae.networks.bijections import Bijection
from pyro_vae.networks.flows import Flow
from pyro_vae.networks.heads import Head, positive, positive_inverse
from pyro_vae.posteriors.base import Distribution, Posterior, Shape


class FlowPosterior(Posterior):
    """z = mu(x) + s(x) * T_L(... T_1(e; x); x), e ~ N(0, I).

    Every distribution remembers the noise behind what it drew last, so that scoring its own draws is free of
    inversions. Subclasses choose the bijection and the kind of :class:`Flow`.
    """

    def __init__(
        self,
        feature_shape: Shape,
        latent_shape: Shape,
        bijection: Bijection,
        kind: Literal["autoregressive", "coupling"],
        layers: int,
        hidden: Sequence[int],
    ) -> None:
        super().__init__(feature_shape, latent_shape)
        self.head = Head(feature_shape, latent_shape, num_params=2)
        self.head.set_bias(positive_inverse(1.0), param=1)
        self.flow = Flow(latent_shape[0], bijection, kind, layers, hidden, context_dim=math.prod(feature_shape))

    def forward(self, features: Tensor) -> Distribution:
        """The flow's density, with batch shape the leading axes of ``features``."""
        loc, raw = self.head(features)
        context = features.reshape(*loc.shape[:-1], -1)
        base = dist.Normal(loc.new_zeros(loc.shape), loc.new_ones(()), validate_args=False).to_event(1)
        place = T.AffineTransform(loc, positive(raw), event_dim=1, cache_size=1)
        return dist.TransformedDistribution(base, [*self.flow.transforms(context), place], validate_args=False)
