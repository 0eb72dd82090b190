"""What a call costs whoever calls it a thousand times: the second call on, beside the bare modules and another checkout.

    python benchmarks/calls.py                         # this checkout: 1, 20 and 1,000 rows, 1, 2 and 4 threads
    python benchmarks/calls.py --against ../old        # and the calls of the table in turns with those of another checkout

Model ``mlp`` and guide ``diagonal`` on the embedded digits, one thread of torch. Medians in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

ROUNDS, CALLS, TURNS = 7, 30, 5
NAMES = ("encode 20", "sample 16", "reconstruct 20", "log_likelihood 1")


def median(call: Callable[[], object], calls: int = CALLS) -> float:
    """Milliseconds of a call, the median over some, the first of which is not counted."""
    call()
    taken = []
    for _ in range(calls):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return 1e3 * statistics.median(taken)


def calls() -> dict[str, float]:
    """The calls of the issue, with the library that is on the path."""
    import torch

    import pyro_vae as pv

    torch.set_num_threads(1)
    data = pv.load_data("digits")
    vae = pv.build("mlp", "diagonal", data)
    x = data.observed("test")
    found: dict[str, Callable[[], object]] = {
        "encode 20": lambda: pv.encode(vae, x[:20]),
        "sample 16": lambda: pv.sample(vae, 16),
        "reconstruct 20": lambda: pv.reconstruct(vae, x[:20]),
        "log_likelihood 1": lambda: pv.log_likelihood(vae, x[:1], num_samples=100),
    }
    return {name: min(median(found[name]) for _ in range(ROUNDS)) for name in NAMES}


def beside_modules() -> None:
    """Rows by number and threads, beside the bare encoder and its decoder."""
    import torch

    import pyro_vae as pv

    torch.set_num_threads(1)
    data = pv.load_data("digits")
    vae = pv.build("mlp", "diagonal", data)
    whole = data.observed("train")
    print("| rows | encode | bare encoder | reconstruct | bare encoder and decoder |\n|---|---|---|---|---|")
    for rows in (1, 20, 1000):
        x = whole[:rows]

        def bare(x: torch.Tensor = x) -> torch.Tensor:
            with torch.no_grad():
                return vae.posterior(vae.encoder(x)).mean

        def both(x: torch.Tensor = x) -> torch.Tensor:
            with torch.no_grad():
                return vae.likelihood(vae.decoder(bare(x))).mean

        row = [median(f) for f in (lambda x=x: pv.encode(vae, x), bare, lambda x=x: pv.reconstruct(vae, x), both)]
        print(f"| {rows} | " + " | ".join(f"{value:.2f}" for value in row) + " |")
    print("\n| threads | encode of 20 rows, calls per second in all |\n|---|---|")
    for number in (1, 2, 4):
        threads = [
            threading.Thread(target=lambda: [pv.encode(vae, whole[:20]) for _ in range(200)]) for _ in range(number)
        ]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(f"| {number} | {200 * number / (time.perf_counter() - began):,.0f} |")


def other(root: Path) -> dict[str, float]:
    """The same calls in a process of their own, with another checkout."""
    code = f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r}); import calls; print(json.dumps(calls.calls()))"
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, cwd=root
    )
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout, whose calls are timed in turns with this one's")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    here = Path(__file__).resolve().parent.parent
    roots = [here] if options.against is None else [here, options.against.resolve()]
    turns = [[other(root) for root in roots] for _ in range(TURNS)]
    print(
        "| call, ms | "
        + " | ".join(root.name for root in roots)
        + " | ratio, paired |\n|---|"
        + "---|" * (len(roots) + 1)
    )
    for name in NAMES:
        by_root = [statistics.median(turn[i][name] for turn in turns) for i in range(len(roots))]
        ratio = statistics.median(turn[0][name] / turn[-1][name] for turn in turns)
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in by_root) + f" | {ratio:.2f} |")
    print()
    beside_modules()


if __name__ == "__main__":
    main()
