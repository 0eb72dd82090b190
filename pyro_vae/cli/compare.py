"""``pyro-vae compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pyro_vae.cli.options import DataRoot, Device, Json, Seed, Split, expand

METHODS = ("iw", "ais")


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN RUN...", help="Two or more run directories.", show_default=False, callback=expand),
    ],
    samples: Annotated[int, typer.Option(min=2, help="Importance samples per image, K.")] = 1000,
    limit: Annotated[int, typer.Option(min=2, help="A random subset of so many images, the same for all runs.")] = 1000,
    split: Split = "test",
    seed: Seed = 0,
    device: Device = "auto",
    data_root: DataRoot = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="FILE.py",
            help="The program of runs that were trained on a .py file; once for each file.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(help="iw (importance weighting), or ais (annealing: where Pareto k is bad; choose a --limit)."),
    ] = "iw",
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="What the others are compared with [default: the first; of two, the second].",
            show_default=False,
        ),
    ] = None,
    group: Annotated[
        bool,
        typer.Option(
            "--group", help="Take runs that differ in nothing but their seed together: mean, spread, paired over seeds."
        ),
    ] = False,
    format_: Annotated[
        str | None,
        typer.Option("--format", help="markdown, latex, csv or json [default: markdown].", show_default=False),
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option(
            "--figure",
            help="Also draw the differences: a PNG, PDF or SVG file.",
            show_default=False,
            callback=expand,
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", help="Also write one HTML page over all runs.", show_default=False, callback=expand),
    ] = None,
    json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Which run describes the data better: a table of NLLs, and of paired differences of log p(x) on the same images.

    Differences of log p(x), corrected for the bound's bias, in nats per image.
    """
    from pyro_vae import tables
    from pyro_vae.cli import standings
    from pyro_vae.cli.output import show_or_say
    from pyro_vae.errors import UserError, nearest
    from pyro_vae.training.run import read_record

    shape = tables.format_of(format_, json)
    if method not in METHODS:
        raise UserError(f"unknown --method {method!r}: {nearest(method, METHODS)}")
    if len(runs) < 2:
        raise UserError(f"expected two runs or more to compare, got {len(runs)}: pyro-vae compare RUN RUN")
    _require_places(report, figure, [str(run) for run in runs])
    lines = standings.entries(runs, [read_record(run) for run in runs], group=group)
    base = standings.baseline_of(lines, baseline)
    opened, results, same = _results(
        runs,
        device,
        model or [],
        data_root,
        method=method,
        samples=samples,
        limit=limit,
        split=split,
        seed=seed,
        quiet=quiet,
    )
    by_run = dict(zip(map(str, runs), results, strict=True))
    for line in lines:
        line.results = [by_run[run] for run in line.runs]
    pairs = standings.against(lines, base, group=group)
    figures = {
        "runs": [{"run": str(run), **r.summary()} for run, r in zip(runs, results, strict=True)],
        **({"groups": [line.summary() for line in lines]} if group else {}),
        "baseline": lines[base].name,
        "comparisons": [pair.summary() for pair in pairs],
        "num_data": len(results[0]),
        "num_samples": results[0].num_samples,
        "method": method,
        "split": split,
        "seed": seed,
        **same,
    }
    show_or_say(_written(shape, figures, lines, base, group))
    if figure is not None:
        _draw(figure, pairs)
    if report is not None:
        _write_report(report, [str(run) for run in runs], opened, results, pairs, figures, seed)


def _require_places(report: Path | None, figure: Path | None, names: list[str]) -> None:
    """Refuse a page or a picture that cannot be written, before any work is done."""
    from pyro_vae.errors import UserError

    if report is not None:
        from pyro_vae.analysis.report.page import destination

        destination(report)
        if len(set(names)) < len(names):
            raise UserError(f"--report needs runs of different names, got {', '.join(names)}")
    if figure is not None:
        from pyro_vae.analysis.drawing import destination as picture

        picture(figure)


def _draw(path: Path, pairs: list[Any]) -> None:
    """The differences as a picture."""
    from pyro_vae.analysis.drawing import save
    from pyro_vae.analysis.evidence import differences
    from pyro_vae.cli.runs import say

    say(f"figure: {save(differences(pairs), path)}")


