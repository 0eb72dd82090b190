"""Error against time: the same estimates of log p(x) with products in float32 and in bfloat16.

    python benchmarks/precision.py [RUN] [--images 100] [--samples 50 200 1000 5000] [--rounds 5]

RUN is a run directory on MNIST; without one, the model of benchmarks/ais.py is trained (20 latents, 200-200 decoder). The truth
is importance weighting of the same images with ten times the most samples, of another seed; the error is the root mean square
over images of the corrected estimate minus that truth, noise of either kind included. Time is of compiled passes, medians of
interleaved rounds. Writes benchmarks/results/precision.json and docs/figures/precision.png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import ais
import torch
from matplotlib.figure import Figure

import pyro_vae as pv
from pyro_vae.capture import capture
from pyro_vae.evaluation.estimators import estimate
from pyro_vae.evaluation.evaluate import chosen_rows
from pyro_vae.evaluation.importance import block_shape
from pyro_vae.evaluation.weights import weigh
from pyro_vae.programs.functional import OfProgram
from pyro_vae.programs.trace import evaluating
from pyro_vae.seeding import seeded

RESULTS = Path(__file__).parent / "results"
FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "precision.png"
PRECISIONS = ("full", "bf16")


def passes(program: Any, x: torch.Tensor, precision: str, samples: int) -> Any:
    """Corrected estimates of log p(x) from graphs that are compiled once."""
    images, size = block_shape(x, samples)
    images = next(n for n in range(images, 0, -1) if len(x) % n == 0)  # blocks of one shape
    bound = OfProgram(program, weigh)

    def function(tensors: Any, block: torch.Tensor) -> Any:
        return bound.at(tensors, block, None, size, precision)

    graph = capture(function, (bound.tensors(), x[:images]))

    def run(seed: int = 0) -> torch.Tensor:
        found = []
        with seeded(seed):
            for first in range(0, len(x), images):
                block = x[first : first + images]
                parts = [graph(bound.tensors(), block)[0] for _ in range(0, samples, size)]
                result = estimate(torch.cat(parts))
                found.append(result.log_likelihood - result.bias)
        return torch.cat(found)

    return run


def main() -> None:
    """Measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--samples", type=int, nargs="+", default=[50, 200, 1000, 5000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--work", default="runs/benchmark")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    run = pv.load(args.run or ais.trained(args))
    data = run.load_data()
    x = data.observed("test", rows=chosen_rows(len(data.test), args.images))
    truth = pv.log_likelihood(run.program, x, num_samples=10 * max(args.samples), seed=99)
    exact = truth.log_likelihood - truth.bias
    with evaluating(run.program):
        contestants = {(p, k): passes(run.program, x, p, k) for p in PRECISIONS for k in args.samples}
        times: dict[Any, list[float]] = {c: [] for c in contestants}
        errors: dict[Any, list[float]] = {c: [] for c in contestants}
        means: dict[Any, list[float]] = {c: [] for c in contestants}
        for round_ in range(args.rounds):
            for name, compute in contestants.items():
                start = time.perf_counter()
                found = compute(round_)
                times[name].append((time.perf_counter() - start) / len(x))
                errors[name].append(float((found - exact).square().mean().sqrt()))
                means[name].append(float((found - exact).mean()))
    rows = [
        {
            "precision": p,
            "samples": k,
            "ms_per_image": statistics.median(times[p, k]) * 1e3,
            "rms_error": statistics.median(errors[p, k]),
            "mean_error": statistics.mean(means[p, k]),
        }
        for p, k in contestants
    ]
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "threads": torch.get_num_threads()}
    figures = {"images": len(x), "rows": rows, "torch": torch.__version__, **machine}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "precision.json").write_text(json.dumps(figures, indent=2) + "\n")
    draw(rows)
    for row in rows:
        print(row)


def draw(rows: list[dict[str, Any]]) -> None:
    """Error against time, both logarithmic."""
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for precision, marker in zip(PRECISIONS, "os", strict=True):
        own = [r for r in rows if r["precision"] == precision]
        label = {"full": "float32", "bf16": "bfloat16 products"}[precision]
        axes.plot([r["ms_per_image"] for r in own], [r["rms_error"] for r in own], marker=marker, label=label)
        for r in own:
            where = r["ms_per_image"], r["rms_error"]
            axes.annotate(f"K = {r['samples']:,}", where, (4, 5), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="milliseconds per image", ylabel="rms error of log p(x), nats")
    axes.legend(frameon=False)
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=150)


if __name__ == "__main__":
    main()
