"""Training steps against the floor: ours, Pyro's, PyTorch's by hand and compiled, NumPyro's, pythae's, and the products alone.

    pip install ".[bench]"
    python benchmarks/training.py [--device cpu cuda] [--threads 2] [--rounds 5] [--sizes 20 two-layer ...] [--rows 60000]

One turn is one epoch of 60,000 binary images in memory: a new order, every minibatch gathered, Adam at 1e-3, float32. Every
contestant is a process of its own that waits on a pipe while another takes its turn (turns.py); a round is one turn of each in
order, so that a busy machine slows all of them. Times are medians of rounds, ratios are medians of the ratios within rounds. The
first turn, which compiles, is told apart: what it took above a later one is the time before full speed, with empty caches.

All hold to ``--threads`` threads and as many cores; idle threads sleep (OMP_WAIT_POLICY=passive; ``--spin`` leaves that to the
libraries). The loss shows that they do the same work: it is that of the last epoch, after as many for all, under the same
initialization but for chance. Validation is off in Pyro and NumPyro. pythae's KL is the closed form, its scales are exponentials.
The floor is the faster of PyTorch's and XLA's matrix products alone, forward and backward, which no training step can do without.

What is not installed, or cannot do a size, is left out with the reason. pythae 0.1.2 asks for the ``dataclasses`` of Python 3.6,
which newer Pythons never look at; to do without: ``pip install --no-deps pythae`` and ``pip install cloudpickle tqdm``, which
are all that it imports here besides torch, scipy and pydantic.
Writes benchmarks/results/training.json, training.md and docs/figures/training.png; a device or size that is not measured
keeps its figures of before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from contestants import COMPILED, CONTESTANTS, FLOORS, NUMPYRO, PLAIN
from contestants import SIZES as FLAT
from contestants_deep import DEEP
from matplotlib.figure import Figure
from mnist import into_readme
from turns import Worker, cores, described, environment, machine, num_cores

RESULTS = Path(__file__).parent / "results"
FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "training.png"
NAMES = [*CONTESTANTS, NUMPYRO, FLOORS[1]]
SCHEDULE_EPOCHS, SCHEDULE_ROWS = 3280, 60_000  # of Burda, Grosse & Salakhutdinov 2016
SIZES: dict[str, Any] = {**FLAT, **DEEP}
Figures = dict[str, Any]


def measure(key: str, device: str, names: list[str], args: argparse.Namespace) -> Figures:
    """All rounds of one size: per contestant the seconds of every turn, and what its first told."""
    size = SIZES[key]
    rows = args.rows // size.batch * size.batch
    settings = environment(args.threads) | {"JAX_PLATFORMS": device}
    if device == "cpu":
        settings["CUDA_VISIBLE_DEVICES"] = ""
    if args.spin:
        settings = {k: v for k, v in settings.items() if k not in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME")}
    workers: dict[str, Worker] = {}
    left_out: dict[str, str] = {}
    script, affinity = Path(__file__).parent / "contestants.py", cores(args.threads)
    try:
        for name in names:
            began = time.perf_counter()
            arguments = [name, key, device, str(rows), str(args.threads)]
            worker = Worker(script, arguments, settings, affinity)
            if worker.left_out is not None:
                left_out[name] = worker.left_out
                worker.stop()
            else:
                workers[name] = worker
            print(f"  {name}: {worker.left_out or f'ready after {time.perf_counter() - began:.1f} s'}", flush=True)
        load_before = os.getloadavg()[0]
        rounds = []
        for number in range(args.rounds):
            rounds.append({name: worker.turn() for name, worker in workers.items()})
            print(f"  round {number + 1} of {args.rounds}", flush=True)
    finally:
        for worker in workers.values():
            worker.stop()
    return {
        "label": size.label,
        "batch": size.batch,
        "rows": rows,
        "steps": rows // size.batch,
        "load_average": [load_before, os.getloadavg()[0]],
        "first": {name: worker.first for name, worker in workers.items()},
        "rounds": rounds,
        "left_out": left_out,
    }


def summarize(found: Figures) -> Figures:
    """Medians, and ratios paired within rounds, by the clock and by CPU time."""
    rounds, steps = found["rounds"], found["steps"]
    epoch = {n: statistics.median(r[n]["seconds"] for r in rounds) for n in rounds[0]}
    floors = [n for n in FLOORS if n in epoch]
    floor = min(floors, key=lambda n: epoch[n]) if floors else None

    def ratio(above: str, below: str | None) -> list[float] | None:
        if above not in epoch or below not in epoch:
            return None
        kinds = ("seconds", "cpu_seconds")
        return [statistics.median(r[above][k] / max(r[below][k], 1e-9) for r in rounds) for k in kinds]

    return {
        "floor": floor,
        "contestants": {
            name: {
                "ms_per_step": 1e3 * epoch[name] / steps,
                "cpu_ms_per_step": 1e3 * statistics.median(r[name]["cpu_seconds"] for r in rounds) / steps,
                "epoch_seconds": epoch[name],
                "steps_per_second": steps / epoch[name],
                "times_floor": ratio(name, floor),
                "compiled_is_faster": ratio(name, COMPILED),
                "plain_is_faster": ratio(name, PLAIN),
                "first_seconds": max(0.0, found["first"][name]["seconds"] - epoch[name]),
                "peak_mb": rounds[-1][name]["peak_mb"],
                "loss": rounds[-1][name]["loss"],
                "schedule_hours": epoch[name] * SCHEDULE_ROWS / found["rows"] * SCHEDULE_EPOCHS / 3600,
            }
            for name in epoch
        },
    }


def figure_of(value: float) -> str:
    """Three figures, or all before the point."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def table(found: Figures) -> list[str]:
    """One size as Markdown, the fastest first."""
    told = summarize(found)

    def pair(of: list[float] | None) -> str:
        return "" if of is None else f"{of[0]:.2f} ({of[1]:.2f})"

    lines = [
        f"### {found['label'][0].upper()}{found['label'][1:]}",
        "",
        "| | ms per step | CPU ms | times the floor | our compiled step is so many times as fast | our plain one | epoch (s) | "
        "steps/s | before full speed (s) | peak memory (MB) | loss (nats) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    by_speed = sorted(told["contestants"].items(), key=lambda item: float(item[1]["ms_per_step"]))
    for name, c in by_speed:
        loss = "" if c["loss"] is None else f"{c['loss']:.1f}"
        shown = f"**{name}**" if name in (COMPILED, PLAIN) else f"{name} (floor)" if name == told["floor"] else name
        lines.append(
            f"| {shown} | {figure_of(c['ms_per_step'])} | {figure_of(c['cpu_ms_per_step'])} | {pair(c['times_floor'])} | "
            f"{pair(c['compiled_is_faster'])} | {pair(c['plain_is_faster'])} | {c['epoch_seconds']:.3g} | "
            f"{c['steps_per_second']:,.0f} | {c['first_seconds']:.1f} | {c['peak_mb']:,.0f} | {loss} |"
        )
    lines += [""] + [f"Left out: {name} ({why})." for name, why in found["left_out"].items()]
    hours = told["contestants"].get(COMPILED, {}).get("schedule_hours")
    if hours is not None and found["batch"] <= 100:
        lines.append(
            f"{SCHEDULE_EPOCHS:,} epochs of {SCHEDULE_ROWS:,} images, the schedule of Burda et al. 2016, would take {hours:.1f} "
            "hours of compiled steps at this size."
        )
    before, after = found["load_average"]
    lines.append(
        f"Medians of {len(found['rounds'])} rounds of {found['steps']:,} steps, on {described(found['machine'])}. Load average "
        f"{before:.1f} before the rounds and {after:.1f} after."
    )
    return [*lines, ""]


def report(figures: Figures) -> str:
    """All devices and sizes."""
    lines = []
    for device, f in figures.items():
        where = f["gpu"] if device == "cuda" else f"CPU, {f['threads']} thread(s)"
        lines += [
            f"## {where}",
            "",
            "Ratios are paired within rounds, by the clock (and by CPU time).",
            "",
        ]
        for found in f["sizes"].values():
            lines += table(found)
    return "\n".join(lines).rstrip()


def short(figures: Figures) -> str:
    """The README's table: milliseconds per step, sizes as columns."""
    lines = []
    for device, f in figures.items():
        told = {key: summarize(found) for key, found in f["sizes"].items()}
        where = f["gpu"] if device == "cuda" else f"CPU, {f['threads']} thread(s)"
        lines += [
            f"| ms per step, {where} | " + " | ".join(SIZES[k].label for k in told) + " |",
            "|---|" + "---|" * len(told),
        ]
        for name in NAMES:
            cells = [t["contestants"].get(name) for t in told.values()]
            if any(cells):
                lines.append(
                    f"| {name} | " + " | ".join(figure_of(c["ms_per_step"]) if c else "" for c in cells) + " |"
                )
        machines = dict.fromkeys(described(found["machine"]) for found in f["sizes"].values())
        lines += ["", "; ".join(machines) + ".", ""]
    return "\n".join(lines).rstrip()


def draw(figures: Figures) -> None:
    """Milliseconds per step as bars, a panel per size and a row per device, the floor as a line."""
    columns = max(len(f["sizes"]) for f in figures.values())
    figure = Figure(figsize=(4.6 * columns + 1.2, 3.7 * len(figures)), layout="constrained")
    axes = figure.subplots(len(figures), columns, squeeze=False)
    for row, (device, f) in zip(axes, figures.items(), strict=True):
        for ax in row[len(f["sizes"]) :]:
            ax.set_visible(False)
        for ax, found in zip(row, f["sizes"].values(), strict=False):
            told = summarize(found)
            bars = {n: c["ms_per_step"] for n, c in told["contestants"].items() if n not in FLOORS}
            bars = dict(sorted(bars.items(), key=lambda item: -item[1]))
            colours = ["tab:blue" if n in (COMPILED, PLAIN) else "silver" for n in bars]
            drawn = ax.barh(list(bars), list(bars.values()), color=colours)
            ax.bar_label(drawn, [figure_of(v) for v in bars.values()], padding=3, fontsize=8)
            ax.margins(x=0.14)
            if told["floor"] is not None:
                least = told["contestants"][told["floor"]]["ms_per_step"]
                ax.axvline(least, color="black", linewidth=1, linestyle="--")
                ax.text(
                    least, 1.01, f" products alone: {figure_of(least)}", transform=ax.get_xaxis_transform(), fontsize=8
                )
            what, nets, kind = found["label"].split(", ", 2)  # of deeper models the third has two parts
            ax.set_title(f"{what}, {kind}\n{nets}", fontsize=9, pad=14)
            ax.set_xlabel(f"ms per step, {f['gpu'] if device == 'cuda' else 'CPU'}", fontsize=9)
            ax.tick_params(labelsize=8)
            ax.spines[["top", "right"]].set_visible(False)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=120)


