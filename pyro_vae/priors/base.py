"""What every prior is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor, nn

Shape = tuple[int, ...]
GuideDensity = Callable[[Tensor], Distribution]


class Prior(nn.Module, ABC):
    """A density p(z) over latents of shape ``latent_shape``.

    A subclass writes :meth:`forward` and says its ``formula`` and ``support`` (None where that is the guide's, whatever
    it be); the keyword-only arguments of its constructor are what a user may declare. One that sets
    ``needs_event_shape`` is constructed with the shape of a datum as second argument.
    """

    formula: ClassVar[str]
    support: ClassVar[constraints.Constraint | None] = constraints.real_vector
    needs_event_shape: ClassVar[bool] = False
    scores_guide: ClassVar[bool] = False  # whether p(z) evaluates q at z that q did not draw

    def __init__(self, latent_shape: Shape) -> None:
        super().__init__()
        self.latent_shape = tuple(latent_shape)

    @classmethod
    def latent_shape_of(cls, latent_dim: int, **options: Any) -> Shape:
        """The shape of one latent, from a spec's ``latent_dim`` and the options declared for the prior."""
        return (latent_dim,)

    @property
    def start_rows(self) -> int:
        """How many rows of training data :meth:`start_at` wants; 0 for none."""
        return 0

    def start_at(self, rows: Tensor) -> None:
        """Start from rows of training data ``(start_rows, *event)``; by default, do nothing."""

    def in_standard_units(self) -> None:
        """Know that the guide is asked in standard units, where data have no bounds; by default, do nothing."""

    @abstractmethod
    def forward(self, like: Tensor, guide: GuideDensity | None = None) -> Distribution:
        """p(z) with batch shape ``()`` or ``like.shape[:1]`` and event shape ``latent_shape``.

        Args:
            like: the data ``(batch, *event)``, for its device and floating dtype.
            guide: x -> q(z | x), for the priors that are made of it.
        """

    def extra_repr(self) -> str:
        """Formula and shape, for ``repr``."""
        return f"{self.formula}, latent_shape={self.latent_shape}"


def vector_zeros(like: Tensor, shape: Shape) -> Tensor:
    """Zeros of ``shape`` on the device and in the dtype of ``like``."""
    return torch.zeros(shape, dtype=like.dtype, device=like.device)
