"""Annealed importance sampling of an MNIST model: time, acceptance and the gap between its bounds.

    python benchmarks/ais.py [--images 200] [--chains 16] [--distributions 1000] [--leapfrog 10] [--gap-images 400]
        [--longer 3000 10000] [--device auto]

A VAE with 20 latents and a 200-200 decoder is trained on MNIST (looked for under PYRO_VAE_DATA) unless its run is there already.
200 test images are weighted and annealed from the prior; simulated images are bounded from both sides at the same settings, and
again, the same images, with more distributions. In theory no gap is below 0 and none grows with the distributions: the table
tells by how many of its standard errors each does. On two cores the bounds of 400 images take 12, 36 and 120 minutes; on a
GPU, minutes in all.
The table goes to benchmarks/results/ais.md, the figures to ais.json, both after every part.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import pyro_vae as pv
from pyro_vae.evaluation.evaluate import chosen_rows
from pyro_vae.evaluation.result import UnreliableEstimateWarning
from pyro_vae.programs.trace import device_of

RESULTS = Path(__file__).parent / "results"


def trained(args: argparse.Namespace) -> Path:
    """The run directory; trains it if it is not there."""
    out = Path(args.work) / f"mnist-20-latents-{args.epochs}"
    if not (out / "weights.safetensors").is_file():
        declared = ["--model", "mlp", "--guide", "diagonal", "--set", "latent_dim=20"]
        nets = ["--decoder", "mlp:hidden=[200, 200]", "--encoder", "mlp:hidden=[200, 200]"]
        how = ["--epochs", str(args.epochs), "--out", str(out), "--device", "cpu", "--quiet"]
        subprocess.run([sys.executable, "-m", "pyro_vae.cli", "train", "mnist", *declared, *nets, *how], check=True)
    return out


class Timed:
    """Seconds on the clock, and of all processors, that a block took."""

    def __enter__(self) -> Timed:
        self._begin = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self._begin[0]
        self.cpu_seconds = time.process_time() - self._begin[1]

    def figures(self) -> dict[str, float]:
        """For JSON."""
        return {"seconds": round(self.seconds, 1), "cpu_seconds": round(self.cpu_seconds, 1)}


def main() -> None:
    """Train, anneal, bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--chains", type=int, default=16)
    parser.add_argument("--distributions", type=int, default=1000)
    parser.add_argument("--leapfrog", type=int, default=10)
    parser.add_argument("--gap-images", type=int, default=400)
    parser.add_argument("--longer", type=int, nargs="*", default=[3000, 10_000])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", default="runs/benchmark")
    args = parser.parse_args()
    warnings.simplefilter("ignore", UnreliableEstimateWarning)

    run = pv.load(trained(args), device=args.device)
    data = run.load_data()
    x = data.observed("test", rows=chosen_rows(len(data.test), args.images))
    how = {"num_chains": args.chains, "num_leapfrog": args.leapfrog, "seed": args.seed}
    figures: dict[str, Any] = {k: v for k, v in vars(args).items() if k != "work"} | {"bounds": []}
    figures["device"] = device_of(run.program).type

    gaps: list[torch.Tensor] = []

    def bound(distributions: int) -> None:
        """The bounds of the simulated images, and how much the gap grew over the bounds before."""
        with Timed() as timed:
            bounds = pv.bidirectional(run.program, args.gap_images, num_distributions=distributions, **how)
        found = {**bounds.summary(), "distributions": distributions, **timed.figures()}
        if gaps:
            growth = bounds.gap - gaps[-1]
            found |= {"growth": float(growth.mean()), "growth_se": float(growth.std()) / len(growth) ** 0.5}
        gaps.append(bounds.gap)
        figures["bounds"].append(found)
        report(figures)

    with Timed() as timed:
        weighted = pv.log_likelihood(run.program, x, num_samples=5000, seed=args.seed)
    figures["iw"] = weighted.summary() | timed.figures()
    bound(args.distributions)
    with Timed() as timed:
        annealed = pv.annealed_log_likelihood(run.program, x, num_distributions=args.distributions, **how)
    gradients = args.images * args.chains * args.distributions * args.leapfrog
    figures["ais"] = annealed.summary() | timed.figures() | {"gradients_per_cpu_second": gradients / timed.cpu_seconds}
    difference = pv.compare(annealed, weighted)
    figures["ais_minus_iw"], figures["ais_minus_iw_se"] = difference.mean, difference.mc_se
    report(figures)
    for distributions in args.longer:
        bound(distributions)


def report(figures: dict[str, Any]) -> None:
    """Write what there is so far, and print it."""
    f, iw, ais = figures, figures["iw"], figures.get("ais")
    lines = [
        f"{f['images']} MNIST test images, 20 latents, decoder 200-200, trained for {f['epochs']} epochs.",
        "",
        "| | NLL (nats) | Monte Carlo error | minutes | CPU minutes |",
        "|---|---|---|---|---|",
        f"| ELBO | {-iw['elbo']:.2f} | | | |",
        _row("importance weighting, K = 5,000", iw),
    ]
    if ais:
        lines += [
            _row(
                f"annealing, {f['chains']} chains, {f['distributions']:,} distributions, {f['leapfrog']} leapfrog steps",
                ais,
            ),
            "",
            f"Trajectories were accepted {ais['acceptance']:.0%} of the time; {ais['gradients_per_cpu_second']:,.0f} gradients "
            f"per CPU second. Annealing finds {f['ais_minus_iw']:.3f} +- {f['ais_minus_iw_se']:.3f} nats more than importance "
            "weighting (paired, bias-corrected).",
            *(f"warning: {w}" for w in ais["warnings"]),
        ]
    if f["bounds"]:
        lines += [
            "",
            f"Bounds of log p(x) of the same {f['gap_images']} simulated images:",
            "",
            "| distributions | lower | upper | gap (nats) | growth of the gap (paired) | accepted, forward and back | minutes "
            "| CPU minutes |",
            "|---|---|---|---|---|---|---|---|",
            *(
                f"| {b['distributions']:,} | {b['bdmc_lower']:.3f} | {b['bdmc_upper']:.3f} | {b['bdmc_gap']:.3f} +- "
                f"{b['bdmc_gap_se']:.3f} | {_growth(b)} | {b['bdmc_acceptance']:.2f}, {b['bdmc_reverse_acceptance']:.2f} | "
                f"{b['seconds'] / 60:.1f} | {b['cpu_seconds'] / 60:.1f} |"
                for b in f["bounds"]
            ),
        ]
    f["load_average"] = os.getloadavg()[2]
    lines += [
        "",
        f"{torch.cuda.get_device_name() if f['device'] == 'cuda' else 'No GPU'}; "
        f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} thread(s) used, load average "
        f"{f['load_average']:.1f} over the last 15 minutes (other work included), PyTorch {torch.__version__}, Python "
        f"{platform.python_version()}.",
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "ais.json").write_text(json.dumps(figures, indent=2) + "\n")
    (RESULTS / "ais.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


def _growth(found: dict[str, Any]) -> str:
    return f"{found['growth']:+.3f} +- {found['growth_se']:.3f}" if "growth" in found else ""


def _row(name: str, found: dict[str, Any]) -> str:
    return (
        f"| {name} | {found['nll']:.2f} | {found['nll_mc_se']:.3f} | {found['seconds'] / 60:.1f} | "
        f"{found['cpu_seconds'] / 60:.1f} |"
    )


if __name__ == "__main__":
    main()
