"""q(z | x) = N(mu(x), L(x) L(x)^T)."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.networks.heads import Head, positive, positive_inverse
from pyro_vae.posteriors.base import Distribution, Posterior, Shape
from pyro_vae.registry import register

MIN_SCALE = 1e-4


@register("posteriors", "full-rank-normal")
class FullRankNormal(Posterior):
    """A normal with a lower-triangular L(x), its diagonal positive: every covariance, at D (D + 1) / 2 outputs.

    The exact family where the model is linear and normal. Titsias & Lazaro-Gredilla 2014,
    https://proceedings.mlr.press/v32/titsias14.html. Starts near N(0, I).
    """

    formula = "q(z | x) = N(mu(x), L(x) L(x)^T)"
    where: Tensor

    def __init__(self, feature_shape: Shape, latent_shape: Shape) -> None:
        super().__init__(feature_shape, latent_shape)
        dim = latent_shape[0]
        self.head = Head(feature_shape, latent_shape, num_params=2)
        self.head.set_bias(positive_inverse(1.0, MIN_SCALE), param=1)
        # the entries (diagonal, below it, zero) that each element of L is
        where = torch.full((dim, dim), dim + dim * (dim - 1) // 2)
        where[torch.arange(dim), torch.arange(dim)] = torch.arange(dim)
        row, column = torch.tril_indices(dim, dim, -1)
        where[row, column] = dim + torch.arange(len(row))
        self.register_buffer("where", where.reshape(-1), persistent=False)
        self.below = Head(feature_shape, (len(row),)) if dim > 1 else None
        if self.below is not None:
            self.below.scale_weight(0.1)

    def forward(self, features: Tensor) -> Distribution:
        """The normal, with batch shape the leading axes of ``features``."""
        loc, raw = self.head(features)
        below = self.below(features) if self.below is not None else ()
        entries = torch.cat([positive(raw, MIN_SCALE), *below, torch.zeros_like(loc[..., :1])], -1)
        scale_tril = entries.index_select(-1, self.where).reshape(*loc.shape, loc.shape[-1])
        return CholeskyNormal(loc, scale_tril=scale_tril, validate_args=False)


class CholeskyNormal(dist.MultivariateNormal):
    """A multivariate normal that scores its last draw by the noise behind it, and any other point by solving for it.

    Solving for the noise of a draw loses cond(L) in rounding: log q is then far too low, the ELBO too high, and training
    goes after the error until nothing else is left.
    """

    _drawn: tuple[Tensor, Tensor] | None = None

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws ``(*sample_shape, *batch_shape, D)``."""
        noise = self.loc.new_empty(self._extended_shape(sample_shape)).normal_()
        z = self.loc + (self._unbroadcasted_scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
        self._drawn = (z, noise)
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density ``(*leading,)``."""
        if self._drawn is None or value is not self._drawn[0]:
            return super().log_prob(value)
        log_scale = self._unbroadcasted_scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * (self._drawn[1].square() + math.log(2 * math.pi)).sum(-1) - log_scale
