"""Priors against each other on MNIST, with guides of several families: a table of importance-weighted NLLs.

    python benchmarks/priors.py [--epochs 30] [--samples 500] [--images 1000] [--work runs/priors]

Networks 784-200-40-200-784, batches of 200. First every prior with every guide on the first 10,000 training images at one seed;
then the standard, flow and VampPrior with the diagonal guide on all training images at three seeds. Every model is judged on
the same random test images, so that differences are paired. A cell that is finished is not run again: start it anew and
it goes on. MNIST is looked for under PYRO_VAE_DATA. The tables go to benchmarks/results/priors.md, the figures to priors.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch

import pyro_vae as pv
from pyro_vae.data import Data
from pyro_vae.errors import UserError
from pyro_vae.evaluation.evaluate import chosen_rows
from pyro_vae.evaluation.result import UnreliableEstimateWarning

RESULTS = Path(__file__).parent / "results"
PRIORS = {
    "standard-normal": "standard-normal",
    "laplace": "laplace",
    "gaussian-mixture": "gaussian-mixture:components=100",
    "spline-flow": "spline-flow",
    "maf": "maf",
    "vamp": "vamp:components=500",
}
POSTERIORS = ["diagonal-normal", "low-rank-normal", "full-rank-normal", "autoregressive-flow"]
REFERENCE, SMALL = "standard-normal", 10_000
FULL = ["standard-normal", "spline-flow", "vamp"]
Cell = tuple[str, str, int, int]  # prior, posterior, training images, seed


def cells(data: Data, seeds: list[int]) -> list[Cell]:
    """What is to be run, the quick ones first."""
    small = [(p, q, SMALL, seeds[0]) for q in POSTERIORS for p in PRIORS]
    return small + [(p, POSTERIORS[0], len(data.train), s) for s in seeds for p in FULL]


def path_of(work: Path, cell: Cell) -> Path:
    """Where a cell's figures are kept."""
    prior, posterior, images, seed = cell
    return work / f"{prior}-{posterior}-{images}-seed{seed}.json"


def run(cell: Cell, data: Data, x: torch.Tensor, args: argparse.Namespace) -> dict:
    """Train and evaluate one cell; where the blocks do not fit each other, the reason."""
    prior, posterior, images, seed = cell
    data = replace(data, train=data.train[:images])
    named = {"prior": PRIORS[prior], "posterior": posterior, "latent_dim": 40}
    sizes = {"encoder": "mlp:hidden=[200]", "decoder": "mlp:hidden=[200]"}
    try:
        vae = pv.build("mlp", "diagonal", data, seed=seed, **named, **sizes)
    except UserError as error:
        return {"refused": str(error)}
    start = time.perf_counter()
    trained = pv.fit(
        vae, data, epochs=args.epochs, batch_size=200, lr=args.lr, seed=seed, device="cpu", compile=args.compile
    )
    seconds = time.perf_counter() - start
    result = pv.log_likelihood(vae, x, num_samples=args.samples, compile="off")
    return {
        "log_likelihood": [round(v, 4) for v in (result.log_likelihood - result.bias).tolist()],
        "nll": result.nll,
        "nll_mc_se": result.nll_mc_se,
        "nll_data_se": result.nll_data_se,
        "elbo": float(result.elbo.mean()),
        "kl": float(result.kl.mean()),
        "khat_bad_fraction": result.khat_bad_fraction,
        "epochs_seen": len(trained.metrics),
        "parameters": sum(p.numel() for p in vae.parameters()),
        "train_seconds": round(seconds, 1),
        "evaluate_seconds": round(time.perf_counter() - start - seconds, 1),
    }


def paired(a: dict, b: dict) -> tuple[float, float]:
    """Mean and standard error over images of log p_a - log p_b."""
    difference = torch.tensor(a["log_likelihood"], dtype=torch.float64) - torch.tensor(b["log_likelihood"]).double()
    return float(difference.mean()), float(difference.std()) / math.sqrt(len(difference))


