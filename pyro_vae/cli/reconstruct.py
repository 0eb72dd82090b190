"""``pyro-vae reconstruct``."""

from __future__ import annotations

from typing import Annotated

import typer

from pyro_vae.cli.options import DataRoot, Device, ProgramFile, RunPath, Seed, Split
from pyro_vae.cli.pictures import Out


def reconstruct(
    run: RunPath,
    out: Out = None,
    num: Annotated[int, typer.Option(min=1, help="How many rows of the data.")] = 20,
    split: Split = "test",
    seed: Seed = 0,
    device: Device = "auto",
    data_root: DataRoot = None,
    model: ProgramFile = None,
) -> None:
    """Draw data above their reconstructions."""
    from pyro_vae.analysis.pictures import reconstructions
    from pyro_vae.cli.pictures import destination, finish, some_rows
    from pyro_vae.cli.runs import open_run

    path = destination(run, out, "reconstruct")
    loaded = open_run(run, device, model)
    finish(reconstructions(loaded.program, *some_rows(loaded, split, num, seed, data_root)), path)
