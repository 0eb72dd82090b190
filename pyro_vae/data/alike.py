"""Another data set, prepared as a run's own were: what tells the two apart is then what they show, and not how they were made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_vae.data.data import Data
from pyro_vae.data.names import SPLITS
from pyro_vae.errors import UserError


def observed_like(
    ours: Data,
    theirs: Data,
    split: str = "test",
    *,
    rows: Tensor | Sequence[int] | None = None,
    seed: int = 0,
    streams: Literal["place", "content"] = "place",
) -> Tensor:
    """What a program trained on ``ours`` sees of a split of ``theirs``.

    Binarization, dequantization, the number of levels and the size of images become those of ``ours``, and rows are drawn with
    the seeds of ``ours.observed``: of the same stored data it is the same tensor. Levels of another number go to the nearest of
    ours; smaller images into the middle of a background of level 0, before anything is drawn. Floats have no levels, and pass
    as they are.

    Args:
        ours: the data of the run.
        theirs: other data, however they were prepared.
        split: of theirs.
        rows: which rows of it, in which order; all where None.
        seed: of the draws; leave it alone for evaluation.
        streams: what a row is drawn by: its place, or its content (after levels and sizes are ours).

    Returns:
        float32 ``(n, *ours.event_shape)``.

    Columns of tables go by their names, where both have some.

    Raises:
        UserError: images that are larger, or of other channels; floats where ours are dequantized; a table that lacks a column.

    Example:
        >>> from pyro_vae.data import load_data
        >>> ours = load_data("digits", dequantization="uniform")
        >>> bool((observed_like(ours, load_data("digits")) == ours.observed("test")).all())
        True
    """
    theirs = _in_order(ours, theirs)
    if _preparation(theirs) == _preparation(ours):
        return theirs.observed(split, seed, rows, streams=streams)
    theirs = theirs if theirs.grey is None else theirs.grey
    _require_levels(ours, theirs)
    regrid = None not in (ours.levels, theirs.levels) and ours.observed_levels != 2 and theirs.levels != ours.levels
    if regrid or theirs.event_shape != ours.event_shape:
        stored = theirs.stored(split)[
            torch.arange(len(theirs.stored(split))) if rows is None else torch.as_tensor(rows)
        ]
        stored = fitted(_on_levels(stored, theirs.levels, ours.levels) if regrid else stored, ours.event_shape)
        levels = ours.levels if regrid else theirs.levels
        theirs, rows = replace(theirs, train=stored, validation=stored, test=stored, levels=levels), None
    return _prepared(theirs, ours).observed(split, seed, rows, streams=streams)


def columns_like(ours: Data, theirs: Data) -> Data:
    """Data whose rows are records, prepared as ``ours`` are: their column of grey levels is binarized or dequantized likewise."""
    _require_levels(ours, theirs)
    if theirs.levels is None:
        return theirs
    return theirs.with_(binarization=ours.binarization, dequantization=ours.dequantization)


def _require_levels(ours: Data, theirs: Data) -> None:
    if theirs.levels is None and ours.dequantization != "none":
        raise UserError(
            f"{ours.name} was dequantized, and {theirs.name} holds floats, which have no levels: give them as uint8"
        )


def _in_order(ours: Data, theirs: Data) -> Data:
    """``theirs`` with the columns of ``ours`` in their order, where both name them."""
    if None in (ours.column_names, theirs.column_names) or ours.column_names == theirs.column_names:
        return theirs
    names, found = ours.column_names or (), theirs.column_names or ()
    if lacking := [name for name in names if name not in found]:
        raise UserError(
            f"{theirs.name} has no column {lacking[0]!r}, which the run was trained on: expected {', '.join(names[:8])}"
            + (", ..." if len(names) > 8 else "")
        )
    places = torch.tensor([found.index(name) for name in names])
    stored: dict[str, Any] = {name: theirs.stored(name)[:][:, places] for name in SPLITS}
    return replace(theirs, **stored, column_names=names)


def fitted(x: Tensor, event_shape: tuple[int, ...], background: float = 0.0) -> Tensor:
    """Images ``(N, C, h, w)`` in the middle of a background of ``event_shape`` = (C, H, W).

    Raises:
        UserError: images that are larger, or have other channels.
    """
    shape = tuple(x.shape[1:])
    if shape == tuple(event_shape):
        return x
    if (
        len(shape) != 3
        or len(event_shape) != 3
        or shape[0] != event_shape[0]
        or shape[1] > event_shape[1]
        or shape[2] > event_shape[2]
    ):
        raise UserError(
            f"data of shape {shape} do not fit a program for {tuple(event_shape)}: expected images of its channels, no larger"
        )
    rows, columns = event_shape[1] - shape[1], event_shape[2] - shape[2]
    padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    return torch.nn.functional.pad(x, padding, value=background)


def _preparation(data: Data) -> tuple[object, ...]:
    return data.event_shape, data.levels, data.binarization, data.dequantization


def _prepared(theirs: Data, ours: Data) -> Data:
    """``theirs`` with the preparation of ``ours``, as far as they have levels to prepare."""
    if theirs.levels is None or theirs.levels == 2:
        return theirs
    if ours.observed_levels != 2:
        return theirs.with_(binarization="none", dequantization=ours.dequantization)
    how = ours.binarization if ours.binarization != "none" else "static"
    return theirs.with_(binarization=how, dequantization="none")


def _on_levels(stored: Tensor, levels: int | None, wanted: int | None) -> Tensor:
    """Levels 0, ..., levels - 1 on the nearest of 0, ..., wanted - 1."""
    if levels is None or wanted is None:
        return stored
    return (stored.double() * ((wanted - 1) / (levels - 1))).round().to(stored.dtype)
