"""Where minibatches come from: a data set of ours, a tensor, or any map-style ``torch.utils.data.Dataset``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from pyro_vae.data import Data
from pyro_vae.errors import DataError, UserError
from pyro_vae.programs.given import require_dense, require_rows

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
        return self.data.drawn(self.split, rows=torch.arange(*rows.indices(len(self))))


class Source(ABC):
    """Rows to train on, on the device and in the dtype asked for.

    ``stored(rows)`` fetches them as they are kept, ``prepare`` makes of that what a program sees (binarized afresh, if the data
    are), by tensor operations alone; ``batch(rows)`` is the two in turn. ``fresh`` says whether ``prepare`` may draw.
    """

    fresh = True
    dtype: torch.dtype  # of the program
    labels: Tensor | None = None  # of all rows, where they are known and the program takes them

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
        if isinstance(stored, Tensor):  # no gradient reaches the data, whatever they come from
            stored, labels = stored.detach(), None if labels is None else _condition(labels, dtype)
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

    def validation(self) -> tuple[Tensor | Observed, Tensor | None] | None:
        """The validation split as evaluation sees it."""
        rows = self.data.validation
        if len(rows) == 0:
            return None
        whole = torch.float32.itemsize * math.prod(rows.shape) <= OBSERVED_BYTES
        x = self.data.drawn("validation") if whole else Observed(self.data, "validation")
        return x, self.data.labels.get("validation") if self.conditional else None


class TensorSource(_Rows):
    """A tensor ``(N, *event)``, as it is."""

    def prepare(self, stored: Tensor) -> Tensor:
        """The rows in the program's dtype."""
        return stored.to(self.dtype)


class DatasetSource(Source):
    """Any map-style Dataset whose items are x, or start with x (and y), or are mappings with ``x`` (and ``y``).

    ``look(rows, x, y)``, where it is set, is shown whatever is read, and raises what it will not have.
    """

    fresh = False

    def __init__(
        self, dataset: Dataset[Any], conditional: bool, device: torch.device, dtype: torch.dtype, required: bool = True
    ) -> None:
        self.name = type(dataset).__name__
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            what = "is a stream" if isinstance(dataset, IterableDataset) else "has no length"
            raise UserError(
                f"{self.name} {what}: expected a map-style Dataset, with __len__ and __getitem__; read it into a tensor"
            )
        super().__init__(len(dataset), conditional)
        self.dataset, self.device, self.dtype, self.required = dataset, device, dtype, required
        self.event_shape: tuple[int, ...] | None = None
        self.look: Callable[[Tensor, Tensor, Tensor | None], None] | None = None

    def prepare(self, stored: Tensor) -> Tensor:
        """The items in the program's dtype."""
        return stored.to(self.dtype)

    def stored(self, rows: Tensor) -> Batch:
        """The items, one after the other in a batch, on the device; of those parts alone that the program takes."""
        items = [(int(i), self._item(int(i))) for i in rows]
        x = torch.stack([self._x(i, item) for i, item in items]).to(self.device)
        y = self._y(items) if self.conditional else None
        if self.look is not None:
            self.look(rows, x, y)
        return x, y

    def _item(self, row: int) -> Any:
        try:
            return self.dataset[row]
        except Exception as error:
            raise DataError(f"item {row} of {self.name} cannot be read: {type(error).__name__}: {error}") from error

    def _x(self, row: int, item: Any) -> Tensor:
        if isinstance(item, Mapping):
            if "x" not in item:
                raise DataError(
                    f"item {row} of {self.name} has the keys {', '.join(map(str, item))}: expected x among them"
                )
            x = item["x"]
        else:
            x = item[0] if isinstance(item, tuple | list) and item else item
        if isinstance(x, np.ndarray) and x.dtype.kind in "buif":
            x = torch.from_numpy(np.array(x, dtype=x.dtype.newbyteorder("=")))
        if not isinstance(x, Tensor):
            picture = (
                ": turn pictures into tensors, torchvision.transforms.ToTensor()" if hasattr(x, "getbands") else ""
            )
            raise DataError(
                f"item {row} of {self.name} is, or starts with, {type(x).__name__}: expected a tensor or array (*event){picture}"
            )
        require_dense(x, f"item {row} of {self.name}")
        shape = tuple(x.shape)
        if not shape:
            raise DataError(
                f"item {row} of {self.name} is a single number: expected a tensor (*event); give it the shape (1,)"
            )
        if self.event_shape is None:
            self.event_shape = shape
        if shape != self.event_shape:
            raise DataError(
                f"item {row} of {self.name} has shape {shape}, and others have {self.event_shape}: bring all to one shape"
            )
        return x.detach()

    def _y(self, items: list[tuple[int, Any]]) -> Tensor | None:
        found = []
        for row, item in items:
            if isinstance(item, Mapping):
                y = item.get("y")
            else:
                y = item[1] if isinstance(item, tuple | list) and len(item) > 1 else None
            if y is None and self.required:
                raise UserError(f"the program is conditional, model(x, y), and item {row} of {self.name} gives no y")
            found.append(y)
        if all(y is None for y in found):
            return None
        try:
            y = default_collate(found)
        except (TypeError, RuntimeError) as error:
            why = " ".join(str(error).split())[:120]
            raise DataError(
                f"the y of the items of {self.name} do not fit together ({why}): expected tensors of one shape"
            ) from error
        if not isinstance(y, Tensor):
            raise DataError(
                f"the y of the items of {self.name} are no tensors or numbers, but {type(found[0]).__name__}"
            )
        return _condition(y, self.dtype).to(self.device)


def _condition(y: Tensor, dtype: torch.dtype) -> Tensor:
    """What a program is conditioned on: floats in its dtype, labels and flags as they are."""
    return y.detach().to(dtype) if y.is_floating_point() else y.detach()


def in_parts(batch: Batch, number: int) -> Iterator[tuple[Batch, float]]:
    """A minibatch in so many parts, of about one size, each with its share of the rows."""
    x, y = batch
    if number == 1:
        yield batch, 1.0
        return
    for rows in torch.arange(len(x), device=x.device).chunk(number):
        yield (x[rows], None if y is None else y[rows.to(y.device)]), len(rows) / len(x)


def make_source(
    data: Any, conditional: bool, device: torch.device, dtype: torch.dtype, required: bool = True
) -> Source:
    """The source that fits what the user gave; a tensor of the user's is read and never written to, its gradient included.

    Of a conditional program, y may be ``required``, or handed over if it is there.
    """
    if isinstance(data, Data):
        conditional = conditional and (required or data.labels.get("train") is not None)
        return DataSource(data, conditional, device, dtype)
    if isinstance(data, Tensor):
        require_rows(data)
        return TensorSource(data.detach(), None, conditional and required, device, dtype)
    if isinstance(data, Dataset):
        return DatasetSource(data, conditional, device, dtype, required)
    hint = "; give its .dataset" if isinstance(data, DataLoader) else ""
    raise UserError(
        f"expected a data set of load_data, a tensor (N, *event) or a torch Dataset, got {type(data).__name__}{hint}"
    )
