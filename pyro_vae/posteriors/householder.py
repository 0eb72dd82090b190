"""q(z | x) by Householder reflections of a diagonal normal."""

from __future__ import annotations

from typing import Annotated

import pyro.distributions as dist
import torch
from pydantic import Field
from pyro.distributions import transforms as T
from pyro.distributions.transforms.householder import ConditionedHouseholder
from torch import Tensor

from pyro_vae.networks.heads import Head, positive, positive_inverse
from pyro_vae.posteriors.base import Distribution, Posterior, Shape
from pyro_vae.registry import register


@register("posteriors", "householder")
class Householder(Posterior):
    """z = mu(x) + H_K(x) ... H_1(x) (s(x) * e), e ~ N(0, I), each H_k = I - 2 v v^T / ||v||^2 a reflection.

    A normal with covariance H diag(s^2) H^T, scored in closed form since a reflection is its own inverse: ``count`` = D
    of them reach every covariance. Tomczak & Welling 2016, https://arxiv.org/abs/1611.09630, who reflect the mean as
    well: the same family, slower to train.

    Args:
        count: the number K of reflections.
    """

    formula = "q(z | x) = N(mu(x), H(x) diag s(x)^2 H(x)^T), H reflections"

    def __init__(
        self, feature_shape: Shape, latent_shape: Shape, *, count: Annotated[int, Field(ge=1, le=1000)] = 10
    ) -> None:
        super().__init__(feature_shape, latent_shape)
        self.head = Head(feature_shape, latent_shape, num_params=2)
        self.head.set_bias(positive_inverse(1.0), param=1)
        self.vectors = Head(feature_shape, (count, *latent_shape))
        self.vectors.scale_weight(0.1)
        self.vectors.set_bias(torch.nn.functional.normalize(torch.randn(count, *latent_shape), dim=-1))

    def forward(self, features: Tensor) -> Distribution:
        """The rotated normal, with batch shape the leading axes of ``features``."""
        loc, raw = self.head(features)
        (vectors,) = self.vectors(features)
        # the largest entry is 1: no vector is too long or too short to be normalised
        vectors = vectors / vectors.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(vectors.dtype).tiny)
        base = dist.Normal(loc.new_zeros(loc.shape), positive(raw), validate_args=False).to_event(1)
        place = T.AffineTransform(loc, 1.0, event_dim=1, cache_size=1)
        return Reflected(base, [ConditionedHouseholder(vectors), place], validate_args=False)


class Reflected(dist.TransformedDistribution):
    """A centred distribution, reflected and moved: its mean is where it was moved to."""

    @property
    def mean(self) -> Tensor:
        """``(*batch_shape, D)``."""
        loc: Tensor = self.transforms[-1].loc
        return loc.expand(self.batch_shape + self.event_shape)
