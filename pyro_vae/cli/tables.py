"""Markdown tables that read well in a terminal too."""

from __future__ import annotations

from collections.abc import Sequence


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
