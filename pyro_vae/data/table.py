"""A user's own table of text: .csv and .tsv, a row per datum."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vae.data.arrays import from_array
from pyro_vae.data.named import LABEL_KEYS
from pyro_vae.data.splits import Filed
from pyro_vae.errors import UserError

MISSING = {"", "na", "nan", "n/a", "null", "none", "?"}
SEPARATORS = ",;\t "


def load(path: Path) -> Filed:
    """The columns of numbers as ``(N, D)`` floats, a column named y, label or target as labels; missing entries are NaN.

    A first line that holds no number is the names of the columns. Numbers are numbers here, not grey levels; zeros and ones alone
    are binary data.

    Raises:
        UserError: no table, lines of other lengths, a column that holds words.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} cannot be read as text: {error}") from None
    rows = [row for row in csv.reader(text.splitlines(), delimiter=_separator(path, text)) if row]
    header = [name.strip() for name in rows[0]] if rows and not any(_is_number(cell) for cell in rows[0]) else None
    body = rows if header is None else rows[1:]
    width = len(rows[0]) if rows else 0
    short = next((i for i, row in enumerate(body, 1 + (header is not None)) if len(row) != width), None)
    if short is not None:
        raise UserError(f"line {short} of {str(path)!r} has {len(rows[short - 1])} cells, and the first has {width}")
    columns = [[row[i] for row in body] for i in range(width)]
    names = header or [str(i) for i in range(width)]
    label = next((i for i, name in enumerate(names) if header and name.lower() in LABEL_KEYS), None)
    x = [
        _numbers(path, name, column) for i, (name, column) in enumerate(zip(names, columns, strict=True)) if i != label
    ]
    table = np.stack(x, 1) if x else np.empty((0, 0))
    binary = bool(((table == 0) | (table == 1)).all())
    filed = from_array(
        path.name, table.astype(bool) if binary else table, None if label is None else _labels(columns[label])
    )
    return filed if header is None else replace(filed, column_names=tuple(n for i, n in enumerate(names) if i != label))


def _separator(path: Path, text: str) -> str:
    first = text.partition("\n")[0]
    return (
        "\t"
        if path.suffix.lower() == ".tsv"
        else max(SEPARATORS, key=lambda s: (first.count(s) > 0, -SEPARATORS.index(s)))
    )


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _numbers(path: Path, name: str, column: list[str]) -> np.ndarray:
    cells = ["nan" if cell.strip().lower() in MISSING else cell for cell in column]
    try:
        return np.array(cells, dtype=np.float64)
    except ValueError:
        word = next(cell for cell in cells if not _is_number(cell))
        raise UserError(
            f"the column {name} of {str(path)!r} holds {word!r}: expected numbers; leave the column out, give its classes "
            "columns of zeros and ones, or call it y if it is the class of a row"
        ) from None


def _labels(column: list[str]) -> np.ndarray:
    """Whole numbers as they are, numbers as floats, and the places of words in their alphabet."""
    if not all(_is_number(cell) for cell in column):
        return np.unique(column, return_inverse=True)[1]
    values: Any = np.array(column, dtype=np.float64)
    return values.astype(np.int64) if bool((values == np.rint(values)).all()) else values
