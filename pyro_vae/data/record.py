"""Rows of several columns, of which some entries may be missing."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from pyro_vae.errors import DataError, UserError, nearest
from pyro_vae.paths import expanded
from pyro_vae.tensors import tensor_of


class Record:
    """Tensors by name with a row for each datum, and what of each is present.

    It is indexed like a tensor: ``len(record)`` and ``record.shape[0]`` are the number of rows N, ``record[2:5]`` and
    ``record[rows]`` are records of those rows; ``record["age"]`` is a column, ``"age" in record`` and ``record.names`` tell which
    there are. What a program is given is a record whose missing entries are filled with 0.

    A column named like a site of the model is that site's observation where it is present; any other one is a covariate, which
    the program reads. A plain dict of tensors is taken for a record without missing entries wherever a record is.

    Args:
        columns: tensors or arrays ``(N, ...)`` by name.
        present: of a column, what is there: bool ``(N,)`` by row, or of the column's own shape by element.
        nan_is_missing: whether NaN in columns of floats stand for missing entries; they are refused else.

    Attributes:
        present: by name, bool ``(N,)``, or of the column's shape where elements of it are missing.

    Example:
        >>> record = Record({"image": torch.zeros(3, 2), "label": torch.tensor([7, 1, 0])}, {"label": [True, True, False]})
        >>> len(record), record["label"][:2].tolist(), record.present["image"].all().item()
        (3, [7, 1], True)
    """

    def __init__(
        self, columns: Mapping[str, Any], present: Mapping[str, Any] | None = None, *, nan_is_missing: bool = False
    ) -> None:
        given = {} if present is None else dict(present)
        if not isinstance(columns, Mapping) or not columns or not all(isinstance(name, str) for name in columns):
            raise UserError(f"expected columns as a dict of tensors by name, got {type(columns).__name__}")
        found = {name: _column(name, value) for name, value in columns.items()}
        if len({len(value) for value in found.values()}) != 1:
            rows = ", ".join(f"{name} {len(value)}" for name, value in found.items())
            raise DataError(f"expected columns of as many rows each, got {rows}")
        if unknown := [name for name in given if name not in found]:
            raise UserError(f"present: there is no column {unknown[0]!r}: {nearest(unknown[0], found)}")
        self._columns, self.present = found, dict[str, Tensor]()
        for name, value in found.items():
            self.present[name] = _present(name, value, given.get(name), nan_is_missing)

    @classmethod
    def of(cls, columns: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Record:
        """A record of tensors that have been looked at."""
        found = cls.__new__(cls)
        found._columns, found.present = dict(columns), dict(present)
        return found

    @classmethod
    def read(cls, path: str | os.PathLike[str], *, nan_is_missing: bool = False) -> Record:
        """The arrays of an ``.npz`` file by name; a bool array called ``NAME_present`` says what of ``NAME`` is present."""
        try:
            with np.load(expanded(path), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{str(path)!r} is no .npz file of arrays: {error}") from None
        masks = {n: arrays.pop(n + "_present") for n in list(arrays) if n + "_present" in arrays}
        return cls(arrays, masks, nan_is_missing=nan_is_missing)

    @property
    def names(self) -> list[str]:
        """Of the columns."""
        return list(self._columns)

    @property
    def shape(self) -> torch.Size:
        """The number of rows ``(N,)``."""
        return torch.Size((len(self),))

    @property
    def device(self) -> torch.device:
        """Where the columns lie."""
        return next(iter(self._columns.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the columns of floats, or torch's default one where there are none."""
        return next((c.dtype for c in self._columns.values() if c.is_floating_point()), torch.get_default_dtype())

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, int):
            item = [item]  # a record of one row
        if not isinstance(item, str):
            pick = lambda tensors: {name: t[item] for name, t in tensors.items()}  # noqa: E731
            return Record.of(pick(self._columns), pick(self.present))
        if item not in self._columns:
            raise UserError(f"the data have no column {item!r}: {nearest(item, self._columns)}")
        return self._columns[item]

    def only(self, names: Any) -> Record:
        """The same rows, in which all other columns of ``names``' kind are missing: see :func:`pyro_vae.log_likelihood`."""
        keep = {
            name: p if name in names else torch.zeros(len(self), dtype=torch.bool, device=p.device)
            for name, p in self.present.items()
        }
        return Record.of(self._columns, keep)

    def __repr__(self) -> str:
        columns = ", ".join(
            f"{name}: {tuple(value.shape[1:])} {str(value.dtype).removeprefix('torch.')}"
            + ("" if bool(self.present[name].all()) else f", {float(self.present[name].double().mean()):.0%} present")
            for name, value in self._columns.items()
        )
        return f"Record({len(self)} rows; {columns})"


