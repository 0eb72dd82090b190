"""Networks whose features of a place of x depend on the places before it alone: what tractable densities are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class Causal(nn.Module, ABC):
    """Features ``(n, places, features)`` of values ``(n, places, channels)``: of a place, from those before it in ``order``.

    A subclass writes :meth:`forward`, and, to draw faster, :meth:`begin` and :meth:`at`, which keep what was computed.
    """

    order: Sequence[int]  # the places, in the order in which they are drawn
    features: int

    @abstractmethod
    def forward(self, values: Tensor) -> Tensor:
        """Features of every place, in one pass."""

    def begin(self, values: Tensor) -> Any:
        """What :meth:`at` keeps from place to place while ``values``, zeros at first, are filled; by default nothing."""
        return None

    def at(self, values: Tensor, kept: Any, step: int) -> Tensor:
        """Features ``(n, features)`` of the place ``order[step]``, whose predecessors are filled in; by default a whole pass."""
        return self(values)[:, self.order[step]]


class Image(Causal):
    """A :class:`Causal` on images of ``channels`` by ``height`` by ``width``, row by row; it gives maps ``(n, features, H, W)``.

    Args:
        size: channels, height and width of x.
        features: numbers at every pixel.
    """

    def __init__(self, size: tuple[int, int, int], features: int) -> None:
        super().__init__()
        self.size, self.features = size, features
        self.order = range(size[1] * size[2])

    @abstractmethod
    def maps(self, x: Tensor) -> Tensor:
        """Features ``(n, features, H, W)`` of images ``(n, C, H, W)``."""

    def forward(self, values: Tensor) -> Tensor:
        """The maps, a row of features for every pixel."""
        return self.maps(self.image(values)).flatten(2).transpose(1, 2)

    def image(self, values: Tensor) -> Tensor:
        """Values ``(n, H * W, C)`` as ``(n, C, H, W)``, in the same memory."""
        return values.transpose(1, 2).unflatten(2, self.size[1:])
