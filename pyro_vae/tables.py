"""Tables as text and in files: Markdown that reads well in a terminal too, LaTeX, CSV, Parquet."""

from __future__ import annotations

import csv
import importlib
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyro_vae.errors import UserError, nearest
from pyro_vae.paths import replacing, writable

FORMATS = ("markdown", "latex", "csv", "json")
SUFFIXES = (".csv", ".parquet")
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "+-": r"$\pm$",
         **{c: "\\" + c for c in "&%$#_{}"}}  # fmt: skip

SIGN = re.compile(r"(?<![\w.$])([+-])(?=\d)")  # of a number


def format_of(name: str | None, json: bool) -> str:
    """What ``--format`` and ``--json`` ask for; :class:`UserError` for a word that is none, or for both."""
    if name is not None and name not in FORMATS:
        raise UserError(f"unknown --format {name!r}: {nearest(name, FORMATS)}")
    if json and name not in (None, "json"):
        raise UserError(f"--json and --format {name} exclude each other: leave one out")
    return "json" if json else name or "markdown"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""A table with its columns aligned; a bar inside a cell is escaped.

    >>> print(markdown(["name", "formula"], [["a", "p(x | z)"]]))
    | name | formula   |
    |------|-----------|
    | a    | p(x \| z) |
    """
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def latex(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""A ``tabular`` with the rules of booktabs (``\usepackage{booktabs}``); what LaTeX reads otherwise is escaped.

    >>> print(latex(["run", "NLL"], [["a_1", "84.0 +- 0.1"]]))
    \begin{tabular}{lr}
    \toprule
    run & NLL \\
    \midrule
    a\_1 & 84.0 $\pm$ 0.1 \\
    \bottomrule
    \end{tabular}
    """
    special = re.compile("|".join(re.escape(word) for word in LATEX))
    written = lambda cell: special.sub(lambda m: LATEX[m[0]], cell)  # noqa: E731
    cells = [[SIGN.sub(r"$\1$", written(cell)) for cell in row] for row in [header, *rows]]
    lines = [" & ".join(row) + r" \\" for row in cells]
    columns = "l" + "r" * (len(header) - 1)
    return "\n".join(
        [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}"]
    )  # fmt: skip


def comma_separated(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """CSV with all digits of a number; what is undefined (None, NaN) is an empty cell.

    >>> print(comma_separated(["row", "nll"], [[0, 1.5], [1, float("nan")]]), end="")
    row,nll
    0,1.5
    1,
    """
    text = io.StringIO()
    undefined = lambda cell: cell is None or (isinstance(cell, float) and math.isnan(cell))  # noqa: E731
    csv.writer(text, lineterminator="\n").writerows(
        [header, *([("" if undefined(c) else c) for c in row] for row in rows)]
    )
    return text.getvalue()


def table_file(path: str | os.PathLike[str]) -> Path:
    """``path``, expanded, if :func:`write_columns` can write there; else a :class:`UserError`, before any work is done."""
    path = writable(path, SUFFIXES, "a table")
    if path.suffix.lower() == ".parquet":
        _parquet()
    return path


def write_columns(path: str | os.PathLike[str], columns: Mapping[str, Sequence[Any]]) -> Path:
    """Write columns of one length by name, whole or not at all: ``.csv``, or ``.parquet`` where pyarrow is installed.

    Raises:
        UserError: another suffix, a place that cannot be written to, or no pyarrow.
    """
    path = table_file(path)
    with replacing(path) as temporary:
        if path.suffix.lower() == ".csv":
            temporary.write_text(
                comma_separated(list(columns), list(zip(*columns.values(), strict=True))), encoding="utf-8"
            )
        else:
            arrow, parquet = _parquet()
            parquet.write_table(arrow.table({name: list(values) for name, values in columns.items()}), temporary)
    return path


def _parquet() -> tuple[Any, Any]:
    try:
        pyarrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
    except ImportError:
        raise UserError(
            "Parquet needs pyarrow, which is not installed: pip install pyarrow, or give a name in .csv"
        ) from None
    return pyarrow, parquet
