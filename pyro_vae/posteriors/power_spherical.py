"""q(z | x) = PowerSpherical(mu(x), kappa(x)) on the unit hypersphere."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_vae.errors import UserError
from pyro_vae.networks.heads import Head, positive, positive_inverse
from pyro_vae.posteriors.base import Distribution, Posterior, Shape
from pyro_vae.registry import register

MAX_CONCENTRATION = 1e4  # beyond, float32 cannot tell a draw from its mean direction
START_CONCENTRATION = 10.0


@register("posteriors", "power-spherical")
class PowerSphericalPosterior(Posterior):
    """q(z | x) proportional to (1 + mu(x) . z)^kappa(x) on ||z|| = 1: a von Mises-Fisher with everything in closed form.

    De Cao & Aziz 2020, https://arxiv.org/abs/2006.04437. Densities are with respect to the surface.
    """

    formula = "q(z | x) = PowerSpherical(mu(x), kappa(x)), ||z|| = 1"
    support = constraints.sphere

    def __init__(self, feature_shape: Shape, latent_shape: Shape) -> None:
        super().__init__(feature_shape, latent_shape)
        if latent_shape[-1] < 2:
            raise UserError(
                "the power-spherical posterior needs latent_dim of at least 2: one coordinate has no sphere"
            )
        self.direction = Head(feature_shape, latent_shape)
        self.direction.set_bias(torch.nn.functional.normalize(torch.randn(latent_shape), dim=-1))
        self.concentration = Head(feature_shape, (1,))
        self.concentration.set_bias(positive_inverse(START_CONCENTRATION))

    def forward(self, features: Tensor) -> Distribution:
        """The distribution, with batch shape the leading axes of ``features``."""
        (direction,), (raw,) = self.direction(features), self.concentration(features)
        # the largest entry is 1: no vector is too long or too short to be normalised
        direction = direction / direction.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(direction.dtype).tiny)
        kappa = positive(raw.squeeze(-1)).clamp(max=MAX_CONCENTRATION)
        return PowerSpherical(torch.nn.functional.normalize(direction, dim=-1), kappa)


class PowerSpherical(dist.TorchDistribution):
    """p(z) = C (1 + mu . z)^kappa on the unit sphere in D >= 2 dimensions.

    (1 + mu . z) / 2 is Beta((D - 1) / 2 + kappa, (D - 1) / 2), and given it z is uniform around mu.

    Args:
        loc: unit vectors mu ``(*batch_shape, D)``.
        concentration: kappa > 0, ``(*batch_shape,)``.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.sphere
    has_rsample = True

    def __init__(self, loc: Tensor, concentration: Tensor) -> None:
        self.loc, self.concentration = loc, concentration
        super().__init__(concentration.shape, loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PowerSpherical:
        """The same density for every element of a batch."""
        batch_shape = torch.Size(batch_shape)
        return PowerSpherical(self.loc.expand(batch_shape + self.event_shape), self.concentration.expand(batch_shape))

    def _beta(self) -> tuple[Tensor, Tensor]:
        half = self.concentration.new_full((), (self.event_shape[0] - 1) / 2)
        return half + self.concentration, half.expand(self.concentration.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density with respect to the surface, ``(*leading,)``."""
        a, b = self._beta()
        log_area = (a + b) * math.log(2) + b * math.log(math.pi) + torch.lgamma(a) - torch.lgamma(a + b)
        cosine = (self.loc * value).sum(-1).clamp(min=torch.finfo(value.dtype).eps - 1)
        return self.concentration * cosine.log1p() - log_area

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws ``(*sample_shape, *batch_shape, D)``."""
        shape = self._extended_shape(sample_shape)
        share = dist.Beta(*self._beta(), validate_args=False).rsample(sample_shape).unsqueeze(-1)
        tiny = torch.finfo(share.dtype).eps
        share = share.clamp(tiny, 1 - tiny)  # (1 + cosine) / 2
        noise = torch.randn(*shape[:-1], shape[-1] - 1, dtype=share.dtype, device=share.device)
        around = torch.nn.functional.normalize(noise, dim=-1)
        # drawn around the first axis, then reflected so that the axis falls on mu
        z = torch.cat([2 * share - 1, 2 * (share * (1 - share)).sqrt() * around], -1)
        axis = torch.zeros_like(self.loc)
        axis[..., 0] = 1
        mirror = axis - self.loc
        length = mirror.square().sum(-1, keepdim=True) + torch.finfo(z.dtype).tiny ** 0.5
        return z - 2 * mirror * (mirror * z).sum(-1, keepdim=True) / length

    @property
    def mean(self) -> Tensor:
        """(a - b) / (a + b) mu, inside the sphere."""
        a, b = self._beta()
        return ((a - b) / (a + b)).unsqueeze(-1) * self.loc

    def entropy(self) -> Tensor:
        """In closed form, ``(*batch_shape,)``."""
        a, b = self._beta()
        log_area = (a + b) * math.log(2) + b * math.log(math.pi) + torch.lgamma(a) - torch.lgamma(a + b)
        return log_area - self.concentration * (math.log(2) + torch.digamma(a) - torch.digamma(a + b))
