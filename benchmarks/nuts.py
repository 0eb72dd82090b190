"""NUTS on the latents of MNIST images: does it converge, how long does it take, and how fast is it beside Pyro's own?

    python benchmarks/nuts.py [--run RUN] [--images 64] [--samples 1000] [--pyro-images 1] [--pyro-samples 50]

Without --run, a model with 20 latents is first trained on MNIST (looked for under PYRO_VAE_DATA) for --epochs epochs.
Every image has 4 chains, started twice as far from the guide's mean as its draws. Pyro's MCMC(NUTS) samples the same
posteriors with the same decoder, fewer images at once, one chain each after another, as it does; speeds are compared
per gradient of one chain and per effective sample. The table goes to benchmarks/results/nuts.md, the figures beside
it.
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

import numpy as np
import pyro
import torch
from arviz_stats.base import array_stats
from pyro.infer import MCMC
from pyro.infer import NUTS as PyroNUTS

import pyro_vae as pv
from pyro_vae.analysis.mcmc import sample_chains
from pyro_vae.programs.trace import evaluating, isolated
from pyro_vae.training.progress import Progress

RESULTS = Path(__file__).parent / "results"
LATENTS = 20


def trained(args: argparse.Namespace) -> str:
    """The run directory, made if need be."""
    if args.run is not None:
        return str(args.run)
    out = Path(args.work) / f"mnist-{LATENTS}-latents-{args.epochs}-seed0"
    if not (out / "weights.safetensors").is_file():
        options = ["--model", "mlp", "--set", f"latent_dim={LATENTS}", "--epochs", str(args.epochs), "--out", str(out)]
        subprocess.run([sys.executable, "-m", "pyro_vae.cli", "train", "mnist", *options, "--quiet"], check=True)
    return str(out)


def ours(program: Any, x: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Our NUTS: convergence and speed."""
    start = time.perf_counter()
    with Progress(len(x), visible=True, unit="image") as bar:
        chains = sample_chains(
            program, x, num_samples=args.samples, num_chains=args.chains, num_warmup=args.warmup, seed=args.seed,
            progress=lambda n: bar.advance(n, "NUTS"),
        )  # fmt: skip
    seconds = time.perf_counter() - start
    z = np.concatenate([v.reshape(*v.shape[:3], -1) for v in chains.latents.values()], -1)
    return {"seconds": seconds, "gradients": chains.num_gradients, **diagnosed(z), **means(chains.statistics)}


def means(statistics: dict[str, np.ndarray]) -> dict[str, float]:
    """Means over all draws that were kept."""
    chosen = {"acceptance": "acceptance_rate", "step_size": "step_size", "steps": "n_steps", "divergent": "diverging"}
    return {name: float(statistics[key].mean()) for name, key in chosen.items()}


def diagnosed(z: np.ndarray) -> dict[str, Any]:
    """R-hat (rank-normalised, folded) and bulk ESS over the coordinates of draws ``(chain, draw, image, D)``."""
    axes = {"chain_axis": 0, "draw_axis": 1}
    rhat, ess = array_stats.rhat(z, **axes), array_stats.ess(z, **axes)
    return {
        "coordinates": int(rhat.size),
        "rhat_below_1.01": float((rhat < 1.01).mean()),
        "rhat_largest": float(rhat.max()),
        "ess_median": float(np.median(ess)),
        "ess_smallest": float(ess.min()),
    }


def pyros(program: Any, x: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Pyro's NUTS on the same posteriors, one image and one chain at a time: all latents that it is given share a trajectory."""
    gradients, seconds, ess, warmup = 0, 0.0, [], args.pyro_samples
    for row in range(args.pyro_images):
        kept = []
        for chain in range(args.chains):
            with evaluating(program), torch.enable_grad(), isolated(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for parameter in program.parameters():
                    parameter.requires_grad_(False)
                pyro.set_rng_seed(args.seed + chain)
                kernel = PyroNUTS(program.model, jit_compile=False, max_tree_depth=8)
                counted = _count(kernel)
                mcmc = MCMC(kernel, num_samples=args.pyro_samples, warmup_steps=warmup, disable_progbar=True)
                start = time.perf_counter()
                mcmc.run(x[row : row + 1])
                seconds += time.perf_counter() - start
                gradients += counted[0]
            kept.append(mcmc.get_samples()["z"].reshape(args.pyro_samples, -1).numpy())
        ess.append(array_stats.ess(np.stack(kept), chain_axis=0, draw_axis=1))
    return {"seconds": seconds, "gradients": gradients, "ess_median": float(np.median(ess)), "images": args.pyro_images}


def _count(kernel: Any) -> list[int]:
    """Counts the gradients that a Pyro kernel takes: one for each evaluation of its potential."""
    counted = [0]
    setup = kernel.setup

    def counting_setup(*args: Any, **kwargs: Any) -> None:
        setup(*args, **kwargs)
        potential = kernel.potential_fn

        def count(z: Any) -> Any:
            counted[0] += 1
            return potential(z)

        kernel.potential_fn = count

    kernel.setup = counting_setup
    return counted


def table(args: argparse.Namespace, here: dict[str, Any], pyro_: dict[str, Any], images: int) -> str:
    """Both samplers as rows of Markdown."""
    rows = [("pyro_vae NUTS", here, images), ("Pyro MCMC(NUTS)", pyro_, pyro_["images"])]
    lines = [
        f"{images} MNIST test images, {here['coordinates'] // images} latents, {args.chains} chains, {args.samples:,} draws "
        f"after {args.warmup} of warm-up, chains started at twice the guide's scale:",
        "",
        f"R-hat (rank-normalised, folded) below 1.01 for **{here['rhat_below_1.01']:.1%}** of {here['coordinates']:,} "
        f"coordinates, largest {here['rhat_largest']:.3f}; bulk ESS median {here['ess_median']:.0f}, smallest "
        f"{here['ess_smallest']:.0f}; acceptance {here['acceptance']:.2f}; {here['steps']:.1f} steps per draw; "
        f"{here['divergent']:.2%} divergent; {here['seconds'] / 60:.1f} minutes.",
        "",
        "| sampler | images | seconds | gradients of one chain | per second | effective samples per latent and second |",
        "|---|---|---|---|---|---|",
    ]
    for name, r, n in rows:
        lines.append(
            f"| {name} | {n} | {r['seconds']:.1f} | {r['gradients']:,} | {r['gradients'] / r['seconds']:,.0f} | "
            f"{n * r['ess_median'] / r['seconds']:,.1f} |"
        )
    ratio = here["gradients"] / here["seconds"] / (pyro_["gradients"] / pyro_["seconds"])
    lines += [
        "",
        f"Per gradient {ratio:,.0f} times as fast. Pyro: {args.pyro_samples} draws after as many of warm-up. "
        f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads, "
        f"PyTorch {torch.__version__}, Pyro {pyro.__version__}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Sample with both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default=None)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--warmup", type=int, default=400)
    parser.add_argument("--pyro-images", type=int, default=1)
    parser.add_argument("--pyro-samples", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", default="runs/benchmark")
    args = parser.parse_args()
    run = pv.load(trained(args))
    rows = torch.arange(args.images)
    x = run.load_data().observed("test", rows=rows)
    here, pyro_ = ours(run.program, x, args), pyros(run.program, x, args)
    text = table(args, here, pyro_, len(x))
    RESULTS.mkdir(exist_ok=True)
    figures = {"pyro_vae": here, "pyro": pyro_, "arguments": vars(args)}
    (RESULTS / "nuts.json").write_text(json.dumps(figures, indent=2) + "\n")
    (RESULTS / "nuts.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
