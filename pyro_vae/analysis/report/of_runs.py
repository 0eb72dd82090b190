"""The report on several runs, side by side."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyro_vae.analysis import pictures
from pyro_vae.analysis.drawing import drawn
from pyro_vae.analysis.evidence import nll_intervals
from pyro_vae.analysis.history import overlaid_curves
from pyro_vae.analysis.report import page
from pyro_vae.analysis.report.page import Section
from pyro_vae.analysis.report.subject import Subject
from pyro_vae.errors import UserError
from pyro_vae.evaluation.compare import Comparison, together
from pyro_vae.evaluation.result import LogLikelihood, digits
from pyro_vae.signatures import checked
from pyro_vae.training.run import Run

TABLES = ("program", "model", "guide", "data", "training")  # of a record, that runs are compared by
SAMPLES = 36  # images of each run
VECTORS = {True: 500, False: 10}  # points, other vectors


@checked
@drawn
def compare_report(
    runs: Mapping[str, Run],
    results: Mapping[str, LogLikelihood],
    comparisons: Sequence[Comparison],
    path: str | os.PathLike[str],
    *,
    about: str = "",
    data: Any = None,
    seed: int = 0,
) -> Path:
    """Write one self-contained HTML page over several runs.

    Args:
        runs: two or more by name.
        results: their log p(x) of the same images, by the same names.
        comparisons: paired differences of them, as :func:`pyro_vae.compare` makes them.
        path: a name that ends in ``.html``.
        about: a line on the images and samples that the results are of.
        data: the data set of the runs, for the reconstructions and the classes of conditional programs; none of them where None.
        seed: of the samples.

    Returns:
        The path.

    Raises:
        UserError: fewer than two runs, names that differ, a place that cannot be written to.
    """
    if len(runs) < 2 or list(runs) != list(results):
        raise UserError(f"expected two runs or more and a result for each, got {list(runs)} and {list(results)}")
    target = page.destination(path)
    sections = [
        _declared(runs),
        _likelihood(results, comparisons),
        _training(runs),
        _pictures(runs, data, seed),
    ]
    if not all(pictures.is_image(run.event_shape) for run in runs.values()):
        for section in sections:
            section.speak("row")
    return page.write(target, page.render(f"{len(runs)} runs compared", about, sections))


def differences(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """What the records of runs differ in: a row of dotted key and one value per run; ``-`` where a run does not say.

    >>> differences([{"model": {"latent_dim": 2}}, {"model": {"latent_dim": 5, "prior": "laplace"}}])
    [['model.latent_dim', '2', '5'], ['model.prior', '-', 'laplace']]
    """
    flat = [dict(_leaves({k: r[k] for k in TABLES if k in r})) for r in records]
    keys = dict.fromkeys(key for found in flat for key in found)
    rows = [[key, *(found.get(key, "-") for found in flat)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _leaves(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in _leaves(v, f"{prefix}.{k}" if prefix else str(k))]
    return [(prefix, str(value))]


def _declared(runs: Mapping[str, Run]) -> Section:
    section = Section("declared", "What was declared differently")
    rows = differences([run.record for run in runs.values()])
    if rows:
        section.table(["key", *runs], rows)
    else:
        section.note("Nothing: the declarations are the same.")
    return section


def _likelihood(results: Mapping[str, LogLikelihood], comparisons: Sequence[Comparison]) -> Section:
    section = Section(
        "likelihood",
        "Likelihood",
        "In nats per image. What makes an image easy makes it easy for every run: the paired difference is known "
        "far better than either NLL.",
    )
    rows = [
        [
            name, digits(r.nll, r.nll_total_se), f"{r.nll_mc_se:.3f}", f"{r.nll_data_se:.2f}",
            digits(float(r.elbo.mean()), r.nll_total_se), f"{float(r.khat.nanmedian()):.2f}", f"{r.khat_bad_fraction:.1%}",
        ]
        for name, r in results.items()
    ]  # fmt: skip
    head = ["run", "NLL", "Monte Carlo error", "data error", "ELBO", "Pareto k, median", "bad k"]
    section.table(head, rows)
    section.figure(
        "NLL of each run",
        lambda: nll_intervals(results),
        "95 % intervals: thin over images, thick over redrawn samples. Intervals that overlap can still be told "
        "apart, see below.",
    )
    pairs = [
        [
            " - ".join(c.names), f"{c.mean:.3f}", f"{c.se:.3f}", f"{c.mc_se:.3f}",
            " to ".join(f"{end:.3f}" for end in c.interval), _p_value(c.p_together), c.verdict,
        ]
        for c in together(comparisons)
    ]  # fmt: skip
    head = ["log p(x), paired", "difference", "error", "of it Monte Carlo", "95 % interval", "p", "verdict"]
    section.table(head, pairs, "Paired differences on the same images; positive where the first is better")
    if len(pairs) > 1:
        section.note(f"The {len(pairs)} p-values are corrected for being several, by Holm's rule.")
    for name, result in results.items():
        for text in result.warnings:
            section.warning(f"{name}: {text}")
    return section


def _p_value(p: float | None) -> str:
    # a hyphen would let the line break before the exponent
    return "-" if p is None else f"{p:.1g}".replace("-", "\N{MINUS SIGN}")


def _training(runs: Mapping[str, Run]) -> Section:
    section = Section("training", "Training")
    section.figure(
        "Training curves", lambda: overlaid_curves(runs), "The validation ELBO of every run by epoch, higher is better."
    )
    return section


def _pictures(runs: Mapping[str, Run], data: Any, seed: int) -> Section:
    section = Section("samples", "Samples side by side", "The mean of p(x | z) at draws of each run's prior.")
    made = []
    for name, run in runs.items():
        num = SAMPLES if pictures.is_image(run.event_shape) else VECTORS[run.event_shape == (2,)]
        subject = Subject(run, data, "there are no data", num, 2, seed)
        made.append((name, lambda s=subject, n=num: pictures.samples(s.program, n, seed, y=s.classes(n))))
    section.row(made)
    return section
