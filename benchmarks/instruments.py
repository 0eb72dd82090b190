"""The instruments, calibrated: every estimator and diagnostic that the library reports, on models whose answer is known.

    python benchmarks/instruments.py [--jobs 2] [--only PATTERN] [--short] [--again] [--out DIR]

Every cell holds one instrument, at the library's default settings, against one model of exact.py or exact_others.py, with a
fixed seed of its own. Where an estimator is unbiased (w; 1 / w of chains back) the mean is tested there, by its z, and datum by
datum by a chi-square; on the log scale what is tested is the bias that is left after correction, as a share of the reported
error, and how often the stated 95 % interval holds the truth. Every cell says its power: the fault that would have been four
errors large.

Cells are independent, run in processes of one thread each, and finished ones are not run again unless asked for. All of them
take about an hour of two cores. Writes benchmarks/results/instruments.json and instruments.md, and the short table into
docs/evaluation.md (with --out, into that folder alone). Ends with status 1 where a cell fails.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SHORT = 0.15  # of the replicates, in the short form
GROUPS = (
    "importance weighting",
    "importance weighting, K < 25",
    "mean over images",
    "adaptive",
    "Sobol noise",
    "bfloat16",
    "Pareto k",
    "bound against K",
    "annealing",
    "annealing, informative data",
    "reverse chains",
    "bounds from both sides",
    "NUTS",
    "HMC",
    "PSIS resampling",
    "SBC",
    "imputation",
    "inference gaps",
    "information",
    "active units",
    "compare",
    "anomaly",
    "claims",
    "proof of right programs",
    "proof of faults",
)


def all_cells() -> dict[str, Any]:
    """Every cell by its full name, in the order of the table."""
    import instruments_annealing
    import instruments_claims
    import instruments_draws
    import instruments_proof
    import instruments_summaries
    import instruments_weights

    modules = (
        instruments_weights,
        instruments_annealing,
        instruments_draws,
        instruments_summaries,
        instruments_claims,
        instruments_proof,
    )
    found = sorted((cell for m in modules for cell in m.cells()), key=lambda c: GROUPS.index(c.group))
    return {f"{cell.group}: {cell.name}": cell for cell in found}


def run_cell(name: str, size: float) -> dict[str, Any]:
    """Run one cell: its checks, verdict and seconds, plain for JSON."""
    cell = all_cells()[name]
    clock, cpu = time.perf_counter(), time.process_time()
    error = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # models of known answers are made to look bad; what is judged is the figures
        try:
            checks = [check.plain() for check in cell.run(size)]
        except Exception as failure:
            checks, error = [], f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
    return {
        "group": cell.group,
        "name": cell.name,
        "size": size,
        "passes": error is None and bool(checks) and all(c["passes"] for c in checks),
        "error": error,
        "checks": checks,
        "seconds": round(time.perf_counter() - clock, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "machine": described_machine(),
    }


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def run_all(names: list[str], size: float, jobs: int, kept: dict[str, Any], out: Path) -> None:
    """Run cells in processes, and file each as it ends."""
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_thread) as pool:
        waiting = {pool.submit(run_cell, name, size): name for name in names}
        for done, future in enumerate(as_completed(waiting), 1):
            name = waiting[future]
            found = kept[name] = future.result()
            verdict = "ok  " if found["passes"] else "FAIL"
            print(f"[{done}/{len(names)}] {verdict} {name} ({found['cpu_seconds']:.0f} s)", flush=True)
            write(out / "instruments.json", json.dumps({"cells": kept}, indent=1) + "\n")


def write(path: Path, text: str) -> None:
    """Replace a file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text)
    part.replace(path)


def described_machine() -> str:
    """Processor and versions, in one line."""
    from turns import described, machine

    return described(machine())


