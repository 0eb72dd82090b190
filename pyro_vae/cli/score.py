"""``pyro-vae score``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyro_vae.cli.options import DataRoot, Device, Json, ProgramFile, RunPath, Seed, expand

if TYPE_CHECKING:
    from torch import Tensor

    from pyro_vae.training.run import Run


def score(
    run: RunPath,
    data: Annotated[str, typer.Argument(metavar="FILE", help="Rows to score: a file, a folder of images or a name.")],
    samples: Annotated[int, typer.Option(min=1, help="Importance samples per row, K.")] = 500,
    threshold: Annotated[
        float | None,
        typer.Option(help="Nats of log p(x), below which a row is an anomaly.", show_default=False),
    ] = None,
    streams: Annotated[
        str, typer.Option(help="What a row's noise is seeded by: its content, or its place (faster where K is small).")
    ] = "content",
    out: Annotated[
        Path | None,
        typer.Option(
            help="The .csv or .parquet file to write [default: CSV on standard output].",
            show_default=False,
            callback=expand,
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    data_root: DataRoot = None,
    model: ProgramFile = None,
    json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Log p(x) of every row of FILE, a line each, with its error and Pareto k, and a verdict where there is a --threshold.

    Rows are prepared as the run's were (binarization, dequantization, levels), whose own data are not needed. A row of the same
    bytes gets the same score in any file. Data that are filed with a test split have that scored.
    """
    from pyro_vae.data.names import require_known
    from pyro_vae.tables import comma_separated, table_file

    require_known(data)
    if out is not None:
        table_file(out)

    import json as plain

    from pyro_vae.cli.output import show_or_say
    from pyro_vae.cli.runs import open_run, say
    from pyro_vae.evaluation.score import score as score_rows
    from pyro_vae.training.progress import Progress

    loaded = open_run(run, device, model)
    x, y = _rows(loaded, data, data_root, streams)
    with Progress(len(x), visible=not quiet, unit="row") as bar:
        found = score_rows(
            loaded.program, x, y, num_samples=samples, threshold=threshold, seed=seed, streams=streams, warn=False,
            progress=lambda n: bar.advance(n, f"K = {samples}"),
        )  # fmt: skip
    columns, anomalous = found.columns(), found.anomalous
    if out is not None:
        found.write(out)
    if json:
        summary = found.result.summary()
        keys = ("nll", "nll_mc_se", "khat_bad_fraction", "num_samples", "warnings")
        figures = {
            "data": data,
            "num_rows": len(found),
            **{k: summary[k] for k in keys},
            "seed": seed,
            "streams": streams,
        }
        figures |= {"threshold": threshold, "num_anomalies": None if anomalous is None else int(anomalous.sum())}
        show_or_say(plain.dumps(figures | {"out": None if out is None else str(out)}, indent=2, allow_nan=False))
    elif out is None:
        show_or_say(comma_separated(list(columns), list(zip(*columns.values(), strict=True))).rstrip())
    else:
        many = "" if anomalous is None else f", {int(anomalous.sum())} of them below {threshold:g}"
        show_or_say(f"{len(found)} rows{many}: {out}")
    for line in () if json else found.warnings:
        say(f"warning: {line}")


def _rows(loaded: Run, data: str, root: str | None, streams: Any) -> tuple[Tensor, Tensor | None]:
    """What the program sees of the rows of a file, and what it is conditioned on."""
    from pyro_vae.data.load import load_whole
    from pyro_vae.evaluation.evaluate import rows_like

    theirs = load_whole(data, root, loaded.record.get("data", {}).get("present"))
    return rows_like(loaded.program, loaded.prepared_like(), theirs, "test", streams=streams)
