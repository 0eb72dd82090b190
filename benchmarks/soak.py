"""A long run of a small model: is memory flat, and does it stay as fast?

    python benchmarks/soak.py --steps 200000 [--compile on]

Prints a line of Markdown per tenth of the run: steps, steps per second and resident memory, and at the end how the
last tenth compares with the second (the first one warms up).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

import pyro_vae as pv


def resident() -> float:
    """Resident memory of this process in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1000
    return float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--compile", default="off", choices=("on", "off"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = pv.load_data("digits")
    vae = pv.build("mlp", "diagonal", data, latent_dim=4, encoder="mlp:hidden=[16]", decoder="mlp:hidden=[16]")
    print(
        f"torch {torch.__version__}, {arguments.steps:,} steps, compile {arguments.compile}, digits, seed {arguments.seed}\n"
    )
    print("| steps | steps/s | processor s per 1000 steps | resident MB |\n|---|---|---|---|")
    last = [0, time.perf_counter(), time.process_time()]
    rows: list[tuple[float, float]] = []

    def report(metrics: dict[str, float]) -> None:
        if metrics["step"] < (len(rows) + 1) * arguments.steps / 10:
            return
        step, now, cpu = int(metrics["step"]), time.perf_counter(), time.process_time()
        rows.append(((cpu - last[2]) / (step - last[0]) * 1000, resident()))
        speed = (step - last[0]) / (now - last[1])
        print(f"| {step:,} | {speed:.0f} | {rows[-1][0]:.3f} | {rows[-1][1]:.1f} |", flush=True)
        last[:] = [step, now, cpu]

    with tempfile.TemporaryDirectory() as folder:
        pv.fit(
            vae, data, steps=arguments.steps, batch_size=16, seed=arguments.seed, compile=arguments.compile,
            out=Path(folder) / "run", callback=report,
        )  # fmt: skip
    (slow, much), (slow_end, much_end) = rows[1], rows[-1]
    print(f"\nprocessor time per step: {slow_end / slow - 1:+.1%}; resident memory: {much_end - much:+.1f} MB")


if __name__ == "__main__":
    main()
