"""p(z) uniform on the unit hypersphere."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_vae.errors import UserError
from pyro_vae.priors.base import Distribution, GuideDensity, Prior, Shape, vector_zeros
from pyro_vae.registry import register


@register("priors", "hypersphere-uniform")
class HypersphereUniform(Prior):
    """p(z) = 1 / area(S^(D-1)) for ||z|| = 1: no code is more likely than another, and none lies in the middle.

    The density is with respect to the surface, so that only a guide on the sphere goes with it. Davidson et al. 2018,
    Hyperspherical VAEs, https://arxiv.org/abs/1804.00891.
    """

    formula = "p(z) = 1 / area(S^(D-1)), ||z|| = 1"
    support = constraints.sphere

    def __init__(self, latent_shape: Shape) -> None:
        super().__init__(latent_shape)
        if latent_shape[-1] < 2:
            raise UserError(
                "the hypersphere-uniform prior needs latent_dim of at least 2: one coordinate has no sphere"
            )

    def forward(self, like: Tensor, guide: GuideDensity | None = None) -> Distribution:
        """The uniform distribution, with batch shape ``()``."""
        return UniformOnSphere(vector_zeros(like, self.latent_shape))


class UniformOnSphere(dist.TorchDistribution):
    """Uniform on the unit sphere in D dimensions, D >= 2.

    Args:
        like: ``(*batch_shape, D)``, for shape, device and dtype.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.sphere
    has_rsample = True

    def __init__(self, like: Tensor) -> None:
        self.like = like
        super().__init__(like.shape[:-1], like.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> UniformOnSphere:
        """The same density for every element of a batch."""
        return UniformOnSphere(self.like.expand(torch.Size(batch_shape) + self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Minus the log-area, ``(*leading,)``."""
        half = self.event_shape[0] / 2
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return value.new_zeros(shape) + (math.lgamma(half) - math.log(2) - half * math.log(math.pi))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws ``(*sample_shape, *batch_shape, D)``: normal vectors, normalised."""
        noise = torch.randn(self._extended_shape(sample_shape), dtype=self.like.dtype, device=self.like.device)
        return torch.nn.functional.normalize(noise, dim=-1)

    @property
    def mean(self) -> Tensor:
        """The origin, which is not on the sphere."""
        return torch.zeros_like(self.like)
