"""Where minibatches come from: a data set of ours, a tensor, or any map-style ``torch.utils.data.Dataset``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from pyro_vae.data import Data
from pyro_vae.errors import UserError

ON_DEVICE_BYTES = 2**31  # data up to this size are moved to the device whole
AHEAD_BYTES = 2**20  # minibatches up to this size together are gathered at once
OBSERVED_BYTES = 2**26  # a validation split up to this size is drawn once and kept

Batch = tuple[Tensor, Tensor | None]


class Observed:
    """A split of a data set as evaluation sees it, drawn anew at every reading: the same numbers, and no memory for the whole."""

    def __init__(self, data: Data, split: str) -> None:
        self.data, self.split = data, split

    def __len__(self) -> int:
        return len(self.data.stored(self.split))

    def __getitem__(self, rows: slice) -> Tensor:
        return self.data.observed(self.split, rows=torch.arange(*rows.indices(len(self))))


class Source(ABC):
    """Rows to train on, on the device and in the dtype asked for.

    ``stored(rows)`` fetches them as they are kept, ``prepare`` makes of that what a program sees (binarized afresh, if the data
    are), by tensor operations alone; ``batch(rows)`` is the two in turn. ``fresh`` says whether ``prepare`` may draw.
    """

    fresh = True
    examine: Callable[[Tensor, Tensor | None, Tensor], None] | None = None  # rows when they are first read

    def __init__(self, num_rows: int, conditional: bool) -> None:
        if num_rows < 1:
            raise UserError("the training data have no rows")
        self.num_rows, self.conditional = num_rows, conditional

    @abstractmethod
    def stored(self, rows: Tensor) -> Batch:
        """The rows as they are kept, and y for a conditional program."""

    @abstractmethod
    def prepare(self, stored: Tensor) -> Tensor:
        """What a program sees of stored rows, ``(batch, *event)``."""

    def minibatches(self, order: Tensor, batch_size: int) -> Iterator[Batch]:
        """The rows of an order as they are kept, ``batch_size`` at a time."""
        for rows in order.split(batch_size):
            yield self.stored(rows)

    def batch(self, rows: Tensor) -> Batch:
        """What a program sees of these rows, and y for a conditional program."""
        stored, y = self.stored(rows)
        return self.prepare(stored), y

    def resident(self) -> Batch | None:
        """All stored rows, and their labels, where they are on the device; None where they are elsewhere."""
        return None

    def levels(self) -> Tensor | None:
        """Stored rows ``(levels, *event)`` of one level each, of all that there can be; None where data are not of few levels."""
        return None

    def validation(self) -> tuple[Tensor | Observed, Tensor | None] | None:
        """The whole validation split on the CPU, to be read in slices, drawn with a fixed seed; None where there is none."""
        return None


class _Rows(Source):
    """A tensor of stored rows, moved to the device where it fits, and a function that makes data of them."""

    def __init__(
        self, stored: Any, labels: Tensor | None, conditional: bool, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(len(stored), conditional)
        if conditional and labels is None:
            raise UserError("the program is conditional, model(x, y), and the data have no labels")
        if isinstance(stored, Tensor) and stored.numel() * stored.element_size() <= ON_DEVICE_BYTES:
            stored = stored.to(device)
        self.rows, self.labels, self.device, self.dtype = stored, labels, device, dtype

    def stored(self, rows: Tensor) -> Batch:
        """The rows as they are kept, on the device."""
        y = self.labels[rows].to(self.device) if self.conditional and self.labels is not None else None
        if isinstance(self.rows, Tensor):
            return self.rows.index_select(0, rows.to(self.rows.device)).to(self.device), y
        return self.rows[rows].to(self.device), y

    def minibatches(self, order: Tensor, batch_size: int) -> Iterator[Batch]:
        """Several are gathered at once: one long gather waits less for memory than many short ones."""
        x, _ = self.stored(order[:1])
        at_once = max(1, AHEAD_BYTES // max(1, batch_size * x.numel() * x.element_size()))
        for rows in order.split(at_once * batch_size):
            x, y = self.stored(rows)
            yield from zip(x.split(batch_size), repeat(None) if y is None else y.split(batch_size), strict=False)

    def resident(self) -> Batch | None:
        """The rows that were moved there."""
        if not isinstance(self.rows, Tensor) or self.rows.device.type != self.device.type:
            return None
        return self.rows, self.labels.to(self.device) if self.conditional and self.labels is not None else None


class DataSource(_Rows):
    """A data set of ours: binarized and dequantized afresh in every minibatch, where it is."""

    def __init__(self, data: Data, conditional: bool, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(data.train, data.labels.get("train"), conditional, device, dtype)
        self.data = data

    def prepare(self, stored: Tensor) -> Tensor:
        """Fresh data of stored rows."""
        return self.data.prepare(stored).to(self.dtype)

    def levels(self) -> Tensor | None:
        """Of data kept as bytes, their levels."""
        if self.rows.dtype != torch.uint8 or not self.data.levels:
            return None
        each = torch.arange(self.data.levels, dtype=torch.uint8, device=self.device)
        event = self.data.event_shape
        return each.reshape(-1, *(1 for _ in event)).expand(-1, *event)

    def validation(self) -> tuple[Tensor | Observed, Tensor | None] | None:
        """The validation split as evaluation sees it."""
        rows = self.data.validation
        if len(rows) == 0:
            return None
        whole = torch.float32.itemsize * math.prod(rows.shape) <= OBSERVED_BYTES
        x = self.data.observed("validation") if whole else Observed(self.data, "validation")
        return x, self.data.labels.get("validation") if self.conditional else None


class TensorSource(_Rows):
    """A tensor ``(N, *event)``, as it is."""

    def prepare(self, stored: Tensor) -> Tensor:
        """The rows in the program's dtype."""
        return stored.to(self.dtype)


