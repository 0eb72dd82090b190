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


def write_arrays(arrays: dict[str, Any], path: Path) -> None:
    """Write numbers by name as .npz."""
    import io

    import numpy as np

    from pyro_vae.training.files import write_bytes

    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def given_values(given: list[str] | None) -> dict[str, Any]:
    """Values by column, as written: whole numbers, numbers, or several of them with commas between.

    >>> given_values(["label=7", "age=0.5,1"])
    {'label': tensor(7), 'age': tensor([0.5000, 1.0000])}
    """
    import torch

    from pyro_vae.errors import UserError

    found: dict[str, Any] = {}
    for text in given or []:
        name, _, value = text.partition("=")
        parts = [part.strip() for part in value.split(",")]
        try:
            numbers = [float(part) for part in parts]
        except ValueError:
            raise UserError(f"--given {text}: expected COLUMN=VALUE with numbers, label=7 or age=0.5,1") from None
        whole = all(part.lstrip("+-").isdigit() for part in parts)
        tensor = torch.tensor(numbers, dtype=torch.int64 if whole and len(parts) == 1 else torch.float32)
        found[name.strip()] = tensor[0] if len(parts) == 1 else tensor
    return found


def given_y(program: Any, given: list[str] | None, num: int) -> Tensor | None:
    """What ``--given`` makes of y of a conditional program, ``(num, ...)``; None where nothing is given."""
    from pyro_vae.errors import UserError
    from pyro_vae.programs.labels import takes_y

    values = given_values(given)
    if not values:
        return None
    if not takes_y(program) or len(values) != 1:
        raise UserError(
            f"--given {' '.join(given or [])}: expected one value for y of a conditional program, model(x, y), or values of "
            f"columns of a program that reads them; {type(program).__name__} takes {'one y' if takes_y(program) else 'neither'}"
        )
    (value,) = values.values()
    found: Tensor = value.expand(num, *value.shape)
    return found


def some_rows(
    run: Run, split: str, num: int, seed: int, data_root: str | None, *, repeat: bool = False
) -> tuple[Tensor, Tensor | None]:
    """X of ``num`` rows of a split chosen by the seed, as the program sees them, and y where it is conditional."""
    import torch

    from pyro_vae.errors import UserError
    from pyro_vae.evaluation.evaluate import rows_for
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
    return rows_for(run.program, data, split, rows)[0], y
