"""p(x | z) = prod_d ContinuousBernoulli(f_d(z)) on [0, 1]."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_vae.likelihoods.base import Distribution, Likelihood, Shape
from pyro_vae.networks.heads import Head
from pyro_vae.registry import register


@register("likelihoods", "continuous-bernoulli")
class ContinuousBernoulli(Likelihood):
    """p(x_d | z) = C(f) e^(f x), f = f_d(z): what the cross-entropy of grey values lacks is its constant C.

    Loaiza-Ganem & Cunningham 2019, https://arxiv.org/abs/1907.06845.
    """

    formula = "p(x | z) = prod_d C(f_d(z)) e^(f_d(z) x_d)"
    data = "unit"
    support = constraints.unit_interval

    def __init__(self, feature_shape: Shape, event_shape: Shape) -> None:
        super().__init__(feature_shape, event_shape)
        self.head = Head(feature_shape, event_shape)

    def forward(self, features: Tensor) -> Distribution:
        """The product, event shape ``event_shape``."""
        (logits,) = self.head(features)
        return TiltedUniform(logits).to_event(len(self.event_shape))

    def start_at(self, mean: Tensor, spread: float | None = None) -> None:
        """Output bias = the logits whose mean is the mean image, by bisection."""
        mean = mean.clamp(0.01, 0.99)
        low, high = torch.full_like(mean, -200.0), torch.full_like(mean, 200.0)
        for _ in range(50):
            middle = (low + high) / 2
            below = TiltedUniform(middle).mean < mean
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        self.head.set_bias((low + high) / 2)


class TiltedUniform(dist.TorchDistribution):
    """p(x) = l e^(l x) / (e^l - 1) on [0, 1], the continuous Bernoulli with logit l, exact for every l.

    torch's own takes its constant at a probability clamped away from 0 and 1, and so integrates to more than 1 where
    |l| exceeds 16 in float32.

    Args:
        logits: l ``(*batch_shape,)``.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.unit_interval
    has_rsample = True
    SMALL = 0.02  # below it, series: their first neglected terms are under 1e-12

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        super().__init__(logits.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> TiltedUniform:
        """The same for every element of a batch."""
        return TiltedUniform(self.logits.expand(torch.Size(batch_shape)))

    def _size(self) -> tuple[Tensor, Tensor]:
        """|l|, and the same kept away from 0 for what divides by it."""
        size = self.logits.abs()
        return size, size.clamp(min=self.SMALL)

    def log_prob(self, value: Tensor) -> Tensor:
        """-|l| y + log(|l| / (1 - e^-|l|)), y = 1 - x where l > 0 and x where not."""
        size, safe = self._size()
        away = torch.where(self.logits > 0, 1 - value, value)
        constant = safe.log() - (-(-safe).exp()).log1p()
        small = size.clamp(max=self.SMALL)  # the branch not taken must not overflow, or its gradient is 0 * inf
        series = small / 2 - small.square() / 24 + small.pow(4) / 2880
        return torch.where(size < self.SMALL, series, constant) - size * away

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws by the inverse of the distribution function."""
        size, safe = self._size()
        u = torch.rand(self._extended_shape(sample_shape), dtype=size.dtype, device=size.device)
        y = -torch.log1p(-u * -torch.expm1(-safe)) / safe
        y = torch.where(size < self.SMALL, u - size * u * (1 - u) / 2, y).clamp(0, 1)
        return torch.where(self.logits > 0, 1 - y, y)

    @property
    def mean(self) -> Tensor:
        """1 / (1 - e^-l) - 1 / l."""
        size, safe = self._size()
        series = 0.5 - size.clamp(max=self.SMALL) / 12 + size.clamp(max=self.SMALL).pow(3) / 720
        y = torch.where(size < self.SMALL, series, 1 / safe - 1 / torch.expm1(safe))
        return torch.where(self.logits > 0, 1 - y, y)
