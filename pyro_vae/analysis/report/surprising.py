"""Anomalies: the test images that the model expects least, and what ``pyro-vae anomaly`` found."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from torch import Tensor

from pyro_vae.analysis import pictures
from pyro_vae.analysis.report.page import Section
from pyro_vae.analysis.report.subject import Rows, Subject
from pyro_vae.evaluation.result import LogLikelihood
from pyro_vae.programs.contract import admit
from pyro_vae.programs.latents import reconstruct
from pyro_vae.programs.trace import latent_sites
from pyro_vae.training.files import checksum_of, parse_json, read_text
from pyro_vae.training.run import WEIGHTS

SHOWN, CURVES, LISTED, NAMED = 20, 4, 10, 3  # images or points, vectors, rows of the table, columns in each
SAVED = "anomaly.json"


def surprising(subject: Subject, result: LogLikelihood | None) -> Section:
    """The section on anomalies."""
    section = Section(
        "anomalies",
        "Most surprising data",
        "Test data with the lowest log p(x). Simple data can be likely and still be nothing like the rest "
        "(Nalisnick et al. 2019): a low NLL is no certificate.",
    )
    if result is not None:
        _worst(section, subject, result)
    section.attempt("Another data set", lambda: _other(section, subject))
    return section


def _worst(section: Section, subject: Subject, result: LogLikelihood) -> None:
    rows = subject.test
    order = result.log_likelihood.nan_to_num(-float("inf")).argsort(stable=True)
    small = subject.kind in ("image", "point")
    worst = order[: SHOWN if small else CURVES]

    def draw() -> Axes:
        chosen = Rows(
            rows.x[worst], None if rows.y is None else rows.y[worst.to(rows.y.device)], None, rows.index[worst]
        )
        return pictures.reconstructions(subject.program, chosen.x, chosen.y)

    section.figure(
        "The most surprising test data",
        draw,
        f"The {len(worst)} of {len(rows.x)} test data with the highest NLL, the most surprising first, and their "
        "reconstructions.",
    )
    names = () if subject.data is None or subject.data.label_names is None else subject.data.label_names
    unexpected = _unexpected(
        subject, rows.x[order[:LISTED]], None if rows.y is None else rows.y[order[:LISTED].to(rows.y.device)]
    )
    table = []
    for place, i in enumerate(order[:LISTED].tolist()):
        label = "-" if rows.labels is None else str(int(rows.labels[i]))
        if label.isdecimal() and int(label) < len(names):
            label = names[int(label)]
        figures = (-result.log_likelihood[i], -result.elbo[i], result.khat[i])
        table.append(
            [str(int(rows.index[i])), label, *(f"{float(v):.2f}" for v in figures), *unexpected[place : place + 1]]
        )
    head = ["row of the test split", "label", "NLL (nats)", "minus ELBO", "Pareto k"]
    section.table([*head, *(["least expected, and what was expected"] if unexpected else [])], table)


def _unexpected(subject: Subject, x: Tensor, y: Tensor | None) -> list[str]:
    """Of each row of a table the columns that are furthest from their reconstruction, in standard deviations of the column."""
    if not subject.columns or not latent_sites(admit(subject.program, x, y).model):
        return []
    expected = reconstruct(subject.program, x, y).cpu().double()
    off = ((x.double() - expected) / subject.test.x.double().std(0).clamp(min=1e-12)).nan_to_num(0.0).abs()
    return [
        ", ".join(
            f"{subject.columns[j]} = {row[j]:.4g} ({mean[j]:.4g})" for j in o.argsort(descending=True)[:NAMED].tolist()
        )
        for row, mean, o in zip(x, expected, off, strict=True)
    ]


def _other(section: Section, subject: Subject) -> None:
    """The table of ``pyro-vae anomaly``, where it was run."""
    path = None if subject.run.path is None else subject.run.path / SAVED
    if path is None or not path.is_file():
        return
    figures: Any = parse_json(read_text(path), path)
    scores = figures.get("scores") if isinstance(figures, dict) else None
    if not isinstance(scores, dict):
        section.note(f"{path} holds no scores: run pyro-vae anomaly again.")
        return
    if figures.get("weights_crc32") != checksum_of(path.parent / WEIGHTS):
        section.note(f"{path.name} is of other weights than these, and is not shown: run pyro-vae anomaly again.")
        return
    keys = ("auroc", "auroc_se", "found_at_5_percent", "false_alarms_at_5_percent")
    table = [
        [name, *(f"{row[k]:.3f}" if type(row.get(k)) in (int, float) else "-" for k in keys)]
        for name, row in scores.items()
        if isinstance(row, dict)
    ]
    head = ["score", "AUROC", "its error", "found at 5 %", "false alarms at 5 %"]
    section.table(head, table, f"{figures.get('other')} against {figures.get('data')} (pyro-vae anomaly)")
