"""This state of the library against another checkout, in turns: a training step and importance weights of a bare tensor.

    git worktree add ../before 694f44e
    python benchmarks/checkouts.py ../before

Each is a process of its own on the same core, one turn after the other, which goes first changing from pair to pair. Printed is
the geometric mean of the ratios of a pair, this one to the other, with a 95 % interval by Student's t over pairs: below 1 is
faster here. For a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from pathlib import Path

from turns import Turn, Worker, cores, described, environment, machine, serve

ROWS, BATCH, EPOCHS_A_TURN, EVALUATED, DRAWS = 6400, 128, 2, 20, 1000
TASKS = {
    "training step, uncompiled": "off",
    "training step, compiled": "on",
    "importance weights, uncompiled": "weights",
    "importance weights of one row": "one",
}


def contestant(task: str) -> None:
    """Train, or evaluate, turn by turn."""
    import torch

    import pyro_vae as pv

    if not Path(pv.__file__).is_relative_to(os.environ["PYTHONPATH"].split(os.pathsep)[0]):
        raise SystemExit(f"{pv.__file__} is not of the checkout that was named")
    x = torch.bernoulli(torch.full((ROWS, 1, 28, 28), 0.3), generator=torch.Generator().manual_seed(0))
    sizes = {"encoder": "mlp:hidden=[200]", "decoder": "mlp:hidden=[200]"}
    program = pv.build("mlp", "diagonal", (1, 28, 28), latent_dim=40, **sizes)

    def train(turn: Turn) -> None:
        last = EPOCHS_A_TURN - 1
        pv.fit(
            program, x, epochs=1_000_000, batch_size=BATCH, compile=task, schedule="constant",
            callback=lambda m: turn(m["train_loss"]) if m["epoch"] % EPOCHS_A_TURN == last else False,
        )  # fmt: skip

    def evaluate(turn: Turn) -> None:
        rows, count = (x[:1], 20) if task == "one" else (x[:EVALUATED], 1)
        done = False
        while not done:
            for _ in range(count):
                pv.log_likelihood(program, rows, num_samples=DRAWS if task == "weights" else 100, compile="off")
            done = turn(None)

    import warnings

    warnings.simplefilter("ignore")
    serve(lambda: evaluate if task in ("weights", "one") else train)


def compared(task: str, other: Path, pairs: int) -> list[float]:
    """Logarithms of the ratio of each pair, by the clock of the processor."""
    here, folder = Path(__file__), Path(__file__).resolve().parents[1]
    places = (other.resolve(), folder)
    how = environment(1)
    path = os.environ.get("PYTHONPATH", "")
    both = [
        Worker(here, ["--serve", task], {**how, "PYTHONPATH": f"{place}{os.pathsep}{path}"}, cores(1))
        for place in places
    ]
    found = []
    for number in range(pairs):
        seconds = [0.0, 0.0]
        for i in (0, 1) if number % 2 else (1, 0):
            seconds[i] = both[i].turn()["cpu_seconds"]
        found.append(math.log(seconds[1] / seconds[0]))
    for worker in both:
        worker.stop()
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, nargs="?", help="the other checkout")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve is not None:
        contestant(given.serve)
        return
    if given.other is None or not (given.other / "pyro_vae").is_dir() or given.pairs < 3:
        parser.error("name the folder of another checkout, and 3 --pairs or more")
    from scipy import stats

    print("| what | this / other | 95 % interval | pairs |\n|---|---|---|---|")
    for name, task in TASKS.items():
        logs = compared(task, given.other, given.pairs)
        mean, error = statistics.mean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
        reach = float(stats.t.ppf(0.975, len(logs) - 1)) * error
        ends = f"{math.exp(mean - reach):.3f} to {math.exp(mean + reach):.3f}"
        print(f"| {name} | {math.exp(mean):.3f} | {ends} | {len(logs)} |", flush=True)
    print(f"\n{described(machine())}")


if __name__ == "__main__":
    main()
