"""What it costs to fold samples into rows, beside an axis of samples: the same program on either road, in turns.

    python benchmarks/folding.py

K = 100 draws of 20 rows, evaluated, and a training step of IWAE with them. Medians of paired ratios over rounds; one thread of
torch.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

DRAWS, ROWS, ROUNDS = 100, 20, 15
LARGE, SMALL = ({"encoder": f"mlp:hidden=[{n}]", "decoder": f"mlp:hidden=[{n}]"} for n in (200, 16))
BUILT: dict[str, tuple[str, str, tuple[int, ...], dict[str, Any]]] = {
    "MLP 784-200-40": ("mlp", "diagonal", (1, 28, 28), {"latent_dim": 40, **LARGE}),
    "MLP 64-16-3": ("mlp", "diagonal", (1, 8, 8), {"latent_dim": 3, **SMALL}),
    "gated MLP, mixture prior": ("mixture", "diagonal", (1, 28, 28), {}),
    "convolutional": ("conv-2d", "conv", (1, 28, 28), {}),
    "MLP, full-rank guide": ("mlp", "full-rank", (1, 28, 28), {}),
    "MLP, spline flow guide": ("mlp", "spline", (1, 8, 8), {"latent_dim": 8}),
}  # fmt: skip


def paired(calls: list[Callable[[], object]], rounds: int) -> tuple[list[float], float]:
    """Milliseconds of each call, and how much longer the second takes: the median of ratios within a round."""
    for call in calls:
        call()
    taken: list[list[float]] = []
    for turn in range(rounds):
        row = [0.0] * len(calls)
        for i in range(len(calls)) if turn % 2 else reversed(range(len(calls))):
            began = time.perf_counter()
            calls[i]()
            row[i] = 1e3 * (time.perf_counter() - began)
        taken.append(row)
    return [statistics.median(column) for column in zip(*taken, strict=True)], statistics.median(
        b / a for a, b in taken
    )


def on_road(program: Any, folds: bool, axes: int, call: Callable[[], object]) -> Callable[[], object]:
    """The call, on one of the two roads."""
    from pyro_vae.programs.folding import FOLDS, ONCE

    def run() -> object:
        vars(program)[FOLDS] = {(ONCE, axes): True} if folds else False
        return call()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore")
    import torch

    import pyro_vae as pv
    from pyro_vae.objectives.importance_weighted import IWAE

    torch.set_num_threads(1)
    print(
        f"| network, K = {DRAWS}, {ROWS} rows | weights, ms | folded, ms | ratio | step, ms | folded, ms | ratio |\n|"
        + "---|" * 7
    )
    for name, (model, guide, event, sizes) in BUILT.items():
        program: Any = pv.build(model, guide, event, seed=0, **sizes)
        x = (torch.rand(ROWS, *event, generator=torch.Generator().manual_seed(0)) > 0.5).float()
        pv.encode(program, x)
        objective = IWAE(num_particles=DRAWS)

        def step(program: Any = program, x: Any = x, objective: Any = objective) -> object:
            _, surrogate = objective(program, x)
            return torch.autograd.grad(
                surrogate, [p for p in program.parameters() if p.requires_grad], allow_unused=True
            )

        def weights(program: Any = program, x: Any = x) -> object:
            return pv.log_likelihood(program, x, num_samples=DRAWS, compile="off")

        cells = []
        for call in (weights, step):
            (plain, folded), ratio = paired([on_road(program, folds, x.dim(), call) for folds in (False, True)], rounds)
            cells += [f"{plain:.2f}", f"{folded:.2f}", f"{ratio:.2f}"]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print(f"\n{platform.processor() or platform.machine()}, torch {torch.__version__}, medians of {rounds} rounds.")


if __name__ == "__main__":
    main()
