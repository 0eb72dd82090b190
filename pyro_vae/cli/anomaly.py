"""``pyro-vae anomaly``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pyro_vae.cli.options import DataRoot, Device, Json, ProgramFile, RunPath, Seed, expand, given


def anomaly(
    ctx: typer.Context,
    run: RunPath,
    data: Annotated[str, typer.Argument(metavar="DATA", help="The data set that may be anomalous, by name or path.")],
    samples: Annotated[int, typer.Option(min=1, help="Importance samples per image.")] = 500,
    limit: Annotated[
        int, typer.Option(min=2, help="Rows of each kind at most, by a fixed seed; of a file all, unless it is given.")
    ] = 1000,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="The PNG, PDF or SVG file to write [default: RUN/anomaly.png].",
            show_default=False,
            callback=expand,
        ),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            help="The .csv or .parquet file for a line per row of DATA [default: RUN/anomaly.csv].",
            show_default=False,
            callback=expand,
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Nats of log p(x), below which a row is an anomaly.", show_default=False),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    data_root: DataRoot = None,
    model: ProgramFile = None,
    json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Score another data set against the run's own: AUROCs, and a picture of what is most surprising.

    Scores are calibrated on the run's validation split and compared with its test split. The other data are prepared as the
    run's were (binarization, dequantization, levels); smaller images are put in the middle of a black background. Of a file that
    is not filed in splits all rows are scored.
    """
    from pyro_vae.cli.pictures import destination
    from pyro_vae.data.names import require_known
    from pyro_vae.tables import table_file, write_columns

    path = destination(run, out, "anomaly")
    require_known(data)
    lines = table_file(scores if scores is not None else run / "anomaly.csv")

    import warnings

    from pyro_vae.evaluation.score import require_threshold

    require_threshold(threshold)

    from pyro_vae.analysis.anomaly import detect, most_surprising
    from pyro_vae.analysis.drawing import is_image, save
    from pyro_vae.cli.output import deliver
    from pyro_vae.cli.runs import open_run
    from pyro_vae.data import DATA_SETS, load_data
    from pyro_vae.data.columned import without_labels
    from pyro_vae.data.load import load_whole
    from pyro_vae.errors import UserError
    from pyro_vae.evaluation.evaluate import chosen_rows, comparable, rows_like
    from pyro_vae.evaluation.result import UnreliableEstimateWarning
    from pyro_vae.evaluation.score import VERDICTS
    from pyro_vae.programs.labels import needs_y
    from pyro_vae.training.files import checksum_of, write_text
    from pyro_vae.training.progress import Progress
    from pyro_vae.training.run import WEIGHTS

    loaded, weights = open_run(run, device, model), checksum_of(run / WEIGHTS)
    if needs_y(loaded.program):
        raise UserError(
            "anomaly scores of a conditional program need labels, which an anomaly has not: use an unconditional one"
        )
    ours = without_labels(loaded.load_data(data_root))
    if len(ours.validation) < 2 or len(ours.test) < 2:
        raise UserError(f"{ours.name} has no validation and test splits to calibrate on: train with --validation")
    own_file = data not in DATA_SETS and str(expand(data).absolute()) != ours.source.get("name")
    said = ours.source.get("present")
    theirs = load_whole(data, data_root, said) if own_file else load_data(data, root=data_root, present=said)
    chosen = chosen_rows(len(theirs.test), None if own_file and not given(ctx, "limit") else limit)
    parts = (
        (ours, "validation", chosen_rows(len(ours.validation), limit)), (ours, "test", chosen_rows(len(ours.test), limit)),
        (theirs, "test", chosen),
    )  # fmt: skip
    like = loaded.prepared_like()
    found = [rows_like(loaded.program, like, data, split, rows)[0] for data, split, rows in parts]
    reference, normal, other = comparable(loaded.program, *found)
    total = len(reference) + len(normal) + len(other)
    with Progress(total, visible=not quiet, unit="image") as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)  # printed with the result
        result = detect(
            loaded.program, reference, normal, other, num_samples=samples, seed=seed, against_itself=_same(ours, theirs),
            progress=lambda n: bar.advance(n, f"K = {samples}"),
        )  # fmt: skip
    columns = result.columns(chosen.tolist(), threshold)
    figures = {"data": ours.name, "other": theirs.name, "seed": seed, **result.summary(), "rows": str(lines)}
    if threshold is not None:
        figures |= {"threshold": threshold, "num_anomalies": columns["verdict"].count(VERDICTS[True])}
    picture = most_surprising(result, normal, other) if is_image(tuple(normal.shape[1:])) else None
    if picture is not None:
        figures["picture"] = str(path)
    text = _json(figures | {"weights_crc32": weights})
    where = run / "anomaly.json"

    def write() -> None:
        write_text(where, text + "\n")
        write_columns(lines, columns)
        if picture is not None:
            save(picture, path)

    deliver(text if json else _table(figures), write, str(where))


def _same(ours: Any, theirs: Any) -> bool:
    """Whether two data sets have the same test images, as stored or as binarized once and for all."""
    import torch

    ours, theirs = (data if data.grey is None else data.grey for data in (ours, theirs))
    if ours.event_shape != theirs.event_shape or ours.levels != theirs.levels or len(ours.test) != len(theirs.test):
        return False
    return all(torch.equal(ours.test[i : i + 1000], theirs.test[i : i + 1000]) for i in range(0, len(ours.test), 1000))


def _json(figures: dict[str, Any]) -> str:
    import json

    return json.dumps(figures, indent=2)


def _table(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    from pyro_vae.tables import markdown

    rows = [
        [
            name,
            f"{s['auroc']:.3f} +- {s['auroc_se']:.3f}",
            f"{s['found_at_5_percent']:.1%}",
            f"{s['false_alarms_at_5_percent']:.1%}",
            f"{s['median_normal']:.1f}",
            f"{s['median_other']:.1f}",
        ]
        for name, s in figures["scores"].items()
    ]
    ours, theirs = figures["data"], figures["other"]
    header = ["score", "AUROC", "found at 5 %", "false alarms at 5 %", f"median, {ours}", f"median, {theirs}"]
    count = f"{figures['num_other']} rows of {theirs} against {figures['num_normal']} of {ours}, K = {figures['num_samples']}"
    if "threshold" in figures:
        count += f"; {figures['num_anomalies']} with log p(x) below {figures['threshold']:g}"
    lines = [count, "", markdown(header, rows), *(f"warning: {w}" for w in figures["warnings"])]
    return "\n".join([*lines, figures["rows"], *([figures["picture"]] if "picture" in figures else [])])
