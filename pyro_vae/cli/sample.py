"""``pyro-vae sample``."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

from pyro_vae.cli.options import DataRoot, Device, Given, ProgramFile, RunPath, Seed
from pyro_vae.cli.pictures import Out
from pyro_vae.errors import UserError


def sample(
    run: RunPath,
    out: Out = None,
    num: Annotated[
        int | None,
        typer.Option(min=1, help="How many (default: 64 images, 2,000 points or 10 vectors).", show_default=False),
    ] = None,
    given: Given = None,
    draws: Annotated[bool, typer.Option("--draws", help="Draw x from p(x | z) instead of showing its mean.")] = False,
    temperature: Annotated[
        float, typer.Option(help="Times the scales of the latents' priors: below 1, typical draws.")
    ] = 1.0,
    shared: Annotated[
        str | None,
        typer.Option(
            metavar="LATENT", help="Of a hierarchy: one draw of it and of the layers above for all.", show_default=False
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    data_root: DataRoot = None,
    model: ProgramFile = None,
) -> None:
    """Draw what the model makes: z from p(z), then the mean of p(x | z); x from p(x) where there are no latents.

    What a conditional program is given are --given values, or labels and covariates of test data. A name that ends in .npy gets
    the numbers.
    """
    from pyro_vae.analysis.pictures import sample_count, samples
    from pyro_vae.cli.pictures import destination, finish, given_values, given_y, some_rows, write_array
    from pyro_vae.cli.runs import open_run
    from pyro_vae.programs.drawn import sample_columns
    from pyro_vae.programs.labels import needs_y
    from pyro_vae.programs.latents import sample as draw
    from pyro_vae.training.progress import Progress

    path = destination(run, out, "sample", arrays=True)
    loaded = open_run(run, device, model)
    num = sample_count(loaded.event_shape) if num is None else num
    columns = getattr(loaded.program, "columns", None)
    if columns is not None:
        if temperature != 1 or shared is not None:
            raise UserError(
                "--temperature and --shared are for a program of one x, and this one has columns: leave them out"
            )
        held = given_values(given)
        x = sample_columns(loaded.program, num, given=held, mean=not draws, seed=seed)[next(iter(columns))]
        if path.suffix.lower() == ".npy":
            write_array(x, path)
        else:
            finish(samples(loaded.program, num, seed, mean=not draws, drawn=x), path)
        return
    how: dict[str, Any] = {"temperature": temperature, "shared": shared}
    y = given_y(loaded.program, given, num)
    if y is None and needs_y(loaded.program):
        y = some_rows(loaded, "test", num, seed, data_root, repeat=True)[1]
    total, slow = math.prod(loaded.event_shape), not getattr(loaded.program, "latents", True)
    with Progress(total, visible=slow, unit="number") as bar:
        if slow:
            how["progress"] = lambda part: bar.update(part * total, "drawing")
        x = draw(loaded.program, num, y, mean=not draws, seed=seed, **how)
    if path.suffix.lower() == ".npy":
        write_array(x, path)
    else:
        finish(samples(loaded.program, num, seed, mean=not draws, drawn=x), path)
