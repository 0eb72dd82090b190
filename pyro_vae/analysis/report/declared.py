"""What was declared: the formulas, the spec, the data, the sites, the parameters and the versions."""

from __future__ import annotations

from typing import Any

import tomli_w
from torch import Tensor

from pyro_vae.analysis import describe
from pyro_vae.analysis.report.page import Section
from pyro_vae.analysis.report.subject import Subject
from pyro_vae.data.names import SPLITS
from pyro_vae.errors import UserError


def declared(subject: Subject) -> Section:
    """The section on the declaration."""
    section = Section("declared", "What was declared")
    program: Any = subject.program
    if formulas := getattr(program, "formulas", None):
        section.table(["", "formula"], list(formulas.items()))
    else:
        section.table(["", "program"], [(key, value) for key, value in subject.run.record["program"].items()])
    _data(section, subject)
    found = describe.parameters(program)
    total = describe.total(found)
    section.attempt("The sites", lambda: _sites(section, subject))
    section.table(
        ["parameter", "shape", "count"],
        [(p.name, _axes(p.shape), f"{p.count:,}" + ("" if p.trained else " (held fixed)")) for p in found],
        f"Parameters: {total:,} trained, in {len(found)} tensors",
        folded=True,
    )
    declaration = {k: v for k, v in subject.run.record.items() if k != "versions"}
    section.code("The declaration, as the run directory keeps it (TOML)", tomli_w.dumps(declaration))
    versions = subject.run.record.get("versions", {})
    if versions:
        section.table(["package", "version"], list(versions.items()), "Versions it was trained with", folded=True)
    return section


def _data(section: Section, subject: Subject) -> None:
    data = subject.data
    if data is None:
        section.note(f"No data: {subject.missing} What needs them is left out.")
        return
    levels = "floats" if data.levels is None else f"{data.levels} levels"
    sizes = ", ".join(f"{len(data.stored(split)):,} {split}" for split in SPLITS)
    rows = [
        ("data", data.name),
        ("rows", sizes),
        ("shape of a datum", f"{_axes(data.event_shape)}, {levels}"),
        ("binarization", data.binarization),
        ("dequantization", data.dequantization),
    ]
    section.table(["", "data"], rows)


def _sites(section: Section, subject: Subject) -> None:
    rows = [
        (s.part, s.name, s.distribution, _axes(s.batch_shape), _axes(s.event_shape), s.role)
        for s in describe.sites(subject.program, _labels(subject))
    ]
    section.table(["program", "site", "distribution", "batch shape", "event shape", "role"], rows, "The sites")


def _labels(subject: Subject) -> Tensor | None:
    """Labels of the three rows that the sites are looked at with."""
    if not subject.conditional:
        return None
    labels = subject.rows("train", describe.ROWS).y
    if labels is None or len(labels) < describe.ROWS:
        raise UserError(f"the program is conditional and there are not {describe.ROWS} labelled rows")
    return labels


def _axes(shape: tuple[Any, ...]) -> str:
    return "(" + ", ".join(str(n) for n in shape) + ("," if len(shape) == 1 else "") + ")"
