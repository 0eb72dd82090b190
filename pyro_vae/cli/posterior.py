"""``pyro-vae posterior``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pyro_vae.cli.options import DataRoot, Device, ProgramFile, RunPath, Seed, Split, expand


def posterior(
    run: RunPath,
    images: Annotated[int, typer.Option(min=1, help="How many rows of the data, chosen by the seed.")] = 16,
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
    if size < images:
        raise UserError(f"the {split} split of {data.name} has {size} rows, and {images} are asked for: lower --images")
    rows = torch.randperm(size, generator=generator("rows of posteriors", seed))[:images]
    labels = data.labels.get(split)
    y = labels[rows] if takes_y(loaded.program) and labels is not None else None
    chosen = source if mcmc == "none" else mcmc
    options: dict[str, Any] = {} if mcmc == "none" else {"num_warmup": warmup}
    with Progress(images, visible=not quiet, unit="image") as bar:
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
