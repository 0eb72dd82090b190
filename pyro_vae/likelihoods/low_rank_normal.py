"""p(x | z) = N(f(z), W W^T + diag s^2)."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import pyro.distributions as dist
import torch
from pydantic import Field
from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_vae.likelihoods.base import Distribution, Likelihood, Shape
from pyro_vae.likelihoods.units import By
from pyro_vae.networks.heads import Head, positive, positive_inverse
from pyro_vae.registry import register

START_SCALE = 0.3


@register("likelihoods", "low-rank-normal")
class LowRankNormal(Likelihood):
    """A normal whose residuals are correlated along ``rank`` directions, learned once or given by the decoder.

    With fixed directions and a linear decoder, factor analysis with more factors; given by the decoder, Monteiro et
    al. 2020, https://arxiv.org/abs/2006.06015 and Dorta et al. 2018, https://arxiv.org/abs/1804.01050. Scoring takes
    products with ``(D, rank)`` matrices and a Cholesky factor of size ``rank``.

    Args:
        rank: the number of directions, columns of W.
        covariance: ``"shared"`` (one W and s, learned) or ``"decoder"`` (functions of z).
        mean: ``"identity"`` or ``"sigmoid"``.
        min_scale: what s cannot fall below, in the units of x, or in standard units where x is standardized.
    """

    formula = "p(x | z) = N(f(z), W W^T + diag s^2)"
    data = "real"
    support = constraints.real

    def __init__(
        self,
        feature_shape: Shape,
        event_shape: Shape,
        *,
        rank: Annotated[int, Field(ge=1, le=10_000)] = 5,
        covariance: Literal["shared", "decoder"] = "shared",
        mean: Literal["identity", "sigmoid"] = "identity",
        min_scale: Annotated[float, Field(gt=0)] = 1e-2,
    ) -> None:
        super().__init__(feature_shape, event_shape)
        self.covariance, self.mean, self.min_scale, self.rank = covariance, mean, min_scale, rank
        raw = positive_inverse(max(START_SCALE, 2 * min_scale), min_scale)
        self.head = Head(feature_shape, event_shape, num_params=1 if covariance == "shared" else 2 + rank)
        if covariance == "shared":
            self.raw_scale = nn.Parameter(torch.full((math.prod(event_shape),), raw))
            self.factor = nn.Parameter(0.01 * torch.randn(math.prod(event_shape), rank))
        else:
            self.head.set_bias(raw, param=1)
            for direction in range(rank):
                self.head.set_bias(0.01 * torch.randn(event_shape), param=2 + direction)

    def forward(self, features: Tensor) -> Distribution:
        """The normal, event shape ``event_shape``."""
        loc, *rest = self.head(features)
        loc = loc.sigmoid() if self.mean == "sigmoid" else loc
        raw: Tensor = self.raw_scale if self.covariance == "shared" else rest[0].flatten(-len(self.event_shape))
        columns = [t.flatten(-len(self.event_shape)) for t in rest[1:]]
        factor: Tensor = self.factor if self.covariance == "shared" else torch.stack(columns, -1)
        scale = positive(raw, self.min_scale)
        if self.units is not None:
            unit = self.units.scale.expand(self.event_shape).flatten()
            loc, factor, scale = self.units.back(loc), unit.unsqueeze(-1) * factor, unit * scale
        return Correlated(loc, factor, scale, len(self.event_shape))

    @property
    def standardizes(self) -> By | None:
        """By columns: each has a scale of its own."""
        return None if self.mean == "sigmoid" else "columns"

    @torch.no_grad()
    def start_at(self, mean: Tensor, spread: float | None = None) -> None:
        """Output bias = the mean image, through the inverse of the mean's transformation; s = the spread."""
        self.head.set_bias(mean.clamp(1e-3, 1 - 1e-3).logit() if self.mean == "sigmoid" else mean)
        if spread is not None:
            raw = positive_inverse(max(spread, 2 * self.min_scale), self.min_scale)
            if self.covariance == "shared":
                self.raw_scale.fill_(raw)
            else:
                self.head.set_bias(raw, param=1)


class Correlated(dist.TorchDistribution):
    """N(m, W W^T + diag s^2) on events of any shape, with nothing that waits for the device.

    With V = W / s, r = (x - m) / s and I + V^T V = L L^T, the squared distance is min_y |r - V y|^2 + |y|^2, at
    y = (L L^T)^-1 V^T r: Woodbury's identity without its difference of large numbers, which could only flatter x.

    Args:
        loc: m ``(*batch_shape, *event_shape)``.
        factor: W ``(D, rank)``, D the number of entries of an event, or ``(*batch_shape, D, rank)``.
        scale: s ``(D,)`` or ``(*batch_shape, D)``.
        event_dim: the number of event axes.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(self, loc: Tensor, factor: Tensor, scale: Tensor, event_dim: int) -> None:
        self.loc, self.factor, self.scale = loc, factor, scale
        super().__init__(loc.shape[:-event_dim], loc.shape[-event_dim:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Correlated:
        """The same for every element of a batch."""
        loc = self.loc.expand(torch.Size(batch_shape) + self.event_shape)
        return Correlated(loc, self.factor, self.scale, len(self.event_shape))

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        """All real events."""
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def mean(self) -> Tensor:
        """M."""
        return self.loc

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density ``(*leading,)``."""
        residual = (value - self.loc).flatten(-len(self.event_shape)) / self.scale
        scaled = self.factor / self.scale.unsqueeze(-1)
        identity = torch.eye(scaled.shape[-1], dtype=scaled.dtype, device=scaled.device)
        tril = torch.linalg.cholesky_ex(scaled.mT @ scaled + identity).L  # eigenvalues of 1 and more
        inverse = torch.linalg.solve_triangular(tril, identity, upper=False)
        along = residual.unsqueeze(-2) @ scaled @ inverse.mT @ inverse
        square = (residual - (along @ scaled.mT).squeeze(-2)).square().sum(-1) + along.square().sum((-2, -1))
        log_scale = self.scale.log().sum(-1) + tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * square - log_scale - 0.5 * math.log(2 * math.pi) * self.event_shape.numel()

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws ``(*sample_shape, *batch_shape, *event_shape)``."""
        shape = self._extended_shape(sample_shape)
        leading = shape[: len(shape) - len(self.event_shape)]
        along = self.loc.new_empty(*leading, 1, self.factor.shape[-1]).normal_() @ self.factor.mT
        noise = along.squeeze(-2) + self.scale * self.loc.new_empty(*leading, self.factor.shape[-2]).normal_()
        return self.loc + noise.reshape(shape)
