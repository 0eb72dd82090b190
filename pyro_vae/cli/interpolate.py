"""``pyro-vae interpolate``."""

from __future__ import annotations

from typing import Annotated

import typer

from pyro_vae.cli.options import DataRoot, Device, Given, ProgramFile, RunPath, Seed, Split
from pyro_vae.cli.pictures import Out


def interpolate(
    run: RunPath,
    out: Out = None,
    num: Annotated[int, typer.Option(min=1, help="How many pairs of data.")] = 8,
    steps: Annotated[int, typer.Option(min=2, help="Pictures on the way, its ends included.")] = 10,
    path_: Annotated[
        str, typer.Option("--path", metavar="straight|slerp", help="Straight, or along the great circle.")
    ] = "straight",
    given: Given = None,
    split: Split = "test",
    seed: Seed = 0,
    device: Device = "auto",
    data_root: DataRoot = None,
    model: ProgramFile = None,
) -> None:
    """Draw the way from one datum to another in latent space."""
    from pyro_vae.analysis.interpolation import find_path
    from pyro_vae.analysis.pictures import interpolations
    from pyro_vae.cli.pictures import destination, finish, given_y, some_rows
    from pyro_vae.cli.runs import open_run

    find_path(path_)
    path = destination(run, out, "interpolate")
    loaded = open_run(run, device, model)
    x, y = some_rows(loaded, split, 2 * num, seed, data_root)
    held = given_y(loaded.program, given, num)
    y = held if held is not None else None if y is None else y[:num]
    finish(interpolations(loaded.program, x, steps, y, path=path_), path)
