"""Training on a file that is not read into memory: does anonymous memory stay flat, and is it as fast as from memory?

    python benchmarks/memmap.py [--rows 5000000] [--work runs/memmap] [--rounds 7] [--compile on]

Makes .npy files of 28x28 bytes in ``--work`` (random images, repeated in blocks: 3.9 GB at 5 million rows, kept for the next
time). *Memory*: in a process of its own for each file, ``load_data`` and ``fit`` with the usual split of 80/10/10 and dynamic
binarization, validation at the end included; the peak of RssAnon, sampled every 10 ms, above what was held before the file was
opened (Linux only). The pages of the file itself belong to the system, which takes them back when it needs them.
*Speed*: two processes take turns (turns.py), one on minibatches from anywhere in the large file, other rows in every
turn, one on 60,000 rows in memory; the ratio is the median of the ratios within rounds. The file is read once beforehand, so
that it lies in the page cache as far as it fits. The table goes to benchmarks/results/memmap.md, the figures to memmap.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from turns import Turn, Worker, cores, described, environment, machine, memory, num_cores, serve

RESULTS = Path(__file__).parent / "results"
BLOCK, SMALL, VALIDATION, HIDDEN, LATENTS = 50_000, 60_000, 1000, [400], 50


def make_file(folder: Path, rows: int) -> Path:
    """Bytes ``(rows, 28, 28)``: a tenth of the pixels is bright, the rest is 0; written once."""
    path = folder / f"images-{rows}.npy"
    if not path.is_file():
        rng = np.random.default_rng(0)
        bright = rng.random((min(BLOCK, rows), 28, 28)) < 0.1
        block = np.where(bright, rng.integers(0, 256, bright.shape), 0).astype(np.uint8)
        made = path.with_suffix(".part")
        array = np.lib.format.open_memmap(made, mode="w+", dtype=np.uint8, shape=(rows, 28, 28))
        for first in range(0, rows, BLOCK):
            array[first : first + BLOCK] = block[: rows - first]
        array.flush()
        del array
        made.rename(path)
    return path


def program() -> Any:
    """784-400-50-400-784, tanh."""
    import pyro_vae as pv

    nets = {"name": "mlp", "hidden": HIDDEN, "activation": "tanh"}
    return pv.build("mlp", "diagonal", (1, 28, 28), latent_dim=LATENTS, encoder=nets, decoder=nets)


def growth(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Load and train in this process: how far anonymous memory rose, in MB."""
    import torch

    import pyro_vae as pv

    torch.set_num_threads(args.threads)
    warm = torch.zeros(1000, 1, 28, 28)
    pv.fit(program(), warm, steps=20, batch_size=args.batch, compile="off", device="cpu")
    vae, peak, stop = program(), [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            peak[0] = max(peak[0], memory()["anonymous_mb"])

    before = memory()["anonymous_mb"]
    watcher = threading.Thread(target=watch)
    watcher.start()
    data = pv.load_data(path, binarization="dynamic")
    loaded = memory()["anonymous_mb"]
    run = pv.fit(vae, data, steps=args.steps, batch_size=args.batch, compile=args.compile, device="cpu")
    stop.set()
    watcher.join()
    return {
        "rows": len(data.train) + len(data.validation) + len(data.test),
        "file_mb": path.stat().st_size / 2**20,
        "mapped": not isinstance(data.train, torch.Tensor),
        "loaded_mb": loaded - before,
        "peak_mb": peak[0] - before,
        "validation_loss": run.metrics[-1]["validation_loss"],
    }


def contestant(path: Path, args: argparse.Namespace) -> Callable[[Turn], Any]:
    """``pv.fit``, an epoch of which is a turn of ``--steps`` minibatches."""
    import torch

    import pyro_vae as pv

    torch.set_num_threads(args.threads)
    data = pv.load_data(path, binarization="dynamic", validation=VALIDATION)
    count, rng = args.steps * args.batch, np.random.default_rng(1)
    if isinstance(data.train, torch.Tensor):
        train: Any = data.train[:count]
    else:
        whole = data.train
        for first in range(0, len(whole), BLOCK):
            whole[first : first + BLOCK]  # once, into the page cache
        train = whole.select(torch.from_numpy(rng.integers(0, len(whole), count)))

    def train_in_turns(turn: Turn) -> None:
        def between(metrics: dict[str, Any]) -> bool:
            stop = turn(metrics["train_loss"])
            if not isinstance(train, torch.Tensor):  # rows that this process has not touched of late
                train.indices[:] = whole.select(torch.from_numpy(rng.integers(0, len(whole), count))).indices
            return stop

        chosen = replace(data, train=train)
        pv.fit(
            program(),
            chosen,
            epochs=1_000_000,
            batch_size=args.batch,
            compile=args.compile,
            device="cpu",
            callback=between,
        )

    return train_in_turns


def report(f: dict[str, Any]) -> str:
    """Both tables as Markdown."""
    mapped, small = (statistics.median(r[k]["seconds"] for r in f["rounds"]) for k in ("mapped", "memory"))
    images = f["steps"] * f["batch"]
    lines = [
        "| rows | file (MB) | memory-mapped | anonymous memory after loading (MB) | peak while training (MB) |",
        "|---|---|---|---|---|",
        *(
            f"| {m['rows']:,} | {m['file_mb']:,.0f} | {'yes' if m['mapped'] else 'no'} | {m['loaded_mb']:,.0f} | "
            f"{m['peak_mb']:,.0f} |"
            for m in f["memory"]
        ),
        "",
        f"Anonymous memory is what this process alone holds, above what it held before the file was opened; batch {f['batch']}, "
        f"{f['steps']} steps and one pass of validation over a tenth of the rows. Where a file is mapped, it grows by the row "
        "numbers of the split and of the shuffle alone.",
        "",
        "| training rows | images per second |",
        "|---|---|",
        f"| from anywhere in {f['memory'][-1]['rows']:,} on disk | {images / mapped:,.0f} |",
        f"| {SMALL:,} in memory | {images / small:,.0f} |",
        "",
        f"From the file, training is {f['ratio'][0]:.3f} times as fast by the clock and {f['ratio'][1]:.3f} by CPU time: medians "
        f"of {len(f['rounds'])} paired rounds of {f['steps']} steps, dynamic binarization, compile {f['compile']}, "
        f"{f['threads']} thread(s). Load average {f['load_average'][0]:.1f} before and {f['load_average'][1]:.1f} after.",
        "",
        f"{described(f['machine'])}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Make the files, measure memory, then speed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--work", default="runs/memmap")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--compile", default="off", choices=("on", "off"))
    parser.add_argument("--role", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        role, path = args.role[0], Path(args.role[1])
        if role == "growth":
            print(json.dumps(growth(path, args)))
        else:
            serve(lambda: contestant(path, args))
        return
    if args.steps * args.batch > int(0.9 * SMALL) - VALIDATION:
        parser.error(
            f"--steps times --batch must be at most {int(0.9 * SMALL) - VALIDATION:,}, what the small file has to train on"
        )
    folder = Path(args.work)
    folder.mkdir(parents=True, exist_ok=True)
    large, small = make_file(folder, args.rows), make_file(folder, SMALL)
    options = [f"--{k}={getattr(args, k)}" for k in ("steps", "batch", "threads", "compile")]
    figures: dict[str, Any] = {k: getattr(args, k) for k in ("steps", "batch", "threads", "compile")}
    settings, load_before = environment(args.threads), os.getloadavg()[0]
    figures["memory"] = []
    for path in (small, make_file(folder, max(args.rows // 10, SMALL)), large):
        command = [sys.executable, __file__, "--role", "growth", str(path), *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **settings})
        figures["memory"].append(json.loads(done.stdout.splitlines()[-1]))
        print(figures["memory"][-1], flush=True)
    script, affinity = Path(__file__), cores(args.threads)
    workers = {
        name: Worker(script, ["--role", "speed", str(path), *options], settings, affinity)
        for name, path in (("mapped", large), ("memory", small))
    }
    try:
        failed = [w.left_out for w in workers.values() if w.left_out]
        if failed:
            raise SystemExit(failed[0])
        rounds = [{name: worker.turn() for name, worker in workers.items()} for _ in range(args.rounds)]
    finally:
        for worker in workers.values():
            worker.stop()
    ratio = [statistics.median(r["memory"][k] / r["mapped"][k] for r in rounds) for k in ("seconds", "cpu_seconds")]
    figures |= {
        "rounds": rounds,
        "ratio": ratio,
        "load_average": [load_before, os.getloadavg()[0]],
        "machine": machine(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memmap.json").write_text(json.dumps(figures, indent=2) + "\n")
    (RESULTS / "memmap.md").write_text(report(figures) + "\n")
    print(report(figures))


if __name__ == "__main__":
    main()