class DatasetSource(Source):
    """Any map-style Dataset whose items are x, or start with x (and y).

    Its items are made when they are asked for, and maybe slowly: each is examined when it is first read.
    """

    fresh = False

    def __init__(
        self, dataset: Dataset[Any], conditional: bool, device: torch.device, dtype: torch.dtype, required: bool = True
    ) -> None:
        if not hasattr(dataset, "__len__"):
            raise UserError(f"{type(dataset).__name__} has no length: expected a map-style Dataset")
        super().__init__(len(dataset), conditional)
        self.dataset, self.device, self.dtype, self.required = dataset, device, dtype, required
        self.examined = torch.zeros(self.num_rows, dtype=torch.bool)

    def prepare(self, stored: Tensor) -> Tensor:
        """The items in the program's dtype."""
        return stored.to(self.dtype)

    def stored(self, rows: Tensor) -> Batch:
        """The items, collated, on the device."""
        items = default_collate([self.dataset[int(i)] for i in rows])
        x, y = (items[0], items[1] if len(items) > 1 else None) if isinstance(items, (tuple, list)) else (items, None)
        if not isinstance(x, Tensor):
            raise UserError(f"the items of {type(self.dataset).__name__} must be tensors, or start with one")
        if self.conditional and self.required and y is None:
            raise UserError(f"the program is conditional, model(x, y), and {type(self.dataset).__name__} gives no y")
        found = x.to(self.device), y.to(self.device) if self.conditional and y is not None else None
        if self.examine is not None and not bool(self.examined[rows].all()):
            self.examine(self.prepare(found[0]), found[1], rows)
            self.examined[rows] = True
        return found


def make_source(
    data: Any, conditional: bool, device: torch.device, dtype: torch.dtype, required: bool = True
) -> Source:
    """The source that fits what the user gave; of a conditional program, y may be ``required``, or handed over if it is there."""
    if isinstance(data, Data):
        conditional = conditional and (required or data.labels.get("train") is not None)
        return DataSource(data, conditional, device, dtype)
    if isinstance(data, Tensor):
        if data.dim() < 2:
            raise UserError(f"expected data (N, *event), got a tensor of shape {tuple(data.shape)}")
        return TensorSource(data, None, conditional and required, device, dtype)
    if isinstance(data, Dataset):
        return DatasetSource(data, conditional, device, dtype, required)
    raise UserError(
        f"expected a data set of load_data, a tensor (N, *event) or a torch Dataset, got {type(data).__name__}"
    )
