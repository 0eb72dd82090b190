"""``pyro-vae manifold``."""

from __future__ import annotations

from typing import Annotated

import typer

from pyro_vae.cli.options import Device, ProgramFile, RunPath
from pyro_vae.cli.pictures import Out


def manifold(
    run: RunPath,
    out: Out = None,
    num: Annotated[int, typer.Option(min=2, max=100, help="Pictures per axis.")] = 20,
    device: Device = "auto",
    model: ProgramFile = None,
) -> None:
    """Draw a two-dimensional latent space through the quantiles of the prior."""
    from pyro_vae.analysis.pictures import manifold as draw
    from pyro_vae.cli.pictures import destination, finish
    from pyro_vae.cli.runs import open_run

    path = destination(run, out, "manifold")
    finish(draw(open_run(run, device, model).program, num), path)
