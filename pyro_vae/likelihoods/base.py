"""What every likelihood is."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor, nn

from pyro_vae.likelihoods.units import By, Units
from pyro_vae.precision import wide

Shape = tuple[int, ...]


class Likelihood(nn.Module, ABC):
    """A density p(x | z) on events of ``event_shape``, given the features that a decoder made of z.

    A subclass writes :meth:`forward`, owns the linear heads on the features, and says its ``formula`` and the ``data``
    it takes, with their ``support``:

    ============= ===================================================================================================
    ``"binary"``  0 and 1
    ``"lattice"`` level / (levels - 1): a probability for each level
    ``"count"``   0, 1, 2, ...: a probability for each count
    ``"unit"``    a density on (0, 1); data with declared levels are dequantized first
    ``"real"``    a density on the real line; likewise
    ============= ===================================================================================================
    """

    formula: ClassVar[str]
    data: ClassVar[Literal["binary", "lattice", "count", "unit", "real"]]
    support: ClassVar[constraints.Constraint]  # of one entry of the event

    def __init__(self, feature_shape: Shape, event_shape: Shape) -> None:
        super().__init__()
        self.feature_shape, self.event_shape = tuple(feature_shape), tuple(event_shape)
        self.units: Units | None = None  # of x, where the densities are declared in standard units

    @abstractmethod
    def forward(self, features: Tensor) -> Distribution:
        """p(x | z) with batch shape ``(*leading,)`` for ``features`` ``(*leading, *feature_shape)``."""

    def start_at(self, mean: Tensor, spread: float | None = None) -> None:
        """Start where p(x | z) has about the mean image ``(*event_shape)`` of the training data; by default, do nothing.

        ``spread`` is the typical standard deviation of an entry over the data, where these have a scale of their own.
        """

    @property
    def standardizes(self) -> By | None:
        """How the location and scale of p(x | z) may be declared in standard units: None where they cannot."""
        return None

    def in_units(self, by: By) -> Units:
        """Take locations and scales in standard units from now on, which are still those of x."""
        own = next(self.parameters())
        self.units = Units(self.event_shape[-1], by).to(device=own.device, dtype=own.dtype)
        return self.units

    def extra_repr(self) -> str:
        """Formula and shapes, for ``repr``."""
        return f"{self.formula}, event_shape={self.event_shape}"


class InFloat64:
    """Mixed into a distribution whose log-density is a small difference of log-gammas: computed in float64."""

    def log_prob(self: Any, value: Tensor) -> Tensor:
        """The log-density, of the shape that the distribution's own has."""
        twin = copy.copy(self)
        vars(twin).update(
            {n: wide(t) for n, t in vars(self).items() if isinstance(t, Tensor) and t.is_floating_point()}
        )
        found: Tensor = super(InFloat64, twin).log_prob(wide(value))  # type: ignore[misc]
        return found.to(value)
