"""Hold all rows of what a program is conditioned on to what the program takes.

A program looks labels up, or feeds numbers to a network; which it takes, only it knows. So it is run on the rows in which y is
at its least and its largest, column by column, and on the first that is not finite: a label that no table holds is found there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_vae.errors import DataError
from pyro_vae.programs.trace import evaluating, isolated, trace
from pyro_vae.seeding import derive_seed, seeded

MOST_COLUMNS = 256  # of y that are looked at
Part = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def check_conditions(program: Any, y: Tensor, part: Part, *, where: str = "") -> None:
    """:class:`DataError` that names a row of y that the program does not take.

    Args:
        program: the Program, which takes the first rows.
        y: ``(N, ...)``.
        part: rows of data and of y, as the program sees them, by their numbers ``(n,)``.
        where: what to say after the number of a row.
    """
    if y.numel() == 0:
        return
    flat = y.detach().reshape(len(y), -1)[:, :MOST_COLUMNS].cpu()
    lost = ~torch.isfinite(flat).all(1)
    known = flat.nan_to_num() if flat.is_floating_point() else flat.to(torch.int64)
    rows = torch.cat([known.argmin(0), known.argmax(0), lost.nonzero()[:1, 0]]).unique()
    said = _refusal(program, part, rows)
    if said is None:
        return
    for row in rows.tolist():
        alone = _refusal(program, part, torch.tensor([row]))
        if alone is not None:
            value = f" ({flat[row, 0].item():.4g})" if flat.shape[1] == 1 else ""
            raise DataError(
                f"y in row {row}{where}{value} is none that the program takes: {alone}; expected labels that it has a place for, "
                "and no missing values: relabel, or leave such rows out"
            )
    raise DataError(f"the program does not take y{where}: {said}")


def _refusal(program: Any, part: Part, rows: Tensor) -> str | None:
    """What a program says of these rows; None where it takes them."""
    x, y = part(rows)
    with seeded(derive_seed("conditions"), x.device), evaluating(program), isolated():
        try:
            traces = trace(program, x, y, num_samples=2)
            missing = y is not None and y.is_floating_point() and not bool(torch.isfinite(y).all())
            if missing and not bool(torch.isfinite(traces.terms(2, len(x)).log_weight).all()):
                return "it gives missing or infinite values no density"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).partition('Trace Shapes:')[0].split())[:160]}"
    return None
