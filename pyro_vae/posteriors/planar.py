"""q(z | x) by planar flow."""

from __future__ import annotations

from typing import Annotated

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pydantic import Field
from pyro.distributions import transforms as T
from pyro.distributions.transforms.planar import ConditionedPlanar
from torch import Tensor

from pyro_vae.networks.heads import Head, positive, positive_inverse
from pyro_vae.posteriors.base import Distribution, Posterior, Shape
from pyro_vae.registry import register

BOUND = 5.0  # of the entries of v and w


class _Plane(ConditionedPlanar):
    """A planar layer that stays invertible, and finite, where w vanishes.

    Invertible is what has v . w > -1; Pyro adds to v a multiple of w / |w|^2 to that end. Where |w|^2 is below 1 / (4 D BOUND^2),
    v . w is above -1/2 as it is, and |w|^2 is held there.
    """

    def u_hat(self, u: Tensor, w: Tensor) -> Tensor:
        """The direction in place of v."""
        alpha = (u * w).sum(-1, keepdim=True)
        least = 1 / (4 * w.shape[-1] * BOUND**2)
        return u + (F.softplus(alpha) - 1 - alpha) * w / w.square().sum(-1, keepdim=True).clamp(min=least)


@register("posteriors", "planar")
class Planar(Posterior):
    """z = mu(x) + s(x) * T_K(... T_1(e)), T_k(u) = u + v_k(x) tanh(w_k(x) . u + b_k(x)), e ~ N(0, I).

    Rezende & Mohamed 2015, https://arxiv.org/abs/1505.05770. The inverse has no closed form: a distribution scores
    what it drew last, through the noise that it remembers, and nothing else.

    Args:
        layers: the number K of planar layers.
    """

    formula = "q(z | x): z = mu(x) + s(x) T(e; x), T planar, e ~ N(0, I)"
    scoring = "impossible"

    def __init__(
        self, feature_shape: Shape, latent_shape: Shape, *, layers: Annotated[int, Field(ge=1, le=1000)] = 8
    ) -> None:
        super().__init__(feature_shape, latent_shape)
        self.head = Head(feature_shape, latent_shape, num_params=2)
        self.head.set_bias(positive_inverse(1.0), param=1)
        self.directions = Head(feature_shape, (layers, *latent_shape), num_params=2)
        self.directions.scale_weight(0.1)
        for param in range(2):  # away from w = 0, where a layer does nothing
            self.directions.set_bias(torch.randn(layers, *latent_shape) / latent_shape[0] ** 0.5, param)
        self.offsets = Head(feature_shape, (layers,))

    def forward(self, features: Tensor) -> Distribution:
        """The flow's density, with batch shape the leading axes of ``features``."""
        loc, raw = self.head(features)
        u, w = (BOUND * (d / BOUND).tanh() for d in self.directions(features))
        (b,) = self.offsets(features)
        base = dist.Normal(loc.new_zeros(loc.shape), loc.new_ones(()), validate_args=False).to_event(1)
        planes = [_Plane((b[..., k : k + 1], u[..., k, :], w[..., k, :])) for k in range(self.offsets.event_shape[0])]
        place = T.AffineTransform(loc, positive(raw), event_dim=1, cache_size=1)
        return dist.TransformedDistribution(base, [*planes, place], validate_args=False)
