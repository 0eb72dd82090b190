"""``pyro-vae report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyro_vae.cli.options import DataRoot, Device, ProgramFile, RunPath, Seed, expand


def report(
    run: RunPath,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="The HTML file to write [default: RUN/report.html].", show_default=False, callback=expand
        ),
    ] = None,
    data_: Annotated[
        str | None,
        typer.Option(
            "--data", help="The data of a run that was trained on data in memory, by path.", show_default=False
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="Importance samples per image, K.")] = 500,
    limit: Annotated[int, typer.Option(min=2, help="Test images that are evaluated, by a fixed seed.")] = 200,
    seed: Seed = 0,
    device: Device = "auto",
    data_root: DataRoot = None,
    model: ProgramFile = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Write one HTML page about a run, complete in itself: declaration, training, likelihood, pictures, checks.

    Evaluations that the run keeps stand beside the page's own, quick one. What does not apply is left out, and says why.
    """
    from pyro_vae.analysis.report import page
    from pyro_vae.analysis.report.of_run import PARTS
    from pyro_vae.analysis.report.of_run import report as write
    from pyro_vae.cli.runs import open_run
    from pyro_vae.data import load_data
    from pyro_vae.training.progress import Progress
    from pyro_vae.training.run import read_record

    read_record(run)  # a missing run is the first thing to say
    path = page.destination(out if out is not None else run / "report.html")
    loaded = open_run(run, device, model)
    given = None if data_ is None else load_data(data_, data_root)
    data = loaded.load_data(data_root) if given is None and data_root is not None else given
    with Progress(PARTS, visible=not quiet, unit="section") as bar:
        bar.update(0, "loading")
        done = iter(range(PARTS + 1))
        written = write(
            loaded, path, data=data, limit=limit, num_samples=samples, seed=seed,
            progress=lambda name: bar.update(next(done), name),
        )  # fmt: skip
        bar.update(PARTS, "written")
    print(written)
