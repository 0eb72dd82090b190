"""The metrics of a run: a line per epoch, in JSON for whoever reads it again and in CSV for spreadsheets."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from pyro_vae.training.files import append_text, damaged, parse_json, read_text, write_text

METRICS, METRICS_CSV = "metrics.jsonl", "metrics.csv"


def write_metrics(path: Path, metrics: list[dict[str, Any]]) -> None:
    """All metrics lines, instead of those that are there."""
    write_text(path / METRICS, "".join(json.dumps(m) + "\n" for m in metrics))
    write_text(path / METRICS_CSV, "".join(_row(m, header=i == 0) for i, m in enumerate(metrics)))


def append_metrics(path: Path, metrics: dict[str, Any]) -> None:
    """One more line."""
    append_text(path / METRICS, json.dumps(metrics) + "\n")
    append_text(path / METRICS_CSV, _row(metrics, header=metrics["epoch"] == 1))


def _row(metrics: dict[str, Any], *, header: bool) -> str:
    """The line of an epoch for spreadsheets, under the names of the columns if it is the first."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(metrics), lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerow(metrics)
    return text.getvalue()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The metrics lines of a run; a last one that was not written to its end does not count."""
    lines = read_text(path / METRICS).split("\n")[:-1]
    metrics = [parse_json(line, path / METRICS) for line in lines]
    for number, found in enumerate(metrics, 1):
        if not isinstance(found, dict) or not all(type(v) in (int, float) for v in found.values()):
            raise damaged(path / METRICS, f"line {number} is no table of numbers")
        if found.get("epoch") != number or not {"step", "train_loss", "seconds"} <= set(found):
            raise damaged(path / METRICS, f"line {number} is not that of epoch {number}")
    return metrics
