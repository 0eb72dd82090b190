"""What every prior is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor, nn

Shape = tuple[int, ...]
GuideDensity = Callable[[Tensor], Distribution]


class Prior(nn.Module, ABC):
    """A density p(z) over latents of shape ``latent_shape``.

    A subclass writes :meth:`forward` and says its ``formula`` and ``support``; the keyword-only arguments of its
    constructor are what a user may declare.
    """

    formula: ClassVar[str]
    support: ClassVar[constraints.Constraint] = constraints.real_vector

    def __init__(self, latent_shape: Shape) -> None:
        super().__init__()
        self.latent_shape = tuple(latent_shape)

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
