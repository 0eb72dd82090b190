"""p(x | z) = prod_d Binomial(levels - 1, sigmoid f_d(z)) on grey levels."""

from __future__ import annotations

from typing import Annotated

import pyro.distributions as dist
from pydantic import Field
from torch import Tensor

from pyro_vae.likelihoods.base import Distribution, InFloat64, Likelihood, Shape
from pyro_vae.likelihoods.lattice import Lattice, lattice
from pyro_vae.networks.heads import Head
from pyro_vae.registry import register


@register("likelihoods", "binomial")
class Binomial(Likelihood):
    """A grey level as the number of successes in levels - 1 trials: one output per pixel, and a variance that follows.

    Summed over levels it is a probability, unlike the cross-entropy of grey values. The spread is narrow (8 levels of
    256 at mid-grey), so that real images are over-dispersed under it. McCullagh & Nelder 1989, Generalized Linear Models,
    https://doi.org/10.1007/978-1-4899-3242-6, chapter 4.

    Args:
        levels: what the data declare: 256 for 8-bit images, 17 for the digits.
    """

    formula = "p(x | z) = prod_d Binomial(levels - 1, sigmoid f_d(z)), x = k / (levels - 1)"
    data = "lattice"
    support = lattice(256)

    def __init__(
        self, feature_shape: Shape, event_shape: Shape, *, levels: Annotated[int, Field(ge=2, le=65_536)] = 256
    ) -> None:
        super().__init__(feature_shape, event_shape)
        self.levels, self.support = levels, lattice(levels)  # type: ignore[misc]
        self.head = Head(feature_shape, event_shape)

    def forward(self, features: Tensor) -> Distribution:
        """The product, event shape ``event_shape``."""
        (logits,) = self.head(features)
        counts = BinomialInFloat64(logits.new_full((), self.levels - 1), logits=logits, validate_args=False)
        return Lattice(counts, self.levels).to_event(len(self.event_shape))

    def start_at(self, mean: Tensor, spread: float | None = None) -> None:
        """Output bias = logit of the mean image."""
        self.head.set_bias(mean.clamp(1e-3, 1 - 1e-3).logit())


class BinomialInFloat64(InFloat64, dist.Binomial):
    """The binomial distribution."""
