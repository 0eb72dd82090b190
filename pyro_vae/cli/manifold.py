"""``pyro-vae manifold``."""

from __future__ import annotations

from typing import Annotated

import typer

from pyro_vae.cli.options import Device, Given, ProgramFile, RunPath
from pyro_vae.cli.pictures import Out


def manifold(
    run: RunPath,
    out: Out = None,
    num: Annotated[int, typer.Option(min=2, max=100, help="Pictures per axis.")] = 20,
    given: Given = None,
    device: Device = "auto",
    model: ProgramFile = None,
) -> None:
    """Draw a two-dimensional latent space through the quantiles of the prior."""
    from pyro_vae.analysis.pictures import manifold as draw
    from pyro_vae.cli.pictures import destination, finish, given_y
    from pyro_vae.cli.runs import open_run

    path = destination(run, out, "manifold")
    program = open_run(run, device, model).program
    finish(draw(program, num, given_y(program, given, 1)), path)
