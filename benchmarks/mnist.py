"""Train the default model and guide on MNIST for 100 epochs at several seeds, and print the README's table.

    python benchmarks/mnist.py --seeds 0 1 2 [--model mixture] [--epochs 100] [--work runs/benchmark]

MNIST is looked for under PYRO_VAE_DATA. Every seed is one `pyro-vae train` and one `pyro-vae evaluate`, run as a user would run
them; a seed whose run is already whole is not run again. The table goes to benchmarks/results/mnist.md, the figures
beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def command(*args: str) -> str:
    """Run ``pyro-vae`` and return what it printed."""
    return subprocess.run(
        [sys.executable, "-m", "pyro_vae.cli", *args], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def one_seed(args: argparse.Namespace, seed: int) -> dict:
    """Train and evaluate once; the figures of ``evaluate --json`` with the wall-clock seconds of both commands."""
    out = Path(args.work) / f"mnist-{args.model}-{args.epochs}-seed{seed}"
    figures = out / "benchmark.json"
    if figures.is_file():
        return json.loads(figures.read_text())
    start = time.perf_counter()
    declared = ["--model", args.model, "--guide", args.guide, "--epochs", str(args.epochs), "--seed", str(seed)]
    command("train", "mnist", *declared, "--out", str(out), "--quiet")
    trained = time.perf_counter()
    result = json.loads(command("evaluate", str(out), "--samples", str(args.samples), "--json", "--quiet"))
    result |= {"train_seconds": trained - start, "evaluate_seconds": time.perf_counter() - trained, "train_seed": seed}
    figures.write_text(json.dumps(result, indent=2))
    return result


def table(args: argparse.Namespace, results: list[dict]) -> str:
    """The seeds as rows of Markdown, with their mean and spread."""
    lines = [
        f"`pyro-vae train mnist --epochs {args.epochs} --model {args.model} --guide {args.guide} --seed S`, then "
        f"`pyro-vae evaluate RUN`: 50,000 training images; dynamic binarization; K = {results[0]['num_samples']:,}; "
        f"all {results[0]['num_data']:,} test images.",
        "",
        "| seed | test NLL (nats) | Monte Carlo error | data error | ELBO | bad Pareto k | active units | training (min) | "
        "evaluation (min) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        lines.append(
            f"| {r['train_seed']} | {r['nll']:.2f} | {r['nll_mc_se']:.4f} | {r['nll_data_se']:.2f} | {r['elbo']:.2f} | "
            f"{r['khat_bad_fraction']:.1%} | {'+'.join(map(str, r['active_units']))} | {r['train_seconds'] / 60:.1f} | "
            f"{r['evaluate_seconds'] / 60:.1f} |"
        )
    if len(results) > 1:
        nlls = [r["nll"] for r in results]
        lines += [
            "",
            f"Over {len(nlls)} seeds: {statistics.mean(nlls):.2f} +- {statistics.stdev(nlls):.2f} (standard deviation).",
        ]
    import torch

    lines += [
        "",
        f"{os.cpu_count()} CPU cores ({platform.machine()}), PyTorch {torch.__version__}, Python {platform.python_version()}.",
    ]
    return "\n".join(lines)


def into_readme(name: str, text: str, file: str = "README.md") -> None:
    """Put a table where the README, or another document, has a place for it."""
    readme = Path(__file__).parent.parent / file
    before, marker, after = readme.read_text().partition(f"<!-- results: {name} -->\n")
    if marker:
        readme.write_text(before + marker + text + "\n" + after[after.index("<!-- end -->") :])


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", default="mixture")
    parser.add_argument("--guide", default="diagonal")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--work", default="runs/benchmark")
    args = parser.parse_args()
    results = [one_seed(args, seed) for seed in args.seeds]
    RESULTS.mkdir(exist_ok=True)
    stem = "mnist" if args.model == "mixture" else f"mnist-{args.model}"
    text = table(args, results)
    into_readme(stem, text)
    (RESULTS / f"{stem}.json").write_text(json.dumps(results, indent=2) + "\n")
    (RESULTS / f"{stem}.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
