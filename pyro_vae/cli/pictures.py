"""What the commands that draw have in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyro_vae.cli.options import expand

if TYPE_CHECKING:
    from torch import Tensor

    from pyro_vae.training.run import Run

Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="The PNG, PDF or SVG file to write (default: RUN/COMMAND.png).",
        show_default=False,
        callback=expand,
    ),
]


def destination(run: Path, out: Path | None, command: str, *, arrays: bool = False) -> Path:
    """Where the picture (or its numbers) goes, refused before any work is done if it cannot go there."""
    from pyro_vae.analysis import drawing
    from pyro_vae.training.run import read_record

    read_record(run)  # a missing run is the first thing to say
    return drawing.destination(out if out is not None else run / f"{command}.png", arrays=arrays)


def finish(axes: Any, path: Path) -> None:
    """Write the picture and say where it is."""
    from pyro_vae.analysis.drawing import save

    print(save(axes, path))


def write_array(x: Tensor, path: Path) -> None:
    """Write numbers as .npy and say where they are."""
    import io

    import numpy as np

    from pyro_vae.training.files import write_bytes

    buffer = io.BytesIO()
    np.save(buffer, x.cpu().numpy())
    write_bytes(path, buffer.getvalue())
    print(path)


def some_rows(
    run: Run, split: str, num: int, seed: int, data_root: str | None, *, repeat: bool = False
) -> tuple[Tensor, Tensor | None]:
    """X of ``num`` rows of a split chosen by the seed, as the program sees them, and y where it is conditional."""
    import torch

    from pyro_vae.errors import UserError
    from pyro_vae.programs.labels import takes_y
    from pyro_vae.seeding import generator

    data = run.load_data(data_root)
    size = len(data.stored(split))
    if size < num and not repeat:
        raise UserError(f"the {split} split of {data.name} has {size} rows, and {num} are needed: lower --num")
    rows = torch.randperm(size, generator=generator("pictured rows", seed))
    rows = rows[torch.arange(num) % size]
    labels = data.labels.get(split)
    y = labels[rows] if takes_y(run.program) and labels is not None else None
    return data.observed(split, rows=rows), y
