"""``pyro-vae posterior``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pyro_vae.cli.options import DataRoot, Device, ProgramFile, RunPath, Seed, Split, expand, given


def posterior(
    ctx: typer.Context,
    run: RunPath,
    images: Annotated[int, typer.Option(min=1, help="How many rows of the data, chosen by the seed.")] = 16,
    rows_: Annotated[
        str | None,
        typer.Option(
            "--rows", metavar="I,J,...", help="These rows of the split, instead of --images.", show_default=False
        ),
    ] = None,
    mcmc: Annotated[str, typer.Option(help="none, nuts or hmc: Markov chains on the latents.")] = "none",
    source: Annotated[
        str, typer.Option(help="Without --mcmc: guide, psis (the guide's draws resampled by weight) or prior.")
    ] = "guide",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="The NetCDF file to write [default: RUN/posterior.nc].", show_default=False, callback=expand
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Draws per chain and image.")] = 1000,
    chains: Annotated[int, typer.Option(min=1, help="Chains per image.")] = 4,
    warmup: Annotated[int, typer.Option(min=0, help="Draws per Markov chain that are not kept.")] = 400,
    predictive: Annotated[str, typer.Option(help="What of p(x | z) to keep: draws, mean or none.")] = "draws",
    split: Split = "test",
    seed: Seed = 0,
    device: Device = "auto",
    data_root: DataRoot = None,
    model: ProgramFile = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Draw from the latents' posterior, for ArviZ: an xarray.DataTree as NetCDF."""
    from pyro_vae.analysis.schema import destination, save_netcdf
    from pyro_vae.errors import UserError
    from pyro_vae.training.run import read_record

    if mcmc not in ("none", "nuts", "hmc"):
        raise UserError(f"expected --mcmc none, nuts or hmc, got {mcmc!r}")
    if mcmc != "none" and source != "guide":
        raise UserError(f"--mcmc {mcmc} and --source {source} exclude each other: leave one of them out")
    named = None if rows_ is None else _numbers(rows_)
    if named is not None and given(ctx, "images"):
        raise UserError("--rows and --images exclude each other: leave one of them out")
    read_record(run)
    path = destination(out if out is not None else run / "posterior.nc")

    import torch

    from pyro_vae.analysis.convergence import Convergence
    from pyro_vae.analysis.posterior import posterior as draw
    from pyro_vae.cli.runs import open_run
    from pyro_vae.programs.labels import takes_y
    from pyro_vae.seeding import generator
    from pyro_vae.training.progress import Progress

    loaded = open_run(run, device, model)
    data = loaded.load_data(data_root)
    size = len(data.stored(split))
    if named is None and size < images:
        raise UserError(f"the {split} split of {data.name} has {size} rows, and {images} are asked for: lower --images")
    if named is not None and max(named) >= size:
        raise UserError(f"--rows {max(named)}: the {split} split of {data.name} has the rows 0 to {size - 1}")
    chance = torch.randperm(size, generator=generator("rows of posteriors", seed))[:images]
    rows = chance if named is None else torch.tensor(named)
    labels = data.labels.get(split)
    y = labels[rows] if takes_y(loaded.program) and labels is not None else None
    chosen = source if mcmc == "none" else mcmc
    options: dict[str, Any] = {} if mcmc == "none" else {"num_warmup": warmup}
    with Progress(len(rows), visible=not quiet, unit="image") as bar:
        advance: Any = bar.advance  # by parts of an image
        tree = draw(
            loaded.program, data.observed(split, rows=rows), y, source=chosen, num_samples=samples, num_chains=chains,
            seed=seed, predictive=predictive, labels=None if labels is None else labels[rows], image_index=rows,
            attributes={"run": str(run), "data": data.name, "split": split},
            progress=lambda n: advance(n, chosen), **options,
        )  # fmt: skip
    print(save_netcdf(tree, path))
    if mcmc != "none":
        print(Convergence(tree).line)


def _numbers(text: str) -> list[int]:
    """``3,17`` as numbers of rows."""
    from pyro_vae.errors import UserError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"--rows {text!r}: expected numbers of rows, from 0, separated by commas, as in 3,17")
    if len(set(parts)) < len(parts):
        raise UserError(f"--rows {text!r}: a row is named twice")
    return [int(part) for part in parts]
