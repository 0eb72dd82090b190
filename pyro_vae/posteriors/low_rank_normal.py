"""q(z | x) = N(mu(x), W(x) W(x)^T + diag s(x)^2)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from pyro_vae.networks.heads import Head, positive, positive_inverse
from pyro_vae.posteriors.base import Distribution, Posterior, Shape
from pyro_vae.posteriors.full_rank_normal import CholeskyNormal
from pyro_vae.registry import register

MIN_SCALE = 1e-4
LIMIT = 30.0  # of an entry of W beside its s: keeps the Cholesky factor exact in float32


@register("posteriors", "low-rank-normal")
class LowRankNormal(Posterior):
    """A normal whose covariance is diagonal plus ``rank`` directions; its Cholesky factor is made once per image.

    Rezende, Mohamed & Wierstra 2014, https://arxiv.org/abs/1401.4082 (with one direction); Ong, Nott &
    Smith 2018, https://arxiv.org/abs/1701.03208. Starts near N(0, I).

    Args:
        rank: the number of directions, columns of W.
    """

    formula = "q(z | x) = N(mu(x), W(x) W(x)^T + diag s(x)^2)"

    def __init__(
        self, feature_shape: Shape, latent_shape: Shape, *, rank: Annotated[int, Field(ge=1, le=10_000)] = 5
    ) -> None:
        super().__init__(feature_shape, latent_shape)
        self.head = Head(feature_shape, latent_shape, num_params=2)
        self.head.set_bias(positive_inverse(1.0, MIN_SCALE), param=1)
        self.factor = Head(feature_shape, (*latent_shape, rank))
        self.factor.scale_weight(0.1)

    def forward(self, features: Tensor) -> Distribution:
        """The normal, with batch shape the leading axes of ``features``."""
        loc, raw = self.head(features)
        scale = positive(raw, MIN_SCALE)
        relative = LIMIT * (self.factor(features)[0] / LIMIT).tanh()  # W = diag(s) relative
        identity = torch.eye(loc.shape[-1], dtype=loc.dtype, device=loc.device)
        # eigenvalues of 1 and more; cholesky_ex does not wait for the device to say so
        tril = torch.linalg.cholesky_ex(relative @ relative.mT + identity).L
        return CholeskyNormal(loc, scale_tril=scale.unsqueeze(-1) * tril, validate_args=False)
