"""The units of real-valued data: x = loc + scale * (x in standard units)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

By = Literal["columns", "one"]
ROUNDING = 8


class Units(nn.Module):
    """The mean and the scale of the columns of data ``(*leading, D)``, as buffers: whoever saves a program saves them.

    Args:
        columns: D, the length of the last axis of an event.
        by: ``"columns"``, a scale for each, or ``"one"`` for all, which leaves a model of one scale the same model.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, columns: int, by: By) -> None:
        super().__init__()
        self.by = by
        self.register_buffer("loc", torch.zeros(columns))
        self.register_buffer("scale", torch.ones(columns if by == "columns" else 1))

    def forward(self, x: Tensor) -> Tensor:
        """Data in standard units."""
        return (x - self.loc) / self.scale

    def back(self, standard: Tensor) -> Tensor:
        """Standard units as data."""
        return self.loc + self.scale * standard

    @torch.no_grad()
    def start_at(self, mean: Tensor, variance: Tensor) -> None:
        """The moments of the columns ``(D,)``; where nothing varies the scale stays 1."""
        self.loc.copy_(mean)
        if self.by == "one":
            variance = variance.mean(0, keepdim=True)
            mean = mean.abs().amax(0, keepdim=True)
        # a few roundings of the mean are no variation
        constant = variance.sqrt() <= mean.abs() * ROUNDING * torch.finfo(self.scale.dtype).eps
        self.scale.copy_(torch.where(constant, 1.0, variance.sqrt()))

    def extra_repr(self) -> str:
        """How many columns, and whether each has a scale of its own."""
        return f"{len(self.loc)}, by={self.by!r}"