def _write_report(
    path: Path,
    names: list[str],
    opened: list[Any],
    results: list[Any],
    pairs: list[Any],
    figures: dict[str, Any],
    seed: int,
) -> None:
    """The page over all runs."""
    from pyro_vae.analysis.report import compare_report
    from pyro_vae.cli.runs import say

    about = f"{figures['num_data']} {figures['split']} images, K = {figures['num_samples']}, seed {seed}."
    runs = dict(zip(names, (run for run, _ in opened), strict=True))
    written = compare_report(
        runs, dict(zip(names, results, strict=True)), pairs, path, about=about, data=opened[0][1], seed=seed
    )
    say(f"report: {written}")


def _results(
    runs: list[Path],
    device: str,
    model: list[str],
    data_root: str | None,
    *,
    method: str,
    samples: int,
    limit: int,
    split: str,
    seed: int,
    quiet: bool,
) -> tuple[list[tuple[Any, Any]], list[Any], dict[str, Any]]:
    """The runs with their data, each run's log p(x) of the same images, and how these were prepared."""
    import warnings

    import torch

    from pyro_vae.cli.runs import file_of, open_run
    from pyro_vae.errors import UserError
    from pyro_vae.evaluation.ais import annealed_log_likelihood
    from pyro_vae.evaluation.evaluate import chosen_rows, gives_probabilities, rows_for
    from pyro_vae.evaluation.importance import log_likelihood
    from pyro_vae.evaluation.result import UnreliableEstimateWarning
    from pyro_vae.training.progress import Progress

    opened: list[Any] = []
    kept: list[tuple[Any, Any]] = []
    for path in runs:  # everything that can be refused is, before the first evaluation
        loaded = open_run(path, device, file_of(path, model))
        data = loaded.load_data(data_root)
        rows = chosen_rows(len(data.stored(split)), limit)
        x, y = rows_for(loaded.program, data, split, rows)
        what = f"{data.name} ({data.binarization} binarization, {data.dequantization} dequantization)"
        same = x if not opened else opened[0][1]
        if not (
            x.flatten(1).shape == same.flatten(1).shape
            and torch.equal(*(t.nan_to_num(0.5).flatten(1) for t in (x, same)))
        ):
            raise UserError(
                f"{runs[0]} and {path} see different data: {opened[0][3]} and {what}, {split} split; log p(x) of different "
                "data cannot be compared: compare runs trained on the same data and binarization"
            )
        discrete = gives_probabilities(loaded.program, x[:2], None if y is None else y[:2])
        if opened and discrete != opened[0][4]:
            raise UserError(
                f"one of {runs[0]} and {path} gives the data a probability and the other a density, two different "
                "units; compare runs whose likelihoods are of one kind"
            )
        opened.append((loaded.program, x, y, what, discrete))
        kept.append((loaded, data))
    results: list[Any] = []
    with (
        Progress(len(runs) * len(opened[0][1]), visible=not quiet, unit="image") as bar,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", UnreliableEstimateWarning)  # printed with the result
        for path, (program, x, y, _, _) in zip(runs, opened, strict=True):
            bar.advance(0, str(path))
            if method == "ais":
                results.append(annealed_log_likelihood(program, x, y, seed=seed, progress=bar.advance))
            else:
                results.append(log_likelihood(program, x, y, num_samples=samples, seed=seed, progress=bar.advance))
    return kept, results, {"binarization": data.binarization, "dequantization": data.dequantization}


def _written(shape: str, figures: dict[str, Any], lines: list[Any], base: int, group: bool) -> str:
    """The figures in a format: one table, and in Markdown what is to be said of it."""
    import json

    from pyro_vae import tables
    from pyro_vae.cli import standings
    from pyro_vae.cli.runs import say

    if shape == "json":
        return json.dumps(figures, indent=2)
    said = [f"warning: {r['run']}: {w}" for r in figures["runs"] for w in r["warnings"]]
    if shape != "markdown":
        for line in said:
            say(line)
        if shape == "csv":
            return tables.comma_separated(*standings.numbers(lines)).rstrip()
        return tables.latex(*standings.cells(lines, base, group=group, plain=True))
    pairs = [line.against for line in lines if line.against is not None]
    about = [
        f"{figures['num_data']} {figures['split']} images, K = {figures['num_samples']}. Differences are of log p(x) without the "
        "bias of the bound, which the NLL of a run has in it, with their standard error.",
        *(pair.verdict + "." for pair in pairs if len(pairs) == 1 or pair.few),
    ]
    if len(pairs) > 1:
        about.append(f"The {len(pairs)} p-values are corrected for being several, by Holm's rule.")
    if group:
        about.append("Errors of differences are over images, samples and seeds; differences are paired over seeds.")
    return "\n".join([tables.markdown(*standings.cells(lines, base, group=group, plain=False)), "", *about, *said])
