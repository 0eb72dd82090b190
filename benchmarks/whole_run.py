"""``pyro-vae train mnist --epochs 100`` from start to finished run directory, against the matrix products of its steps.

    python benchmarks/whole_run.py [--epochs 100] [--threads 2] [--rounds 1]

A round is the command with empty caches of compiled code, and again with what the first left there, as a user would give it;
before, between and after the two, a process of its own takes the floor: one epoch of the products of every layer of the default
model and guide (784-500-500-40 and back) and of both their gradients, at batch 128 and nothing else (contestants.py). A ratio is
of the whole command's seconds to as many steps of the floor's median; validation, compiling and starting count against us.
MNIST is looked for under PYRO_VAE_DATA. Writes benchmarks/results/whole_run.json and whole_run.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from contestants import FLOORS, SIZES
from turns import Worker, cores, described, machine, num_cores

RESULTS = Path(__file__).parent / "results"
ROWS, SIZE = 50_000, "mnist"
FLOOR_TURNS = 5  # epochs of products at each reading


def command(epochs: int, out: Path, cache: Path, threads: int) -> dict[str, float]:
    """Train as a user would: seconds of the command, of its epochs after the first, and of the first."""
    cache.mkdir(exist_ok=True)  # of all that Inductor keeps, its precompiled headers too
    settings = {**os.environ, "OMP_NUM_THREADS": str(threads), "TMPDIR": str(cache)}
    settings.pop("TORCHINDUCTOR_CACHE_DIR", None)
    arguments = ["train", "mnist", "--epochs", str(epochs), "--out", str(out), "--quiet"]
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "pyro_vae.cli", *arguments], check=True, env=settings, stdout=subprocess.DEVNULL
    )
    whole = time.perf_counter() - began
    with (out / "metrics.csv").open() as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    return {"seconds": whole, "first_epoch": seconds[0], "later_epochs": sum(seconds[1:])}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All rounds."""
    steps = ROWS // SIZES[SIZE].batch
    settings = {"OMP_NUM_THREADS": str(args.threads), "CUDA_VISIBLE_DEVICES": ""}
    arguments = [FLOORS[0], SIZE, "cpu", str(steps * SIZES[SIZE].batch), str(args.threads)]
    worker = Worker(Path(__file__).parent / "contestants.py", arguments, settings, cores(args.threads))
    floors: list[float] = []
    runs: list[dict[str, Any]] = []

    def read_floor() -> None:
        floors.extend(worker.turn()["seconds"] for _ in range(FLOOR_TURNS))

    try:
        load = os.getloadavg()[0]
        read_floor()
        for _ in range(args.rounds):
            with tempfile.TemporaryDirectory() as work:
                for which in ("empty caches", "kept caches"):
                    out = Path(work) / which.split()[0]
                    runs.append({"which": which} | command(args.epochs, out, Path(work) / "cache", args.threads))
                    read_floor()
                    print(runs[-1], flush=True)
    finally:
        worker.stop()
    floor = statistics.median(floors) * args.epochs
    for run in runs:
        run["times_floor"] = run["seconds"] / floor
    return {
        "epochs": args.epochs,
        "threads": args.threads,
        "steps": steps * args.epochs,
        "floor_seconds": floor,
        "floor_epochs": floors,
        "runs": runs,
        "load_average": [load, os.getloadavg()[0]],
        "machine": machine(),
    }


def report(f: dict[str, Any]) -> str:
    """As Markdown."""
    lines = [
        f"`pyro-vae train mnist --epochs {f['epochs']}`, {f['steps']:,} steps, {f['threads']} thread(s); the products of these "
        f"steps alone would take {f['floor_seconds']:.0f} s (median of {len(f['floor_epochs'])} epochs of products).",
        "",
        "| compiled code | whole command (s) | times the floor | first epoch and compiling (s) | later epochs (s) | rest (s) |",
        "|---|---|---|---|---|---|",
    ]
    for r in f["runs"]:
        rest = r["seconds"] - r["first_epoch"] - r["later_epochs"]
        lines.append(
            f"| {r['which']} | {r['seconds']:.0f} | {r['times_floor']:.2f} | {r['first_epoch']:.1f} | {r['later_epochs']:.0f} | "
            f"{rest:.1f} |"
        )
    before, after = f["load_average"]
    lines += ["", f"Load average {before:.1f} before and {after:.1f} after. {described(f['machine'])}."]
    return "\n".join(lines)


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--rounds", type=int, default=1)
    figures = measure(parser.parse_args())
    text = report(figures)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "whole_run.json").write_text(json.dumps(figures, indent=2) + "\n")
    (RESULTS / "whole_run.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
