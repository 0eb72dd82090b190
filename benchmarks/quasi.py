"""Error against time: log p(x) from independent draws and from Sobol noise, with 2 and with 20 latents.

    python benchmarks/quasi.py [--images 50] [--samples 128 512 2048 8192] [--seeds 20] [--epochs 15]

MLP VAEs are trained on the embedded digits. The truth of every image is importance weighting with 16 times the most samples, of
another seed; an image's error is the root mean square over seeds of the corrected estimate minus it, and what is shown is the
median over images, since a few images with a bad k would drown the others. Time is of uncompiled passes, the median of the
seeds. Writes benchmarks/results/quasi.json and quasi.md, the table into docs/choices.md, and docs/figures/quasi.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from mnist import into_readme
from turns import described, machine

import pyro_vae as pv
from pyro_vae.evaluation.evaluate import chosen_rows
from pyro_vae.evaluation.result import UnreliableEstimateWarning

RESULTS = Path(__file__).parent / "results"
FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "quasi.png"
LATENTS = (2, 20)
KINDS = ("random", "sobol")


def cells(latents: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One model: error and time of either noise at every K."""
    data = pv.load_data("digits")
    torch.manual_seed(0)
    vae = pv.build("mlp", "diagonal", data, latent_dim=latents)
    pv.fit(vae, data, epochs=args.epochs, seed=0, device="cpu")
    x = data.observed("test", rows=chosen_rows(len(data.test), args.images))
    most = pv.log_likelihood(vae, x, num_samples=16 * max(args.samples), seed=10_000, compile="off")
    truth = most.log_likelihood - most.bias
    found = []
    for samples in args.samples:
        for kind in KINDS:
            errors, bars, seconds = [], [], []
            for seed in range(args.seeds):
                began = time.perf_counter()
                result = pv.log_likelihood(vae, x, num_samples=samples, seed=seed, noise=kind, compile="off")
                seconds.append((time.perf_counter() - began) / len(x))
                errors.append(result.log_likelihood - result.bias - truth)
                bars.append(result.mc_se)
            found.append(
                {
                    "latents": latents,
                    "noise": kind,
                    "samples": samples,
                    "rms_error": typical(errors),
                    "rms_bar": typical(bars),
                    "ms_per_image": 1e3 * statistics.median(seconds),
                }
            )
            print(found[-1], flush=True)
    return found


def typical(found: list[torch.Tensor]) -> float:
    """Root mean squares over seeds, their median over images."""
    return float(torch.stack(found).square().mean(0).sqrt().median())


def report(figures: dict[str, Any]) -> str:
    """As Markdown: a row for every K, either noise beside the other."""
    lines = [
        f"Digits, {figures['images']} test images, {figures['seeds']} seeds: root mean square error of log p(x) in nats, of the "
        "median image (what the error bars say), and milliseconds per image.",
        "",
        "| latents | K | random | sobol | random (ms) | sobol (ms) |",
        "|---|---|---|---|---|---|",
    ]
    by = {(c["latents"], c["samples"], c["noise"]): c for c in figures["cells"]}
    for latents in LATENTS:
        for samples in figures["samples"]:
            random, sobol = (by[latents, samples, kind] for kind in KINDS)
            errors = " | ".join(f"{c['rms_error']:.4f} ({c['rms_bar']:.4f})" for c in (random, sobol))
            lines.append(
                f"| {latents} | {samples:,} | {errors} | {random['ms_per_image']:.2f} | {sobol['ms_per_image']:.2f} |"
            )
    return "\n".join([*lines, "", f"{described(figures['machine'])}."])


def draw(figures: dict[str, Any]) -> None:
    """Error against time, a panel per model."""
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    for ax, latents in zip(figure.subplots(1, len(LATENTS)), LATENTS, strict=True):
        for kind, marker in zip(KINDS, "os", strict=True):
            found = [c for c in figures["cells"] if (c["latents"], c["noise"]) == (latents, kind)]
            ax.loglog(
                [c["ms_per_image"] for c in found],
                [c["rms_error"] for c in found],
                marker=marker,
                label=f"{kind} noise",
            )
        ax.set_title(f"{latents} latents", fontsize=10)
        ax.set_xlabel("milliseconds per image, uncompiled")
        ax.legend(frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("rms error of log p(x), nats")
    figure.savefig(FIGURE, dpi=120)


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--samples", type=int, nargs="+", default=[128, 512, 2048, 8192])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=15)
    args = parser.parse_args()
    warnings.simplefilter("ignore", UnreliableEstimateWarning)
    figures = {**vars(args), "cells": [c for latents in LATENTS for c in cells(latents, args)], "machine": machine()}
    text = report(figures)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "quasi.json").write_text(json.dumps(figures, indent=2) + "\n")
    (RESULTS / "quasi.md").write_text(text + "\n")
    draw(figures)
    into_readme("quasi", text, "docs/choices.md")
    print(text)


if __name__ == "__main__":
    main()
