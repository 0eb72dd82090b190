"""Figures 2 and 3 of Kingma & Welling 2014 (https://arxiv.org/abs/1312.6114), against training samples seen.

    python benchmarks/kingma_welling.py [--samples 1e7] [--curves TEXT] [--draw]

Figure 2: the ELBO of training and test images by AEVB (objective elbo) and by wake-sleep (one particle, sleep phase), with 3, 5,
10, 20 and 200 latents on MNIST (500 hidden units) and 2, 5, 10, 20 on Frey Face (200). Figure 3: log p(x) of 50 training and 50
test images by annealing from the prior, with 3 latents and 100 hidden units, for 1,000 and for 50,000 training images of MNIST,
by AEVB, wake-sleep and Monte Carlo EM (10 leapfrog steps, 5 updates; of 1,000 images alone, as it keeps a chain of each).

As printed: one hidden layer of tanh units either side, minibatches of 100, one draw. Not as printed: Adam at a constant 0.001 for
Adagrad at a rate chosen by hand (Monte Carlo EM: Adagrad at 0.005); MNIST binarized anew for every minibatch in figure 2,
and once in figure 3; annealing for the
paper's estimator. A curve that is finished is not run again. Data sets are looked for under PYRO_VAE_DATA; ``--draw`` only draws
what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

import pyro_vae as pv
from pyro_vae.evaluation.result import UnreliableEstimateWarning

FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "kingma-welling.png"
RESULTS = Path(__file__).parent / "results" / "kingma_welling.json"
OBJECTIVES = {"AEVB": "elbo", "wake-sleep": "wake-sleep:num_particles=1,phase=sleep"}
LATENTS = {"frey-face": (2, 5, 10, 20), "mnist": (3, 5, 10, 20, 200)}
HIDDEN = {"frey-face": 200, "mnist": 500}
MODELS = {"frey-face": "frey", "mnist": "kingma-welling"}
FEW, ROWS, POINTS = 1_000, 50, 9  # rows that few means; rows and points at which log p(x) is estimated
SETTINGS: dict[str, Any] = {
    "batch_size": 100, "lr": 1e-3, "schedule": "constant", "average": None, "keep": "last", "clip_norm": None,
}  # fmt: skip


def built(name: str, data: Any, latent_dim: int, hidden: int) -> Any:
    """The paper's networks."""
    network = f"mlp:hidden=[{hidden}],activation=tanh"
    return pv.build(MODELS[name], "diagonal", data, latent_dim=latent_dim, encoder=network, decoder=network, seed=0)


def points(samples: float) -> list[float]:
    """Where on the axis of samples seen something is measured: as far from each other in their logarithm."""
    ends = 4, math.log10(samples)
    return [10 ** (ends[0] + (ends[1] - ends[0]) * i / (POINTS - 1)) * (1 - 1e-9) for i in range(POINTS)]


def elbo_curve(name: str, latent_dim: int, method: str, samples: float) -> dict[str, list[float]]:
    """Figure 2: samples seen, the ELBO of training images by the draws of training, and of the test images."""
    data = pv.load_data(name)
    test, rows = data.observed("test", seed=0), len(data.train)
    program, found, left = (
        built(name, data, latent_dim, HIDDEN[name]),
        {"samples": [], "train": [], "test": []},
        points(samples),
    )

    def measure(metrics: dict[str, Any]) -> None:
        if left and metrics["epoch"] * rows >= left[0]:
            while left and metrics["epoch"] * rows >= left[0]:
                left.pop(0)
            estimate = pv.log_likelihood(program, test, num_samples=10, seed=0)
            measured = metrics["epoch"] * rows, -metrics["train_loss"], float(estimate.elbo.mean())
            for key, value in zip(found, measured, strict=True):
                found[key].append(float(value))

    pv.fit(program, data, epochs=round(samples / rows), objective=OBJECTIVES[method], callback=measure, **SETTINGS)
    return found