def gpu() -> str | None:
    """The name of the CUDA device, or None."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def main() -> None:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", nargs="+", choices=("cpu", "cuda"), help="the CPU, and CUDA where there is one")
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="batch sizes; all that the device has")
    parser.add_argument("--rows", type=int, default=60_000, help="images per epoch, cut to whole minibatches")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=" | ".join(NAMES))
    parser.add_argument("--spin", action="store_true", help="let libraries choose how their idle threads wait")
    args = parser.parse_args()
    found_gpu = gpu()
    kept = RESULTS / "training.json"
    figures: Figures = json.loads(kept.read_text()) if kept.is_file() else {}
    for device in args.device or (["cpu", "cuda"] if found_gpu else ["cpu"]):
        sizes = dict(figures.get(device, {}).get("sizes", {}))
        for key in args.sizes or [k for k, s in SIZES.items() if s.only_on in (None, device)]:
            print(f"{device}: {SIZES[key].label}", flush=True)
            sizes[key] = {**measure(key, device, args.only, args), "machine": machine()}
        about = {
            "threads": args.threads,
            "spin": args.spin,
            "gpu": found_gpu,
        }
        figures[device] = {**about, "sizes": sizes, "medians": {k: summarize(s) for k, s in sizes.items()}}
        text = report(figures)
        RESULTS.mkdir(exist_ok=True)
        kept.write_text(json.dumps(figures, indent=2) + "\n")
        (RESULTS / "training.md").write_text(text + "\n")
        into_readme("training", short(figures))
        draw(figures)
        print(text)


if __name__ == "__main__":
    main()
