"""``pyro-vae sample``."""

from __future__ import annotations

from typing import Annotated

import typer

from pyro_vae.cli.options import Device, ProgramFile, RunPath, Seed
from pyro_vae.cli.pictures import Out


def sample(
    run: RunPath,
    out: Out = None,
    num: Annotated[
        int | None,
        typer.Option(min=1, help="How many (default: 64 images, 2,000 points or 10 vectors).", show_default=False),
    ] = None,
    draws: Annotated[bool, typer.Option("--draws", help="Draw x from p(x | z) instead of showing its mean.")] = False,
    seed: Seed = 0,
    device: Device = "auto",
    model: ProgramFile = None,
) -> None:
    """Draw what the model makes: z from p(z), then the mean of p(x | z)."""
    from pyro_vae.analysis.pictures import samples
    from pyro_vae.cli.pictures import destination, finish
    from pyro_vae.cli.runs import open_run

    path = destination(run, out, "sample")
    finish(samples(open_run(run, device, model).program, num, seed, mean=not draws), path)
