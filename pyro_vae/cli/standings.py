"""Runs, or groups of runs that differ in their seed, as the lines of one table against a baseline."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_vae.errors import UserError, nearest

if TYPE_CHECKING:
    from pyro_vae.evaluation.compare import Comparison
    from pyro_vae.evaluation.result import LogLikelihood

ENDING = re.compile(r"[-_./=]*(seed|s)?[-_./=]*$")  # of what the names of runs have in common before the seed


@dataclass
class Entry:
    """A line of the table.

    Attributes:
        name: of the run, or of the group.
        runs: the names of the runs, and by place their seeds and results.
        seeds: of their trainings.
        results: their log p(x) of the same images.
        against: the comparison with the baseline; None of the baseline itself.
    """

    name: str
    runs: list[str]
    seeds: list[int]
    results: list[LogLikelihood] = field(default_factory=list)
    against: Comparison | None = None

    @property
    def nll(self) -> float:
        """Mean over its runs, nats per image."""
        return sum(r.nll for r in self.results) / len(self.results)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the NLL over its runs; None of one."""
        n, mean = len(self.results), self.nll
        return None if n < 2 else (sum((r.nll - mean) ** 2 for r in self.results) / (n - 1)) ** 0.5

    @property
    def errors(self) -> tuple[float, float]:
        """Standard errors of the NLL over samples, and over images and samples."""
        each: Any = sum(r.log_likelihood for r in self.results) / len(self.results)
        mc_se = math.hypot(*(r.nll_mc_se for r in self.results)) / len(self.results)
        return mc_se, float(each.std()) / math.sqrt(len(each)) if len(each) > 1 else math.nan

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {"name": self.name, "runs": self.runs, "seeds": self.seeds, "nll": self.nll, "nll_sd": self.spread}


def entries(paths: list[Path], records: list[dict[str, Any]], *, group: bool) -> list[Entry]:
    """A line for each run, or for all runs that differ in nothing but their seed.

    Raises:
        UserError: two runs of a group have the same seed.
    """
    seeds = [int(record.get("training", {}).get("seed", 0)) for record in records]
    if not group:
        return [Entry(str(path), [str(path)], [seed]) for path, seed in zip(paths, seeds, strict=True)]
    found: dict[str, list[int]] = {}
    for place, record in enumerate(records):
        alike: dict[str, Any] = {key: record.get(key) for key in ("model", "guide", "data", "rows")}
        alike["warm"] = "parent" in record.get("lineage", {})
        alike |= {"program": {k: v for k, v in record["program"].items() if k != "file"}}
        alike |= {"training": {k: v for k, v in record.get("training", {}).items() if k != "seed"}}
        found.setdefault(json.dumps(alike, sort_keys=True), []).append(place)
    folder = os.path.commonpath([path.absolute().parent for path in paths])
    short = [os.path.relpath(path.absolute(), folder) for path in paths]
    named = [ENDING.sub("", _begin_alike([short[i] for i in places])) for places in found.values()]
    made = []
    for name, places in zip(named, found.values(), strict=True):
        own = [seeds[i] for i in places]
        if len(set(own)) < len(own):
            raise UserError(
                f"two of {', '.join(short[i] for i in places)} are one training by one seed: name one of them"
            )
        name = short[places[0]] if len(places) == 1 or not name or named.count(name) > 1 else name
        made.append(Entry(name, [str(paths[i]) for i in places], own))
    return made


def _begin_alike(names: list[str]) -> str:
    """What all names begin with."""
    first, last = min(names), max(names)
    return first[: next((i for i, letter in enumerate(first) if letter != last[i]), len(first))]


def baseline_of(lines: list[Entry], wanted: str | None) -> int:
    """The place of the line that the others are compared with: the one that is named, else the first; of two, the second.

    Raises:
        UserError: there is no such line, or there is one alone.
    """
    if len(lines) < 2:
        raise UserError(f"all runs differ in nothing but their seed ({lines[0].name}): name runs of another kind too")
    if wanted is None:
        return 1 if len(lines) == 2 else 0
    for place, line in enumerate(lines):
        if wanted == line.name or any(Path(wanted) == Path(run) for run in line.runs):
            return place
    raise UserError(f"--baseline {wanted!r} is none of the runs: {nearest(wanted, [line.name for line in lines])}")


def against(lines: list[Entry], base: int, *, group: bool) -> list[Comparison]:
    """Compare every line with the baseline, over the seeds that both have, and keep what was found beside the lines.

    Raises:
        UserError: a group that has no seed in common with the baseline.
    """
    from pyro_vae.evaluation.compare import compare, together

    other, found = lines[base], []
    rest = [line for line in lines if line is not other]
    for line in rest:
        names = (line.name, other.name)
        if not group:
            found.append(compare(line.results[0], other.results[0], names))
            continue
        both = [seed for seed in line.seeds if seed in other.seeds]
        if not both:
            raise UserError(f"{line.name} and {other.name} have no seed in common: train both with the same seeds")
        ours, theirs = ([e.results[e.seeds.index(seed)] for seed in both] for e in (line, other))
        found.append(compare(ours, theirs, names))
    found = together(found)
    for line, one in zip(rest, found, strict=True):
        line.against = one
    return found


def cells(lines: list[Entry], base: int, *, group: bool, plain: bool) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text; ``plain`` leaves out what is not for print."""
    from pyro_vae.evaluation.result import digits, total_error

    signed = lambda value: f"{value:+.3f}"  # noqa: E731
    rows = []
    for line in lines:
        mc_se, data_se = line.errors
        spread = "" if line.spread is None else f" +- {line.spread:.2g}"
        row = [line.name, digits(line.nll, total_error(mc_se, data_se)) + spread]
        row += [str(len(line.results))] if group else []
        if not plain:
            proofs = {r.proof.verdict for r in line.results if r.proof is not None}
            row += [f"{mc_se:.3f}", f"{data_se:.2f}", ", ".join(sorted(proofs)) or "-"]
        one = line.against
        if one is None:
            row += ["0", "-", "-"] if line is lines[base] else ["-"] * 3
        else:
            p = one.p_value if one.p_together is None else one.p_together
            low, high = one.interval
            row += [
                f"{signed(one.mean)} +- {one.se:.2g}",
                f"{signed(low)} to {signed(high)}",
                "-" if one.few else f"{p:.1g}",
            ]
        rows.append(row)
    header = ["run", "NLL (nats)" + (" +- sd over seeds" if group else ""), *(["seeds"] if group else [])]
    header += [] if plain else ["Monte Carlo error", "data error", "weights"]
    return [*header, f"log p(x) less that of {lines[base].name}", "95 % interval", "p"], rows


def numbers(lines: list[Entry]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of all digits, for CSV."""
    rows: list[list[Any]] = []
    for line in lines:
        found = line.against.summary() if line.against is not None else {}
        keys = ("difference", "difference_se", "interval_low", "interval_high", "p_value_together")
        rows.append([line.name, len(line.results), line.nll, line.spread, *(found.get(key) for key in keys)])
    return [
        "run",
        "seeds",
        "nll",
        "nll_sd",
        "difference",
        "difference_se",
        "interval_low",
        "interval_high",
        "p_value",
    ], rows