def of_kind(cell: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The judged checks of one kind."""
    return [c for c in cell["checks"] if c["kind"] == kind and c["judged"] and c["value"] is not None]


def number(value: float) -> str:
    """Three digits, and no powers of ten for what is common."""
    return f"{value:.3g}" if value == 0 or 1e-4 <= abs(value) < 1e5 else f"{value:.0e}"


def power_of(cell: dict[str, Any]) -> str:
    """The powers of a cell's judged checks, the first of each unit."""
    found: dict[str, float] = {}
    for check in cell["checks"]:
        if check["judged"] and check["power"] is not None and check["unit"] not in found:
            found[check["unit"]] = check["power"]
    return "; ".join(f"{number(v)} {unit}" for unit, v in list(found.items())[:2])


def row(cell: dict[str, Any]) -> str:
    """One cell as a row of Markdown."""
    z, p, share, coverage = (of_kind(cell, k) for k in ("z", "p", "share", "coverage"))
    shown = [c for c in cell["checks"] if c["kind"] == "coverage" and not c["judged"]]
    columns = [
        cell["name"],
        f"{max((c['value'] for c in z), key=abs):+.1f}" if z else "",
        number(min(c["value"] for c in p)) if p else "",
        f"{share[0]['value']:+.2f}" if share else "",
        " ".join(f"{c['value']:.1%}" for c in coverage) or " ".join(f"({c['value']:.1%})" for c in shown),
        power_of(cell),
        "holds" if cell["passes"] else f"**fails**: {failure_of(cell)}",
        f"{cell['cpu_seconds']:.0f}",
    ]
    return "| " + " | ".join(columns) + " |"


def failure_of(cell: dict[str, Any]) -> str:
    """Which checks fail, with their figures."""
    if cell["error"]:
        return str(cell["error"]).replace("|", "/")
    bad = [c for c in cell["checks"] if not c["passes"]]
    return "; ".join(
        f"{c['name'].replace('|', '/')} = {'NaN' if c['value'] is None else number(c['value'])}" for c in bad
    )


def long_table(cells: dict[str, Any]) -> str:
    """Every cell, by group."""
    lines = [
        headline(cells),
        "",
        "z: of the means that have to be exact, the largest of a cell (one-sided where theory has a bound). p: the smallest "
        "of its tests. Bias: left after correction, as a share of the reported error. Coverage: of the stated 95 % interval "
        "where k is good; in brackets where it is not judged (few draws). Power: the fault that four standard errors would have "
        "shown.",
    ]
    for group in GROUPS:
        rows = [c for c in cells.values() if c["group"] == group]
        if rows:
            head = "| | z | p | bias / error | coverage | power | verdict | CPU s |"
            lines += [
                "",
                f"## {group[0].upper()}{group[1:]}",
                "",
                head,
                "|---|---|---|---|---|---|---|---|",
                *map(row, rows),
            ]
    return "\n".join([*lines, "", machines(cells)])


def short_table(cells: dict[str, Any]) -> str:
    """One row per instrument."""
    lines = [
        headline(cells),
        "",
        "| instrument | cells that hold | largest \\|z\\| | smallest p | bias / error | coverage of 95 % | median power |",
        "|---|---|---|---|---|---|---|",
    ]
    for group in GROUPS:
        rows = [c for c in cells.values() if c["group"] == group]
        if not rows:
            continue
        z, p, share, coverage = (
            [c for cell in rows for c in of_kind(cell, k)] for k in ("z", "p", "share", "coverage")
        )
        columns = [
            group,
            f"{sum(c['passes'] for c in rows)} of {len(rows)}",
            # of a one-sided check, only the side that theory forbids
            f"{max(max(-c['value'] if c['low'] is not None else 0, c['value'] if c['high'] is not None else 0) for c in z):.1f}"
            if z
            else "",
            f"{number(min(c['value'] for c in p))} of {len(p)}" if p else "",
            f"{min(c['value'] for c in share):+.2f} to {max(c['value'] for c in share):+.2f}" if share else "",
            f"{min(c['value'] for c in coverage):.1%} to {max(c['value'] for c in coverage):.1%}" if coverage else "",
            median_power(rows),
        ]
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join([*lines, "", machines(cells)])


def machines(cells: dict[str, Any]) -> str:
    """Where the cells were run, the most of them first."""
    found = [c["machine"] for c in cells.values()]
    return "; ".join(f"{name} ({found.count(name)} cells)" for name in sorted(set(found), key=found.count)[::-1]) + "."


def median_power(cells: list[dict[str, Any]]) -> str:
    """Of the first power of every cell, by far the most common unit."""
    first = [
        next(((c["unit"], c["power"]) for c in cell["checks"] if c["judged"] and c["power"] is not None), None)
        for cell in cells
    ]
    units = [f[0] for f in first if f]
    if not units:
        return ""
    unit = max(set(units), key=units.count)
    values = sorted(f[1] for f in first if f and f[0] == unit)
    return f"{number(values[len(values) // 2])} {unit}".strip()


def headline(cells: dict[str, Any]) -> str:
    """How many hold, of how many, and what chance would have made of them."""
    holds, tests = sum(c["passes"] for c in cells.values()), sum(len(of_kind(c, "z")) for c in cells.values())
    largest = math.sqrt(2 * math.log(max(2, tests)))
    minutes = sum(c["cpu_seconds"] for c in cells.values()) / 60
    size = "" if all(c["size"] == 1 for c in cells.values()) else ", in short form"
    return (
        f"{holds} of {len(cells)} cells hold{size} (`python benchmarks/instruments.py`, {minutes:.0f} minutes of one core). "
        f"Of {tests:,} z-scores chance alone makes the largest about {largest:.1f}; from 4 on a cell fails."
    )


def main() -> int:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--only", default=".", help="cells whose name matches this regular expression")
    parser.add_argument("--short", action="store_true", help="a few cells of every instrument, with fewer replicates")
    parser.add_argument("--again", action="store_true", help="run finished cells again")
    parser.add_argument("--out", type=Path, default=None, help="write here, and leave the documents as they are")
    args = parser.parse_args()
    out, size = args.out or RESULTS, SHORT if args.short else 1.0
    cells = all_cells()
    wanted = [n for n, cell in cells.items() if re.search(args.only, n) and (cell.short or not args.short)]
    path = out / "instruments.json"
    before = json.loads(path.read_text())["cells"] if path.is_file() else {}
    kept = {n: found for n, found in before.items() if n in cells and (found["size"] == size or n not in wanted)}
    missing = [n for n in wanted if args.again or n not in kept]
    # the longest first would be better known from the last time
    missing.sort(key=lambda n: -before.get(n, {}).get("cpu_seconds", 60.0))
    run_all(missing, size, args.jobs, kept, out)
    kept = {n: kept[n] for n in cells if n in kept}
    write(out / "instruments.md", long_table(kept) + "\n")
    print(short_table(kept))
    if args.out is None and not args.short and len(kept) == len(cells):
        from mnist import into_readme

        into_readme("instruments", short_table(kept), "docs/evaluation.md")
    failed = [n for n in wanted if not kept[n]["passes"]]
    for name in failed:
        print(f"fails: {name}: {failure_of(kept[name])}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
