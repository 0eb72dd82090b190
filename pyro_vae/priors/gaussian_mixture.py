"""p(z) = sum_k w_k N(mu_k, diag s_k^2)."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import pyro.distributions as dist
import torch
from pydantic import Field
from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_vae.networks.heads import positive, positive_inverse
from pyro_vae.priors.base import Distribution, GuideDensity, Prior, Shape
from pyro_vae.registry import register

MIN_SCALE = 1e-2  # of a component: keeps the expansion of its squares exact to about 1e-3 nats in float32


@register("priors", "gaussian-mixture")
class GaussianMixture(Prior):
    """p(z) = sum_k w_k N(z; mu_k, diag s_k^2), weights, means and scales learned (or left at their start).

    Means start as draws of N(0, spread^2 I), scales at 1, weights equal. For clustering by a mixture of this kind see
    Dilokthanakul et al. 2016, https://arxiv.org/abs/1611.02648.

    Args:
        components: the number of components K.
        spread: standard deviation of the means at the start.
        learned: whether the mixture is trained.
    """

    formula = "p(z) = sum_k w_k N(mu_k, diag s_k^2)"

    def __init__(
        self,
        latent_shape: Shape,
        *,
        components: Annotated[int, Field(ge=1, le=1_000_000)] = 10,
        spread: Annotated[float, Field(ge=0)] = 1.0,
        learned: bool = True,
    ) -> None:
        super().__init__(latent_shape)
        loc = spread * torch.randn(components, *latent_shape)
        self.logits = nn.Parameter(torch.zeros(components), requires_grad=learned)
        self.loc = nn.Parameter(loc, requires_grad=learned)
        self.raw_scale = nn.Parameter(torch.full_like(loc, positive_inverse(1.0, MIN_SCALE)), requires_grad=learned)

    def forward(self, like: Tensor, guide: GuideDensity | None = None) -> Distribution:
        """The mixture, with batch shape ``()``."""
        return DiagonalMixture(self.logits, self.loc, positive(self.raw_scale, MIN_SCALE))


class DiagonalMixture(dist.TorchDistribution):
    """sum_k w_k N(mu_k, diag s_k^2) on vectors, scored by matrix products.

    -2 log N = sum_d (z_d - mu_kd)^2 / s_kd^2 + ... expands into one product of (z^2, z) with a ``(K, 2 D)`` matrix, so that
    scoring n points takes memory for n * K numbers, not n * K * D.

    Args:
        logits: unnormalised log-weights ``(K,)``.
        loc, scale: means and standard deviations ``(K, D)``.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, logits: Tensor, loc: Tensor, scale: Tensor, batch_shape: torch.Size = torch.Size()) -> None:
        self.logits, self.loc, self.scale = logits, loc, scale
        super().__init__(batch_shape, loc.shape[1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiagonalMixture:
        """The same density for every element of a batch."""
        return DiagonalMixture(self.logits, self.loc, self.scale, torch.Size(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log p(z) ``(*leading,)`` of ``value`` ``(*leading, D)``."""
        precision = self.scale.square().reciprocal()
        # distances from the weighted centre, so that the expansion loses no digits where the mixture is far from zero
        centre = (self.logits.softmax(0).unsqueeze(-1) * self.loc).sum(0).detach()
        z, loc = value - centre, self.loc - centre
        weighted = loc * precision
        square = torch.cat([z.square(), z], -1) @ torch.cat([precision, -2 * weighted], -1).T + (loc * weighted).sum(-1)
        log_normal = (
            -0.5 * square.clamp(min=0.0) - self.scale.log().sum(-1) - 0.5 * math.log(2 * math.pi) * self.loc.shape[-1]
        )
        log_prob = (log_normal + self.logits.log_softmax(0)).logsumexp(-1)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    @property
    def mean(self) -> Tensor:
        """sum_k w_k mu_k."""
        return (self.logits.softmax(0) @ self.loc).expand(self.batch_shape + self.event_shape)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws ``(*sample_shape, *batch_shape, D)``: a component by its weight, then a point of it."""
        with torch.no_grad():
            shape = torch.Size(sample_shape) + self.batch_shape
            component = torch.multinomial(self.logits.softmax(0), max(1, shape.numel()), replacement=True)
            noise = torch.randn(len(component), *self.event_shape, dtype=self.loc.dtype, device=self.loc.device)
            z = self.loc[component] + self.scale[component] * noise
            return z[: shape.numel()].reshape(shape + self.event_shape)