def marginal_curve(rows: int, method: str, samples: float) -> dict[str, list[float]]:
    """Figure 3: samples seen, and log p(x) of training and test images."""
    data = pv.load_data("mnist")
    x, test = data.observed("train", seed=0)[:rows], data.observed("test", seed=0)[:ROWS]
    program, found, left = (
        built("mnist", data, 3, 100),
        {"samples": [], "train": [], "test": [], "error": []},
        points(samples),
    )

    def measure(metrics: dict[str, Any]) -> None:
        seen = metrics["epoch"] * len(x)
        if not left or seen < left[0]:
            return
        while left and seen >= left[0]:
            left.pop(0)
        results = [annealed(program, one) for one in (x[:ROWS], test)]
        for key, value in zip(found, (seen, -results[0].nll, -results[1].nll, results[1].nll_mc_se), strict=True):
            found[key].append(float(value))

    epochs = round(samples / len(x))
    if method == "Monte Carlo EM":
        trainer = pv.MonteCarloEM(program, x, batch_size=100, lr=0.005)
        for _ in range(epochs):
            measure(trainer.run()[0])
    else:
        pv.fit(program, x, epochs=epochs, objective=OBJECTIVES[method], callback=measure, **SETTINGS)
    return found


def annealed(program: Any, x: Tensor) -> Any:
    """log p(x) by chains from the prior, which need no guide."""
    return pv.annealed_log_likelihood(program, x, start="prior", num_chains=4, num_distributions=100, num_leapfrog=5)


def curves() -> dict[str, Any]:
    """Every curve by name, as a function of the samples to be seen."""
    found: dict[str, Any] = {}
    for name, sizes in LATENTS.items():
        for size in sizes:
            for method in OBJECTIVES:
                found[f"figure 2, {name}, {size} latents, {method}"] = lambda s, a=(name, size, method): elbo_curve(
                    *a, s
                )
    for rows in (FEW, 50_000):
        for method in (*OBJECTIVES, *(["Monte Carlo EM"] if rows == FEW else [])):
            found[f"figure 3, {rows:,} images, {method}"] = lambda s, a=(rows, method): marginal_curve(*a, s)
    return found


def draw(results: dict[str, Any]) -> None:
    """Both figures: a panel for each size of latents, and for each number of training images."""
    from matplotlib.figure import Figure

    panels: dict[str, dict[str, Any]] = {}
    for name, curve in results.items():
        *where, method = name.split(", ")
        panels.setdefault(", ".join(where), {})[method] = curve
    columns = 5
    figure = Figure(figsize=(3 * columns, 2.6 * -(-len(panels) // columns)), layout="constrained")
    colours = {"AEVB": "tab:red", "wake-sleep": "tab:green", "Monte Carlo EM": "tab:blue"}
    for index, (title, methods) in enumerate(panels.items()):
        axes = figure.add_subplot(-(-len(panels) // columns), columns, index + 1)
        for method, curve in methods.items():
            for part, style in (("train", "--"), ("test", "-")):
                axes.semilogx(curve["samples"], curve[part], style, color=colours[method], label=f"{method}, {part}")
        values = sorted(v for curve in methods.values() for part in ("train", "test") for v in curve[part])
        axes.set_ylim(values[len(values) // 8], values[-1] + 0.05 * abs(values[-1] - values[len(values) // 8]))
        axes.set_title(title, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_ylabel("ELBO, nats" if "figure 2" in title else "log p(x), nats", fontsize=7)
        if index == 0 or "figure 3" in title:
            axes.legend(fontsize=6)
    figure.supxlabel("training samples seen", fontsize=8)
    figure.savefig(FIGURE, dpi=110)


def main() -> None:
    """Run the curves that are not there yet, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=float, default=1e7)
    parser.add_argument("--curves", default="", help="only those whose name has this text")
    parser.add_argument("--draw", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore", UnreliableEstimateWarning)
    for name, curve in curves().items():
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        if given.draw or name in results or given.curves not in name:
            continue
        began = time.perf_counter()
        found = curve(given.samples)
        found["minutes"] = (time.perf_counter() - began) / 60
        # others may have been finished meanwhile
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({**results, name: found}, indent=1) + "\n")
        print(
            f"{name}: {found['train'][-1]:.2f} train, {found['test'][-1]:.2f} test, {found['minutes']:.1f} minutes",
            flush=True,
        )
    results = json.loads(RESULTS.read_text())
    draw({name: results[name] for name in curves() if name in results})


if __name__ == "__main__":
    main()
