"""``pyro-vae compare``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from pyro_vae.cli.options import DataRoot, Device, Json, ProgramFile, Seed, Split, expand

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
    model: ProgramFile = None,
    method: Annotated[
        str,
        typer.Option(help="iw (importance weighting), or ais (annealing: where Pareto k is bad; choose a --limit)."),
    ] = "iw",
    report: Annotated[
        Path | None,
        typer.Option("--report", help="Also write one HTML page over all runs.", show_default=False, callback=expand),
    ] = None,
    json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Which run describes the data better: paired differences of log p(x) on the same images.

    Differences of log p(x), corrected for the bound's bias, in nats per image.
    """
    import itertools
    import json as json_

    from pyro_vae.cli.output import show_or_say
    from pyro_vae.errors import UserError, nearest
    from pyro_vae.evaluation.compare import compare as compare_results
    from pyro_vae.evaluation.compare import together

    if method not in METHODS:
        raise UserError(f"unknown --method {method!r}: {nearest(method, METHODS)}")
    if len(runs) < 2:
        raise UserError(f"expected two runs or more to compare, got {len(runs)}: pyro-vae compare RUN RUN")
    names = [str(run) for run in runs]
    if report is not None:
        _require_report(report, names)
    opened, results, same = _results(
        runs, device, model, data_root, method=method, samples=samples, limit=limit, split=split, seed=seed, quiet=quiet
    )
    pairs = together([
        compare_results(results[i], results[j], (names[i], names[j]))
        for i, j in itertools.combinations(range(len(runs)), 2)
    ])  # fmt: skip
    figures = {
        "runs": [{"run": n, **r.summary()} for n, r in zip(names, results, strict=True)],
        "comparisons": [pair.summary() for pair in pairs],
        "num_data": len(results[0]),
        "num_samples": results[0].num_samples,
        "method": method,
        "split": split,
        "seed": seed,
        **same,
    }
    show_or_say(json_.dumps(figures, indent=2) if json else _tables(figures))
    if report is not None:
        _write_report(report, names, opened, results, pairs, figures, seed)


def _require_report(path: Path, names: list[str]) -> None:
    """Refuse a page that cannot be written, before any work is done."""
    from pyro_vae.analysis.report.page import destination
    from pyro_vae.errors import UserError

    destination(path)
    if len(set(names)) < len(names):
        raise UserError(f"--report needs runs of different names, got {', '.join(names)}")


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
    model: str | None,
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

    from pyro_vae.cli.runs import open_run
    from pyro_vae.errors import UserError
    from pyro_vae.evaluation.ais import annealed_log_likelihood
    from pyro_vae.evaluation.evaluate import chosen_rows, gives_probabilities, y_of
    from pyro_vae.evaluation.importance import log_likelihood
    from pyro_vae.evaluation.result import UnreliableEstimateWarning
    from pyro_vae.training.progress import Progress
    from pyro_vae.training.run import read_record

    opened: list[Any] = []
    kept: list[tuple[Any, Any]] = []
    for path in runs:  # everything that can be refused is, before the first evaluation
        from_file = "sha256" in read_record(path)["program"]
        loaded = open_run(path, device, model if from_file else None)
        data = loaded.load_data(data_root)
        rows = chosen_rows(len(data.stored(split)), limit)
        x = data.observed(split, rows=rows)
        y = y_of(loaded.program, data, split, rows)
        what = f"{data.name} ({data.binarization} binarization, {data.dequantization} dequantization)"
        if opened and not (x.shape == opened[0][1].shape and torch.equal(x, opened[0][1])):
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


def _tables(figures: dict[str, Any]) -> str:
    """Every run's NLL, every pair's difference, and a sentence on each pair."""
    from pyro_vae.cli.evaluate import markdown
    from pyro_vae.evaluation.result import digits, total_error

    def number(value: float | None, decimals: int = 3) -> str:
        return "-" if value is None else f"{value:.{decimals}f}"

    def nll(run: dict[str, Any]) -> str:
        known = (math.nan if run[key] is None else run[key] for key in ("nll_mc_se", "nll_data_se"))
        return "-" if run["nll"] is None else digits(run["nll"], total_error(*known))

    weights = lambda r: r["proof"]["verdict"] if "proof" in r else "-"  # noqa: E731
    runs = [
        [r["run"], nll(r), number(r["nll_mc_se"]), number(r["nll_data_se"], 2), weights(r)] for r in figures["runs"]
    ]
    pairs = [
        [
            " - ".join(c["runs"]),
            number(c["difference"]),
            number(c["difference_se"]),
            number(c["difference_mc_se"]),
            f"{number(c['interval_low'])} to {number(c['interval_high'])}",
            "-" if c["p_value_together"] is None else f"{c['p_value_together']:.1g}",
        ]
        for c in figures["comparisons"]
    ]
    count = f"{figures['num_data']} {figures['split']} images, K = {figures['num_samples']}"
    lines = [
        *markdown(["run", f"NLL (nats, {count})", "Monte Carlo error", "data error", "weights"], runs),
        "",
        *markdown(["log p(x), paired", "difference (nats)", "error", "of it Monte Carlo", "95 % interval", "p"], pairs),
        "",
        "Differences are of log p(x) without the bias of the bound, which the NLL of a run has in it.",
        *(c["verdict"] + "." for c in figures["comparisons"]),
    ]
    if len(pairs) > 1:
        lines.append(f"The {len(pairs)} p-values are corrected for being several, by Holm's rule.")
    lines += [f"warning: {r['run']}: {w}" for r in figures["runs"] for w in r["warnings"]]
    return "\n".join(lines)