@dataclass(frozen=True)
class Column:
    """How a column lies in a flat row. ``missing``: ``no`` entries, ``rows``, or ``elements`` of them."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    missing: str

    @property
    def numel(self) -> int:
        """How many numbers of a row it has."""
        return torch.Size(self.shape).numel()


def flattened(record: Record, *, whole: bool = False) -> tuple[tuple[Column, ...], Tensor]:
    """The columns of a record side by side ``(N, numbers)``, in float32, or float64 where one is; NaN where one is missing.

    Args:
        record: of any columns.
        whole: whether any column may be missing in some row, though it is not here.

    Raises:
        DataError: no rows, and whole numbers that a float does not hold.
    """
    if not len(record):
        raise DataError("the record has no rows")
    columns, parts = [], []
    wide = torch.float64 if any(record[n].dtype == torch.float64 for n in record) else torch.float32
    for name in record:
        value, known = record[name], record.present[name]
        if not value.is_floating_point() and value.dtype != torch.bool and float(value.abs().max()) > 2**24:
            raise DataError(
                f"the column {name!r} holds whole numbers above {2**24:,}, which float32 does not hold: number them from 0"
            )
        missing = "elements" if known.dim() > 1 else "no" if bool(known.all()) and not whole else "rows"
        columns.append(Column(name, tuple(value.shape[1:]), value.dtype, missing))
        known = known.reshape(known.shape + (1,) * (value.dim() - known.dim()))
        parts.append(torch.where(known, value.to(wide), torch.nan).reshape(len(value), -1))
    return tuple(columns), torch.cat(parts, 1)


def unflattened(columns: tuple[Column, ...], x: Tensor) -> Record:
    """The record of :func:`flattened` rows ``(N, ..., numbers)``, missing entries 0."""
    flat, at = x.reshape(len(x), -1), 0
    values, present = dict[str, Tensor](), dict[str, Tensor]()
    for column in columns:
        value = flat[:, at : at + column.numel].reshape(len(x), *column.shape)
        known = ~value.isnan()
        if column.missing != "elements":
            known = known.reshape(len(x), -1)[:, 0]
        value = value if column.missing == "no" else value.nan_to_num(0.0)
        values[column.name] = value if column.dtype.is_floating_point else value.to(column.dtype)
        present[column.name], at = known, at + column.numel
    return Record.of(values, present)


def record_of(data: Any) -> Any:
    """A mapping of tensors, or a Dataset of mappings without an ``x``, as a :class:`Record`; anything else as it is."""
    if isinstance(data, Mapping):
        return Record(data)
    if not isinstance(data, Dataset) or isinstance(data, IterableDataset) or not len(data):  # type: ignore[arg-type]
        return data
    try:
        first = data[0]
    except Exception:  # which is said where items are read
        return data
    if not isinstance(first, Mapping) or "x" in first:
        return data
    items = [data[i] for i in range(len(data))]  # type: ignore[arg-type]
    for row, item in enumerate(items):
        if set(item) != set(first):
            raise DataError(
                f"item {row} has the columns {', '.join(map(str, item))}, and the first {', '.join(map(str, first))}"
            )
    return Record({str(name): torch.stack([torch.as_tensor(item[name]) for item in items]) for name in first})


def _column(name: str, value: Any) -> Tensor:
    found = tensor_of(value, f"the column {name!r}")
    if not isinstance(found, Tensor) or found.dim() < 1 or found.numel() == 0:
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise DataError(f"expected the column {name!r} as a tensor (N, ...) of one row at least, got {got}")
    if found.is_complex() or found.layout != torch.strided:
        raise DataError(
            f"expected the column {name!r} as a dense tensor of real numbers, got {found.dtype}, {found.layout}"
        )
    return found.detach()


def _present(name: str, value: Tensor, given: Any, nan_is_missing: bool) -> Tensor:
    """What of a column is present, by row where that says it all."""
    known = torch.ones(len(value), dtype=torch.bool, device=value.device)
    if given is not None:
        known = torch.as_tensor(given, device=value.device)
        if known.dtype != torch.bool or known.shape not in (value.shape, value.shape[:1]):
            raise UserError(
                f"present[{name!r}]: expected bool ({len(value)},) or {tuple(value.shape)}, got {known.dtype} "
                f"{tuple(known.shape)}"
            )
    if value.is_floating_point():
        wide = known.reshape(known.shape + (1,) * (value.dim() - known.dim()))
        if nan_is_missing and bool((lost := value.isnan()).any()):
            known = wide & ~lost
            wide = known
        bad = ~torch.isfinite(value) & wide
        if bool(bad.any()):
            row = int(bad.reshape(len(value), -1).any(1).nonzero()[0])
            raise DataError(
                f"the column {name!r} has NaN or infinite values (first in row {row}): say which entries are present, "
                "pv.Record(columns, present={name: mask}), or that NaN is missing, pv.Record(columns, nan_is_missing=True)"
            )
    flat = known.reshape(len(known), -1)
    if known.dim() > 1 and bool((flat == flat[:, :1]).all()):
        known = flat[:, 0].contiguous()
    return known
