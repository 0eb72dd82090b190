"""Distributions on the lattice level / (levels - 1), 8-bit images say."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

TOLERANCE = 1e-3  # of a level: what rounding to float32 may do to level / (levels - 1)


class Lattice(dist.TorchDistribution):
    """x = k / (levels - 1), k drawn from a distribution on 0, ..., levels - 1; a probability, not a density.

    Args:
        base: the distribution of k, with no event axes; its draws are floats.
        levels: their number.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, base: Any, levels: int) -> None:
        self.base, self.levels = base, levels
        super().__init__(base.batch_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Lattice:
        """The same for every element of a batch."""
        return Lattice(self.base.expand(torch.Size(batch_shape)), self.levels)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        """The lattice."""
        return lattice(self.levels)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log P(k), k the level nearest to ``value``."""
        return self.base.log_prob((value * (self.levels - 1)).round())

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws, each a level / (levels - 1)."""
        return self.base.sample(torch.Size(sample_shape)) / (self.levels - 1)

    @property
    def mean(self) -> Tensor:
        """E[k] / (levels - 1)."""
        return self.base.mean / (self.levels - 1)


class lattice(constraints.Constraint):  # torch names constraints in lower case
    """The numbers level / (levels - 1), level = 0, ..., levels - 1."""

    is_discrete = True
    event_dim = 0

    def __init__(self, levels: int) -> None:
        self.levels = levels

    def check(self, value: Tensor) -> Tensor:
        """Whether each entry is on the lattice, up to rounding."""
        level = value * (self.levels - 1)
        return ((level - level.round()).abs() < TOLERANCE) & (level.round() >= 0) & (level.round() < self.levels)

    def __repr__(self) -> str:
        return f"lattice(levels={self.levels})"
