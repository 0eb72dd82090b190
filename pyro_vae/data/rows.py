"""Rows of an array that is too large to copy, read through its memory map when they are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

NUMPY_DTYPE = {torch.uint8: np.uint8, torch.float32: np.float32, torch.float64: np.float64}


@dataclass(frozen=True, eq=False, repr=False)
class RowView:
    """Some rows of a memory-mapped array, to be indexed as a tensor is; nothing is read before that.

    ``view[i]``, ``view[2:5]`` and ``view[index_tensor]`` read those rows and no others, and give a tensor of
    :attr:`dtype`. Whatever else is to be done with the data is done on what comes back.

    Args:
        array: ``(N, *stored_event)``, usually a :class:`numpy.memmap`.
        indices: int64 ``(n,)``, the rows of ``array`` that this view has, or None for all.
        dtype: what the rows are converted to when they are read: ``torch.uint8``, ``torch.float32`` or ``torch.float64``.
        event_shape: the shape of one row as given out.
        channels_last: ``array`` is ``(N, H, W, C)`` and rows are given out as ``(C, H, W)``.
    """

    array: np.ndarray
    indices: np.ndarray | None
    dtype: torch.dtype
    event_shape: tuple[int, ...]
    channels_last: bool = False

    def __len__(self) -> int:
        return len(self.array) if self.indices is None else len(self.indices)

    @property
    def shape(self) -> torch.Size:
        """``(n, *event_shape)``, as of a tensor."""
        return torch.Size((len(self), *self.event_shape))

    @property
    def ndim(self) -> int:
        """The number of axes, as of a tensor."""
        return 1 + len(self.event_shape)

    @property
    def device(self) -> torch.device:
        """Always the CPU."""
        return torch.device("cpu")

    def select(self, rows: Tensor) -> RowView:
        """The view of those rows of this view; still nothing is read."""
        chosen = rows.numpy()
        indices = chosen if self.indices is None else self.indices[chosen]
        return RowView(self.array, indices, self.dtype, self.event_shape, self.channels_last)

    def __getitem__(self, item: int | slice | Tensor) -> Tensor:
        if isinstance(item, int):
            if not -len(self) <= item < len(self):
                raise IndexError(f"row {item} of {len(self)}")
            return self[torch.tensor([item % len(self)])][0]
        if isinstance(item, slice):
            where: slice | np.ndarray = item if self.indices is None else self.indices[item]
        elif isinstance(item, Tensor) and not item.dtype.is_floating_point and item.dtype != torch.bool:
            chosen = item.cpu().numpy()
            where = chosen if self.indices is None else self.indices[chosen]
        else:
            raise TypeError(f"rows are chosen by an int, a slice or a tensor of ints, not by {type(item).__name__}")
        return self._read(where)

    def _read(self, where: slice | np.ndarray) -> Tensor:
        # A copy in any case: what is given out must not change with, or write to, the file.
        read = np.array(self.array[where], dtype=NUMPY_DTYPE[self.dtype])
        if self.channels_last:
            read = np.ascontiguousarray(np.moveaxis(read, -1, -3))
        lead = read.shape[:1] if isinstance(where, slice) else where.shape
        return torch.from_numpy(read.reshape(*lead, *self.event_shape))

    def __repr__(self) -> str:
        return f"RowView(shape={tuple(self.shape)}, dtype={self.dtype})"


Rows: TypeAlias = Tensor | RowView
"""What a split is stored as: a tensor, or a view that is indexed like one."""


def take(rows: Rows, indices: Tensor) -> Rows:
    """Those rows: copied from a tensor, still unread from a view."""
    return rows.select(indices) if isinstance(rows, RowView) else rows[indices]


def cut(rows: Rows, start: int, stop: int) -> Rows:
    """Rows ``start`` to ``stop``, without copying."""
    return rows.select(torch.arange(start, stop)) if isinstance(rows, RowView) else rows[start:stop]