def small_table(found: dict[Cell, dict], seed: int) -> list[str]:
    """NLL of every prior with every guide, and beside it what is gained over the standard normal."""
    lines = ["| prior | " + " | ".join(POSTERIORS) + " |", "|---" * (len(POSTERIORS) + 1) + "|"]
    reasons: list[str] = []
    for prior in PRIORS:
        row = [prior]
        for posterior in POSTERIORS:
            figures = found.get((prior, posterior, SMALL, seed))
            reference = found.get((REFERENCE, posterior, SMALL, seed))
            if figures is None:
                row.append("not run")
            elif "refused" in figures:
                reasons.append(figures["refused"])
                row.append(f"refused ({len(reasons)})")
            else:
                row.append(f"{figures['nll']:.2f}")
                if prior != REFERENCE and reference:
                    gain, se = paired(figures, reference)
                    row[-1] += f" ({gain:+.2f} +- {se:.2f})"
        lines.append("| " + " | ".join(row) + " |")
    return lines + [""] + [f"({i}) {reason}" for i, reason in enumerate(reasons, 1)]


def full_table(found: dict[Cell, dict], images: int, seeds: list[int]) -> list[str]:
    """NLL per seed, and the paired differences from the standard normal of the same seed."""
    lines = [
        "| prior | " + " | ".join(f"seed {s}" for s in seeds) + " | gain, mean over seeds | its spread over seeds |"
    ]
    lines.append("|---" * (len(seeds) + 3) + "|")
    for prior in FULL:
        row, gains = [prior], []
        for seed in seeds:
            figures = found.get((prior, POSTERIORS[0], images, seed))
            reference = found.get((REFERENCE, POSTERIORS[0], images, seed))
            row.append("not run" if figures is None else f"{figures['nll']:.2f}")
            if figures and reference and prior != REFERENCE:
                gain, se = paired(figures, reference)
                gains.append(gain)
                row[-1] += f" ({gain:+.2f} +- {se:.2f})"
        row.append(f"{statistics.mean(gains):+.2f}" if gains else "")
        row.append(f"{statistics.stdev(gains):.2f}" if len(gains) > 1 else "")
        lines.append("| " + " | ".join(row) + " |")
    return lines


def report(found: dict[Cell, dict], total: int, images: int, args: argparse.Namespace) -> str:
    """Both tables, with what they were measured on."""
    seconds = sum(f.get("train_seconds", 0) + f.get("evaluate_seconds", 0) for f in found.values())
    worst = max((f.get("nll_mc_se", 0.0) for f in found.values()), default=0.0)
    error = max((f.get("nll_data_se", 0.0) for f in found.values()), default=0.0)
    return "\n".join(
        [
            f"Test NLL of MNIST (dynamic binarization) in nats, K = {args.samples}, the same {args.images:,} random test images; "
            f"784-200-40 networks, {args.epochs} epochs, batch 200. In brackets: the paired gain in log p(x) over the standard "
            "normal prior with the same guide, and its standard error over images.",
            "",
            f"The first {SMALL:,} training images, seed {args.seeds[0]}:",
            "",
            *small_table(found, args.seeds[0]),
            "",
            f"All {images:,} training images, diagonal guide:",
            "",
            *full_table(found, images, args.seeds),
            "",
            f"{len(found)} of {total} cells; error of any NLL over images at most {error:.2f}, Monte Carlo error at most "
            f"{worst:.3f}. {seconds / 60:.0f} min on a core of {os.cpu_count()} ({platform.machine()}), "
            f"PyTorch {torch.__version__}, Python {platform.python_version()}.",
        ]
    )


def main() -> None:
    """Run what is missing, and write the tables after every cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--compile", default="off")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", default="runs/priors")
    args = parser.parse_args()
    warnings.simplefilter("ignore", UnreliableEstimateWarning)
    torch.set_num_threads(args.threads)
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(exist_ok=True)
    data = pv.load_data("mnist")
    x = data.observed("test", rows=chosen_rows(len(data.test), args.images))
    planned = cells(data, args.seeds)
    found = {c: json.loads(path_of(work, c).read_text()) for c in planned if path_of(work, c).is_file()}
    for cell in planned:
        if cell not in found:
            found[cell] = run(cell, data, x, args)
            path_of(work, cell).write_text(json.dumps(found[cell]) + "\n")
            told = found[cell].get("refused") or f"NLL {found[cell]['nll']:.2f}, {found[cell]['train_seconds']:.0f} s"
            print(*cell, told, flush=True)
        text = report(found, len(planned), len(data.train), args)
        plain = [{"cell": c, **{k: v for k, v in f.items() if k != "log_likelihood"}} for c, f in found.items()]
        (RESULTS / "priors.md").write_text(text + "\n")
        (RESULTS / "priors.json").write_text(json.dumps(plain, indent=2) + "\n")
    print(text)


if __name__ == "__main__":
    main()
