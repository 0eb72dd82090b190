"""``pyro-vae impute``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyro_vae.cli.options import DataRoot, Device, Present, ProgramFile, RunPath, Seed, expand

if TYPE_CHECKING:
    import numpy as np

    from pyro_vae.data.record import Record
    from pyro_vae.training.run import Run

INTERVAL = 0.9


def impute(
    run: RunPath,
    data: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="Rows with gaps: NaN, and of an .npz of columns what arrays called NAME_present say; or a data set with labels.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The .npz file to write.", show_default=False, callback=expand)],
    samples: Annotated[int, typer.Option(min=2, help="Draws of the guide that are weighed, of records.")] = 1000,
    draws: Annotated[int, typer.Option(min=20, help="Complete rows that are drawn, of records.")] = 200,
    seed: Seed = 0,
    device: Device = "auto",
    data_root: DataRoot = None,
    model: ProgramFile = None,
    present: Present = None,
) -> None:
    """Fill what is missing in FILE by the posterior of what is there.

    Of a program that reads columns FILE is an .npz of arrays by name; of any other, a file of rows with NaN. The file written has
    each column under its name, its Monte Carlo error as NAME_mc_se, and of records the ends of 90 % intervals as NAME_low and
    NAME_high, or NAME_probability of classes.
    """
    from pyro_vae.cli.output import show_or_say
    from pyro_vae.cli.pictures import write_arrays
    from pyro_vae.cli.runs import open_run
    from pyro_vae.errors import UserError
    from pyro_vae.paths import writable

    out = writable(out, ".npz", "what is imputed is written as arrays by name")
    loaded = open_run(run, device, model)
    columns = getattr(loaded.program, "columns", None) is not None or "columns" in loaded.record["program"]
    if present is not None and not columns:
        raise UserError("--present is for programs that read columns")
    found = (
        _columns(loaded, _record(loaded, data, data_root, present), samples, draws, seed)
        if columns
        else _tensor(loaded, data, data_root, seed)
    )
    write_arrays(found, out)
    show_or_say(f"{len(next(iter(found.values())))} rows: {out}")


def _record(loaded: Run, data: str, root: str | None, present: str | None) -> Record:
    """The columns of a file by name, or x and labels of a data set, prepared as the run's were."""
    from dataclasses import replace

    from pyro_vae.data.alike import columns_like, observed_like
    from pyro_vae.data.columned import in_columns, thinned
    from pyro_vae.data.load import load_whole
    from pyro_vae.data.record import Record
    from pyro_vae.errors import UserError

    ours, theirs, shapes = (
        loaded.prepared_like(),
        load_whole(data, root, "nan"),
        getattr(loaded.program, "columns", None),
    )
    if theirs.columns is not None:
        theirs = columns_like(ours, theirs)
        return (theirs if present is None else thinned(theirs, present, "test")).observed("test")
    if shapes is None or len(shapes) != 2:
        if data.endswith(".npz"):
            return Record.read(data, nan_is_missing=True)
        raise UserError(
            f"{data}: expected an .npz of arrays by name, for {type(loaded.program).__name__} does not say its columns, or has "
            "more than two"
        )
    x = observed_like(ours, theirs, "test")
    whole = in_columns(replace(theirs, train=x[:0], validation=x[:0], test=x, levels=None), shapes)
    return (whole if present is None else thinned(whole, present, "test")).observed("test")


def _columns(loaded: Run, record: Record, samples: int, draws: int, seed: int) -> dict[str, np.ndarray]:
    """Of a record."""
    from pyro_vae.analysis.columns import impute_columns

    given: Any = record
    filled = impute_columns(loaded.program, given, num_samples=samples, num_draws=draws, seed=seed)
    found = {name: record[name].numpy() for name in record}
    for name in filled.draws:
        if name in filled.probability:
            found[f"{name}_probability"] = filled.probability[name].numpy()
            found[name] = filled.probability[name].argmax(1).to(record[name].dtype).numpy()
            continue
        ends = filled.interval(name, INTERVAL)
        found[name], found[f"{name}_mc_se"] = filled.mean[name].numpy(), filled.mc_se[name].numpy()
        found[f"{name}_low"], found[f"{name}_high"] = ends[..., 0].numpy(), ends[..., 1].numpy()
    return found


def _tensor(loaded: Run, data: str, root: str | None, seed: int) -> dict[str, np.ndarray]:
    """Of rows of numbers, NaN where one is missing."""
    import torch

    from pyro_vae.analysis.imputation import impute as fill
    from pyro_vae.data.alike import observed_like
    from pyro_vae.data.load import load_whole
    from pyro_vae.errors import UserError
    from pyro_vae.evaluation.evaluate import y_of

    theirs = load_whole(data, root, "nan")
    x = observed_like(loaded.prepared_like(), theirs, "test")
    if not bool(x.isnan().any()):
        raise UserError(f"{data}: nothing is missing; expected NaN where a number is, as .npy, .npz or .csv")
    filled = fill(
        loaded.program,
        x.nan_to_num(0.0),
        ~x.isnan(),
        y_of(loaded.program, theirs, "test", torch.arange(len(x))),
        seed=seed,
    )
    return {"x": filled.mean.numpy(), "x_mc_se": filled.mc_se.numpy()}
