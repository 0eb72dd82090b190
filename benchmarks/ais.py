"""Annealed importance sampling of an MNIST model: time, acceptance and the gap between its bounds.

    python benchmarks/ais.py [--images 200] [--chains 16] [--distributions 1000] [--leapfrog 10] [--gap-images 20]

A VAE with 20 latents and a 200-200 decoder is trained on MNIST (looked for under PYRO_VAE_DATA) unless its run is there already;
200 test images are annealed from the prior; and as many simulated images as --gap-images are bounded from both sides. To finish
within 12 minutes on two cores. The table goes to benchmarks/results/ais.md, the figures to ais.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch

import pyro_vae as pv
from pyro_vae.evaluation.ais import annealed_log_likelihood
from pyro_vae.evaluation.bdmc import bidirectional
from pyro_vae.evaluation.evaluate import chosen_rows
from pyro_vae.evaluation.result import UnreliableEstimateWarning

RESULTS = Path(__file__).parent / "results"


def trained(args: argparse.Namespace) -> Path:
    """The run directory; trains it if it is not there."""
    out = Path(args.work) / f"mnist-20-latents-{args.epochs}"
    if not (out / "weights.safetensors").is_file():
        declared = ["--model", "mlp", "--guide", "diagonal", "--set", "latent_dim=20"]
        nets = ["--decoder", "mlp:hidden=[200, 200]", "--encoder", "mlp:hidden=[200, 200]"]
        how = ["--epochs", str(args.epochs), "--out", str(out), "--quiet"]
        subprocess.run([sys.executable, "-m", "pyro_vae.cli", "train", "mnist", *declared, *nets, *how], check=True)
    return out


def main() -> None:
    """Train, anneal, bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--chains", type=int, default=16)
    parser.add_argument("--distributions", type=int, default=1000)
    parser.add_argument("--leapfrog", type=int, default=10)
    parser.add_argument("--gap-images", type=int, default=20)
    parser.add_argument("--gap-distributions", type=int, default=None, help="by default as many as for the test images")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", default="runs/benchmark")
    args = parser.parse_args()
    warnings.simplefilter("ignore", UnreliableEstimateWarning)

    run = pv.load(trained(args))
    data = run.load_data()
    x = data.observed("test", rows=chosen_rows(len(data.test), args.images))
    how = {"num_chains": args.chains, "num_leapfrog": args.leapfrog, "seed": args.seed}

    begin = time.perf_counter()
    weighted = pv.log_likelihood(run.program, x, num_samples=5000, seed=args.seed)
    weighted_seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    annealed = annealed_log_likelihood(run.program, x, num_distributions=args.distributions, **how)
    seconds = time.perf_counter() - begin
    gradients = args.images * args.chains * args.distributions * args.leapfrog
    distributions = args.gap_distributions or args.distributions
    begin = time.perf_counter()
    bounds = bidirectional(run.program, args.gap_images, num_distributions=distributions, **how)
    gap_seconds = time.perf_counter() - begin

    figures = {
        "seconds": round(seconds, 1),
        "gradients_per_second": gradients / seconds,
        "ais": annealed.summary(),
        "iw": weighted.summary(),
        "iw_seconds": round(weighted_seconds, 1),
        **bounds.summary(),
        "bdmc_distributions": distributions,
        "bdmc_seconds": round(gap_seconds, 1),
        **{k: v for k, v in vars(args).items() if k != "work"},
    }
    difference = float((annealed.log_likelihood - weighted.log_likelihood).mean())
    table = "\n".join(
        [
            f"{args.images} MNIST test images, 20 latents, decoder 200-200; {args.chains} chains, {args.distributions} "
            f"distributions, {args.leapfrog} leapfrog steps.",
            "",
            "| | NLL (nats) | Monte Carlo error | minutes |",
            "|---|---|---|---|",
            f"| ELBO | {-float(weighted.elbo.mean()):.2f} | | |",
            f"| importance weighting, K = 5,000 | {weighted.nll:.2f} | {weighted.nll_mc_se:.3f} | {weighted_seconds / 60:.1f} |",
            f"| annealing, acceptance {float(annealed.acceptance.mean()):.2f} | {annealed.nll:.2f} | "
            f"{annealed.nll_mc_se:.3f} | {seconds / 60:.1f} |",
            "",
            f"Annealing finds {difference:.3f} nats more than importance weighting. On {args.gap_images} simulated images, with "
            f"{distributions} distributions, log p(x) lies between {float(bounds.lower.mean()):.3f} and "
            f"{float(bounds.upper.mean()):.3f}: gap {bounds.mean_gap:.3f}"
            + (f" +- {bounds.gap_se:.3f}" if math.isfinite(bounds.gap_se) else "")
            + f" nats, in {gap_seconds / 60:.1f} minutes. {gradients / seconds:,.0f} gradients per second.",
            "",
            f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads, PyTorch {torch.__version__}, "
            f"Python {platform.python_version()}.",
        ]
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "ais.json").write_text(json.dumps(figures, indent=2) + "\n")
    (RESULTS / "ais.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
