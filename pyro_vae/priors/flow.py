"""p(z) by a flow from N(0, I): what the flow priors share."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor

from pyro_vae.networks.flows import Flow
from pyro_vae.priors.base import Distribution, GuideDensity, Prior, Shape, vector_zeros


class FlowPrior(Prior):
    """log p(z) = log N(f(z); 0, I) + log|det df/dz|, f a :class:`Flow`: scored in one pass per layer.

    Args:
        flow: of ``latent_shape[0]`` coordinates, without a context.
    """

    def __init__(self, latent_shape: Shape, flow: Flow) -> None:
        super().__init__(latent_shape)
        self.flow = flow

    def forward(self, like: Tensor, guide: GuideDensity | None = None) -> Distribution:
        """The flow's density, with batch shape ``()``."""
        zeros = vector_zeros(like, self.latent_shape)
        base = dist.Normal(zeros, zeros + 1, validate_args=False).to_event(1)
        backwards = [transform.inv for transform in reversed(self.flow.transforms())]
        return dist.TransformedDistribution(base, backwards, validate_args=False)
