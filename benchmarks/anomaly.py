"""Anomaly detection on MNIST: one digit held out, and Frey faces (Fashion-MNIST where present) as the anomaly.

    python benchmarks/anomaly.py [--digits 0 1 ... 9] [--seeds 0 1 2] [--epochs 20] [--limit 1000]

For each digit and seed a model is trained on the other nine digits of MNIST (looked for under PYRO_VAE_DATA) and
asked which test images it does not expect. Models that saw all digits are asked about the other data sets, put on a
black background and binarized as MNIST is. The table of AUROCs, with the spread over seeds, goes to
benchmarks/results/anomaly.md, the figures beside it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.analysis.anomaly import SCORES, detect
from pyro_vae.data.alike import observed_like
from pyro_vae.evaluation.evaluate import chosen_rows

RESULTS = Path(__file__).parent / "results"
EVERY_DIGIT = -1


def program(data: Any, args: argparse.Namespace, digit: int, seed: int) -> Any:
    """A model of the digits but one; trained once."""
    out = Path(args.work) / f"anomaly-without-{digit}-{args.epochs}-{args.size or 'all'}-seed{seed}"
    if (out / "weights.safetensors").is_file():
        vae = pv.build(args.model, args.guide, data)
        return pv.load(out, program=vae).program
    kept = (data.labels["train"] != digit).nonzero().squeeze(-1)[: args.size]
    x = data.observed("train", rows=kept)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = pv.build(args.model, args.guide, data)
    return pv.fit(vae, x, epochs=args.epochs, batch_size=128, seed=seed, out=out).program


def rows(data: Any, split: str, chosen: Tensor, limit: int) -> Tensor:
    """At most ``limit`` of the chosen rows of a split, by a fixed seed."""
    index = chosen.nonzero().squeeze(-1)
    picked: Tensor = data.observed(split, rows=index[chosen_rows(len(index), limit)])
    return picked


def others(args: argparse.Namespace, ours: Any) -> dict[str, Tensor]:
    """Other data sets, binarized as MNIST is and fitted to its shape."""
    found = {}
    for name in ("frey-face", "fashion-mnist"):
        try:
            data = pv.load_data(name)
        except pv.UserError as error:  # not there, and no network to fetch it
            print(f"{name} is left out: {error}")
            continue
        found[name] = observed_like(ours, data, rows=chosen_rows(len(data.test), args.limit))
    return found


def tasks(data: Any, args: argparse.Namespace) -> dict[str, tuple[int, Any]]:
    """By name: the digit held out, and the images that are the anomaly (None: that digit)."""
    held_out: dict[str, tuple[int, Any]] = {f"digit {digit}": (digit, None) for digit in args.digits}
    return held_out | {name: (EVERY_DIGIT, x) for name, x in others(args, data).items()}


def one(data: Any, args: argparse.Namespace, digit: int, x: Tensor | None, seed: int) -> dict[str, float]:
    """The AUROCs of one model and one kind of anomaly."""
    labels = {split: data.labels[split] for split in ("validation", "test")}
    reference = rows(data, "validation", labels["validation"] != digit, args.limit)
    normal = rows(data, "test", labels["test"] != digit, args.limit)
    other = rows(data, "test", labels["test"] == digit, args.limit) if x is None else x
    result = detect(program(data, args, digit, seed), reference, normal, other, num_samples=args.samples, seed=seed)
    return result.auroc


def table(results: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> str:
    """Mean and standard deviation over seeds, and where a score is worse than chance."""
    lines = [
        f"AUROC over {len(args.seeds)} seeds (mean +- standard deviation), {args.model} with a {args.guide} guide, "
        f"{args.epochs} epochs, K = {args.samples}, at most {args.limit:,} images of each kind. **Bold**: worse than chance.",
        "",
        "| anomaly | " + " | ".join(SCORES) + " |",
        "|---" * (len(SCORES) + 1) + "|",
    ]
    failures = []
    for name, found in results.items():
        cells = []
        for score in SCORES:
            values = [f[score] for f in found]
            mean = statistics.mean(values)
            text = f"{mean:.3f}" + (f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else "")
            cells.append(f"**{text}**" if mean < 0.5 else text)
            if score == "nll" and mean < 0.5:
                failures.append(name)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    where = ", ".join(failures)
    verdict = f"The likelihood alone fails on {where}: such images are more likely under the model than its own data."
    lines += ["", verdict if failures else "The likelihood alone is better than chance on all of them."]
    lines += ["", f"PyTorch {torch.__version__}, Python {platform.python_version()} ({platform.machine()})."]
    return "\n".join(lines)


def main() -> None:
    """Train what is missing, score, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=int, nargs="*", default=list(range(10)))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", default="mlp")
    parser.add_argument("--guide", default="diagonal")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--size", type=int, default=None, help="training images, all where not given")
    parser.add_argument("--work", default="runs/benchmark")
    args = parser.parse_args()
    data = pv.load_data("mnist")
    results: dict[str, list[dict[str, float]]] = {}
    for name, (digit, x) in tasks(data, args).items():
        results[name] = [one(data, args, digit, x, seed) for seed in args.seeds]
        print(name, results[name], flush=True)
    text = table(results, args)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "anomaly.json").write_text(json.dumps({"results": results, "arguments": vars(args)}, indent=2) + "\n")
    (RESULTS / "anomaly.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
