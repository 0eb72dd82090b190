"""p(x | z) = prod_d Beta(m_d n_d, (1 - m_d) n_d)."""

from __future__ import annotations

from typing import Annotated, Any

import pyro.distributions as dist
import torch
from pydantic import Field
from pyro.distributions import constraints
from torch import Tensor

from pyro_vae.likelihoods.base import Distribution, Likelihood, Shape
from pyro_vae.networks.heads import Head, positive, positive_inverse
from pyro_vae.registry import register

START_CONCENTRATION = 3.0


class _OpenUnitInterval(constraints.Constraint):
    """Numbers strictly between 0 and 1."""

    event_dim = 0

    def check(self, value: Tensor) -> Tensor:
        """Whether each entry is inside."""
        return (value > 0) & (value < 1)


open_unit_interval = _OpenUnitInterval()


@register("likelihoods", "beta")
class Beta(Likelihood):
    """Independent beta pixels with mean m = sigmoid f(z) and concentration n > 0: densities on the open interval (0, 1).

    Where m n or (1 - m) n is below 1 the density is unbounded at an end, so that grey levels must be dequantized: exact
    zeros and ones are refused, and ``min_shape`` bounds how steep the ends become. Ferrari & Cribari-Neto 2004,
    https://doi.org/10.1080/0266476042000214501.

    Args:
        min_shape: the least value of both shape parameters.
    """

    formula = "p(x | z) = prod_d Beta(m_d(z) n_d(z), (1 - m_d(z)) n_d(z))"
    data = "unit"
    support = open_unit_interval

    def __init__(
        self, feature_shape: Shape, event_shape: Shape, *, min_shape: Annotated[float, Field(gt=0)] = 0.05
    ) -> None:
        super().__init__(feature_shape, event_shape)
        self.min_shape = min_shape
        self.head = Head(feature_shape, event_shape, num_params=2)
        self.head.set_bias(positive_inverse(START_CONCENTRATION), param=1)

    def forward(self, features: Tensor) -> Distribution:
        """The product, event shape ``event_shape``."""
        f, raw = self.head(features)
        total = positive(raw).clamp(max=1e6)  # beyond, the density's three log-gammas cancel
        a, b = f.sigmoid() * total + self.min_shape, (-f).sigmoid() * total + self.min_shape
        return OpenBeta(a, b, validate_args=False).to_event(len(self.event_shape))

    def start_at(self, mean: Tensor, spread: float | None = None) -> None:
        """Output bias = logit of the mean image."""
        self.head.set_bias(mean.clamp(1e-3, 1 - 1e-3).logit())


class OpenBeta(dist.Beta):
    """The beta distribution on the open interval: draws that round to 0 or 1 are pulled inside."""

    support = open_unit_interval  # type: ignore[assignment]

    def expand(self, batch_shape: Any, _instance: Any = None) -> OpenBeta:
        """The same for every element of a batch."""
        return super().expand(torch.Size(batch_shape), _instance=self._get_checked_instance(OpenBeta, _instance))

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density, without the checks of the Dirichlet that torch makes of it."""
        a, b = self.concentration1, self.concentration0
        log_beta = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
        return (a - 1) * value.log() + (b - 1) * (-value).log1p() - log_beta

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws strictly between 0 and 1."""
        x = super().rsample(sample_shape)
        eps = torch.finfo(x.dtype).eps
        return x.clamp(eps, 1 - eps)
