"""Data sets whose rows are records: the columns of a file, or x with its labels, of which some can be missing.

Their splits are stored as flat rows (:func:`pyro_vae.data.record.flattened`), so that whatever cuts, digests and moves rows
does so with these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_vae.data.data import Data
from pyro_vae.data.names import SPLITS
from pyro_vae.data.record import Column, Record, flattened
from pyro_vae.errors import UserError, nearest
from pyro_vae.seeding import generator

EXPECTED = "expected COLUMN=ROWS and a seed, label=100 or label=100,seed=1; or nan, where NaN are missing"


def of_record(record: Record) -> Data:
    """A record as a data set, all of whose rows train and test."""
    columns, flat = flattened(record)
    return Data("the data given", flat, flat[:0], flat, levels=None, columns=columns)


def x_alone(data: Data) -> Data:
    """The column ``x`` of a data set as one without columns; any other data set as it is."""
    data = without_labels(data)
    if data.columns is None:
        return data
    names = [column.name for column in data.columns]
    if "x" not in names:
        raise UserError(
            f"a declared model describes the column 'x', and {data.name} has {', '.join(names)}: rename one"
        )
    at, column = place_of(data.columns, "x")
    parts: dict[str, Any] = {s: data.stored(s)[:][:, at].unflatten(1, column.shape) for s in SPLITS}
    return replace(data, columns=None, plain=None, **parts)


def without_labels(data: Data) -> Data:
    """A data set whose labels were made a column as it was before; any other as it is."""
    return data.plain if data.plain is not None and data.plain.columns is None else data


def place_of(columns: tuple[Column, ...], name: str) -> tuple[slice, Column]:
    """Where a column lies in a flat row."""
    at = 0
    for column in columns:
        if column.name == name:
            return slice(at, at + column.numel), column
        at += column.numel
    known = [column.name for column in columns]
    raise UserError(f"the data have no column {name!r}: {nearest(name, known)}")


def for_program(program: Any, data: Data) -> Data:
    """A data set as a program takes it: x with its labels as columns, where it reads columns; some of them missing, as declared.

    Raises:
        UserError: labels that are not there, or more columns than x and labels; ``present`` of a program without columns.
    """
    wanted, shapes = data.source.get("present"), getattr(program, "columns", None)
    if data.columns is None and shapes:
        data = in_columns(data, shapes, type(program).__name__)
    if wanted is None:
        return data
    if data.columns is None:
        raise UserError(f"present = {wanted!r} is for programs that read columns, and {type(program).__name__} reads x")
    return thinned(thinned(data, wanted, "train"), wanted, "validation", none=True)


def in_columns(data: Data, shapes: Mapping[str, Any], what: str = "the program", *, labelled: bool = True) -> Data:
    """x and its labels as the columns of these names: the one of the shape of a datum, or called x, and the other one.

    Args:
        data: without columns.
        shapes: of the two columns.
        what: reads them, for errors.
        labelled: whether there have to be labels; all are missing else.
    """
    names = list(shapes)
    first = "x" if "x" in names else next((n for n in names if tuple(shapes[n]) == data.event_shape), None)
    others = [n for n in names if n != first]
    if first is None or len(others) != 1 or (labelled and all(y is None for y in data.labels.values())):
        raise UserError(
            f"{what} reads the columns {', '.join(names)}, and {data.name} has x of shape {data.event_shape}"
            f"{'' if all(y is None for y in data.labels.values()) else ' and labels'}: give a record of them, pv.Record("
            "{'x': x, 'label': y}, present={'label': labelled}), or an .npz of arrays by name"
        )
    some = next(
        (y for y in data.labels.values() if y is not None), torch.zeros(1, *shapes[others[0]], dtype=torch.int64)
    )
    lacking = any(data.labels.get(s) is None and len(data.stored(s)) for s in SPLITS)
    columns = (
        Column(first, data.event_shape, data.dtype, "no"),
        Column(others[0], tuple(some.shape[1:]), some.dtype, "rows" if lacking else "no"),
    )
    parts: dict[str, Any] = {}
    for split in SPLITS:
        x, y = data.stored(split)[:], data.labels.get(split)
        flat = x.flatten(1).to(data.dtype)
        own = torch.full((len(x), columns[1].numel), torch.nan) if y is None else y.reshape(len(x), columns[1].numel)
        parts[split] = torch.cat([flat, own.to(data.dtype)], 1)
    return replace(data, columns=columns, plain=data, grey=None, digests=None, **parts)


@dataclass(frozen=True)
class Present:
    """What is present: of columns so many rows alone, drawn by a seed; and whether NaN in columns of a file are missing."""

    rows: dict[str, int]
    seed: int
    nan: bool


def counts_of(present: str) -> Present:
    """What is present, as it is declared.

    >>> counts_of("label=100,seed=1")
    Present(rows={'label': 100}, seed=1, nan=False)
    """
    found: dict[str, int] = {}
    parts = [part.strip() for part in present.split(",")]
    for part in parts:
        if part == "nan":
            continue
        match = re.fullmatch(r"\s*([^=\s]+)\s*=\s*(\d+)\s*", part)
        if match is None or match[1] in found:
            raise UserError(f"present = {present!r}: {EXPECTED}")
        found[match[1]] = int(match[2])
    seed = found.pop("seed", 0)
    if not found and "nan" not in parts:
        raise UserError(f"present = {present!r}: {EXPECTED}")
    return Present(found, seed, "nan" in parts)


def thinned(data: Data, present: str, split: str, *, none: bool = False) -> Data:
    """The data with a column missing in all rows of a split but so many; as many of each class as can be, drawn by a seed.

    ``none`` of the validation split of a run: ``label=100`` are all the labels that there are to train by.

    Raises:
        UserError: an unknown column, or more rows than it is present in.
    """
    asked = counts_of(present)
    rows, columns = data.stored(split)[:].clone(), data.columns or ()
    for name, wanted in asked.rows.items():
        at, column = place_of(columns, name)
        count = 0 if none else wanted
        there = (~rows[:, at].isnan()).all(1).nonzero()[:, 0]
        if count > len(there):
            raise UserError(
                f"present: {name!r} is present in {len(there):,} rows of the {split} split, and {count:,} are asked for"
            )
        classes = rows[there, at.start] if column.numel == 1 and not column.dtype.is_floating_point else None
        order = torch.randperm(len(there), generator=generator("rows with labels", asked.seed))
        chosen = there[_spread(classes, order)[:count]] if classes is not None else there[order[:count]]
        missing = torch.ones(len(rows), dtype=torch.bool)
        missing[chosen] = False
        rows[missing, at] = torch.nan
        kept = "rows" if column.missing == "no" else column.missing
        columns = tuple(replace(c, missing=kept) if c.name == name else c for c in columns)
    changed: dict[str, Any] = {split: rows}
    return replace(data, columns=columns, plain=data.plain or data, grey=None, digests=None, **changed)


def _spread(classes: Tensor, order: Tensor) -> Tensor:
    """An order of rows in which every class comes once before any comes again."""
    place = torch.zeros(len(order), dtype=torch.int64)
    for one in classes.unique():
        own = (classes[order] == one).nonzero()[:, 0]
        place[own] = torch.arange(len(own))
    return order[place.argsort(stable=True)]
