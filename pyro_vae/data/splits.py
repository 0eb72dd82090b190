"""From what a loader read to the three splits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.content import Content, find_rows, require_form
from pyro_vae.data.data import Data
from pyro_vae.data.names import SPLITS
from pyro_vae.data.record import Column
from pyro_vae.data.rows import Rows, RowView, cut, take
from pyro_vae.errors import UserError

SPLIT_SEED = 20_130


@dataclass(frozen=True, eq=False)
class Filed:
    """What a loader read, before it is split.

    Args:
        name: the data set's name.
        x: ``(N, *event)``: training and validation in file order, or everything where ``test`` is None.
        levels: 256, 17, 2, or None for floats.
        test: ``(n, *event)`` where the data come with a test split of their own.
        labels: int64 ``(N,)`` of ``x``, or None.
        test_labels: int64 ``(n,)`` of ``test``, or None.
        validation: how many rows of ``x`` validate by default; a tenth where None.
        held_out: how many rows of ``x`` test where there is no ``test``; a tenth where None.
        binarization: the default.
        label_names: the classes' names, or None.
        row_names: the rows' names (files of a folder), or None.
        column_names: of a table, or None.
        columns: of rows that are records, stored flat, or None.
        unsaid: names of columns with NaN that nothing in the file calls missing.
    """

    name: str
    x: Rows
    levels: int | None
    test: Rows | None = None
    labels: Tensor | None = None
    test_labels: Tensor | None = None
    validation: int | None = None
    held_out: int | None = None
    binarization: str = "none"
    label_names: tuple[str, ...] | None = None
    row_names: tuple[str, ...] | None = None
    column_names: tuple[str, ...] | None = None
    columns: tuple[Column, ...] | None = None
    unsaid: tuple[str, ...] = ()


def split(filed: Filed, validation: int | None, source: dict[str, Any], recorded: Content | None = None) -> Data:
    """Cut into train, validation and test; not yet binarized.

    Where the data have a test split, the last ``validation`` rows of the rest validate. Elsewhere a fixed permutation
    decides: a tenth tests, a tenth (or ``validation`` rows) validates, the rest trains; rows stay in file order
    within a split. The test rows do not depend on ``validation``. Where a run has ``recorded`` its rows, these are found again
    instead.

    Raises:
        UserError: ``validation`` is not a number of rows that leaves any to train on; rows of the run that are not there.
    """
    n = len(filed.x)
    if recorded is not None:
        form = {"shape of a datum": list(filed.x.shape[1:]), "levels": filed.levels}
        require_form({k: v for k, v in recorded.form.items() if k in form}, form, filed.name)
    if filed.test is not None:
        size = _validation_size(validation, _usual(filed.validation, n), n, filed.name)
        y = filed.labels
        return Data(
            name=filed.name,
            train=cut(filed.x, 0, n - size),
            validation=cut(filed.x, n - size, n),
            test=filed.test,
            levels=filed.levels,
            labels={
                "train": None if y is None else y[: n - size],
                "validation": None if y is None else y[n - size :],
                "test": filed.test_labels,
            },
            source=source,
            label_names=filed.label_names,
            column_names=filed.column_names,
        )
    if n < len(SPLITS):
        raise UserError(f"{filed.name} has {n} rows: expected at least 3, one for each split; give more rows")
    if recorded is None:
        rest = n - _usual(filed.held_out, n)
        size = _validation_size(validation, _usual(filed.validation, n), rest, filed.name)
        parts = fixed_permutation(n).split([rest - size, size, n - rest])
        rows = {name: torch.from_numpy(np.sort(part.numpy())) for name, part in zip(SPLITS, parts, strict=True)}
    else:
        rows = find_rows(recorded, filed.x, filed.row_names, filed.name)
    return Data(
        name=filed.name,
        train=take(filed.x, rows["train"]),
        validation=take(filed.x, rows["validation"]),
        test=take(filed.x, rows["test"]),
        levels=filed.levels,
        labels={name: None if filed.labels is None else filed.labels[rows[name]] for name in SPLITS},
        rows=dict(rows),
        source=source,
        label_names=filed.label_names,
        column_names=filed.column_names,
        columns=filed.columns,
        digests=None if recorded is None else recorded.digests or None,
    )


def in_float32(filed: Filed) -> Filed:
    """The same data in float32."""

    def single(rows: Rows) -> Rows:
        return replace(rows, dtype=torch.float32) if isinstance(rows, RowView) else rows.to(torch.float32)

    return replace(filed, x=single(filed.x), test=None if filed.test is None else single(filed.test))


def fixed_permutation(n: int) -> Tensor:
    """The permutation of 0 to n - 1 by which data without a split are cut; the same on every machine and version."""
    # NumPy promises the stream of a bit generator, not what `permutation` makes of it; so rank the raw bits.
    raw = np.random.PCG64(SPLIT_SEED).random_raw(n)
    return torch.from_numpy(np.argsort(raw, kind="stable").astype(np.int64, copy=False))


def _usual(count: int | None, n: int) -> int:
    # A file that is cut short, for a quick trial say, keeps its proportions instead of its counts.
    return max(1, n // 10) if count is None or 2 * count >= n else count


def _validation_size(asked: int | None, default: int, available: int, name: str) -> int:
    if asked is None:
        return default
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 0:
        raise UserError(f"validation {asked!r} is not a number of rows: give 0 to train on all, or a positive integer")
    if asked >= available:
        raise UserError(
            f"validation {asked} leaves nothing to train on: {name} has {available} rows beside the test split; "
            f"give at most {available - 1}"
        )
    return asked
