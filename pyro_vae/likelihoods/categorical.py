"""p(x | z) = prod_d Categorical over the declared levels."""

from __future__ import annotations

from typing import Annotated, Any

import pyro.distributions as dist
import torch
from pydantic import Field
from torch import Tensor

from pyro_vae.likelihoods.base import Distribution, Likelihood, Shape
from pyro_vae.likelihoods.lattice import Lattice, lattice
from pyro_vae.networks.heads import Head
from pyro_vae.registry import register


@register("likelihoods", "categorical")
class Categorical(Likelihood):
    """A probability of its own for every level of every pixel; levels have no order here.

    Every shape of p(x_d | z) is within reach, at ``levels`` outputs per pixel. Van den Oord, Kalchbrenner & Kavukcuoglu
    2016, https://arxiv.org/abs/1601.06759, section 3.2.

    Args:
        levels: what the data declare: 256 for 8-bit images, 17 for the digits.
    """

    formula = "p(x | z) = prod_d Categorical(softmax f_d(z)), over levels"
    data = "lattice"
    support = lattice(256)

    def __init__(
        self, feature_shape: Shape, event_shape: Shape, *, levels: Annotated[int, Field(ge=2, le=65_536)] = 256
    ) -> None:
        super().__init__(feature_shape, event_shape)
        self.levels, self.support = levels, lattice(levels)  # type: ignore[misc]
        self.head = Head(feature_shape, event_shape, num_params=levels)

    def forward(self, features: Tensor) -> Distribution:
        """The product, event shape ``event_shape``."""
        logits = torch.stack(self.head(features), -1)
        return Lattice(Level(logits=logits, validate_args=False), self.levels).to_event(len(self.event_shape))


class Level(dist.Categorical):
    """A categorical over the numbers 0, ..., levels - 1, which therefore has a mean."""

    def expand(self, batch_shape: Any, _instance: Any = None) -> Level:
        """The same for every element of a batch."""
        return super().expand(batch_shape, _instance=self._get_checked_instance(Level, _instance))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws of k, as floats."""
        return super().sample(torch.Size(sample_shape)).to(self.logits.dtype)

    @property
    def mean(self) -> Tensor:
        """sum_k k p_k."""
        return self.probs @ torch.arange(self.probs.shape[-1], dtype=self.probs.dtype, device=self.probs.device)
