"""Every system that the VAE was compared with, trained here: three tables that are never mixed.

    python benchmarks/seeds_table.py [--rows rbm,dbn] [--budget 150] [--work runs/seeds] [--found rbm=runs/rbm] [--list]

A row is one training and one evaluation by `pyro-vae`, as a user would run them: seeds.toml has their commands. Its directory is
work/ROW, or the one that --found names. What is trained is not trained again, what was begun is resumed, and what is evaluated is
read. --budget is minutes for each row: a row that takes longer stops at a checkpoint, and the next call goes on with it. --read
runs nothing and prints what there is. MNIST and static MNIST are looked for under PYRO_VAE_DATA. The tables go to
benchmarks/results/seeds.md and docs/baselines.md, the figures to seeds.json; the pictures of samples that baselines draw stay in
their directories.
"""

from __future__ import annotations

import argparse
import json
import signal
import struct
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "system", "NLL (nats)", "Monte Carlo error", "data error", "computed", "images used", "parameters", "minutes", "bits/dim",
    "printed",
)  # fmt: skip
TABLES = {
    "static": "Static MNIST (binarized once: Larochelle & Murray 2011): probabilities of binary images",
    "dynamic": "Dynamic MNIST (binarized anew every epoch): probabilities of binary images",
    "grey": "Grey levels of MNIST, dequantized: densities under normal noise (nats of [0, 1]; bits per dimension of 256 levels)",
}


@dataclass(frozen=True)
class Row:
    """A system: how it is trained and evaluated, and what was printed of it.

    Attributes:
        table: ``static``, ``dynamic`` or ``grey``.
        title: as printed.
        train: arguments of ``pyro-vae train`` or ``pyro-vae baseline``, without --out.
        evaluate: arguments of ``pyro-vae evaluate RUN``; a baseline evaluates itself.
        printed: the figure of the literature, with its source.
        after: the row whose directory this one begins with.
    """

    table: str
    title: str
    train: str
    evaluate: str = ""
    printed: str = ""
    after: str = ""

    @property
    def baseline(self) -> bool:
        """Whether it is no pair of programs."""
        return self.train.startswith("baseline")


ROWS = {name: Row(**row) for name, row in tomllib.loads((Path(__file__).parent / "seeds.toml").read_text()).items()}


def run(arguments: list[str], minutes: float) -> bool:
    """``pyro-vae *arguments``, told to stop when its time is over; whether it ended by itself."""
    print("pyro-vae", *arguments, file=sys.stderr, flush=True)
    process = subprocess.Popen([sys.executable, "-m", "pyro_vae", *arguments], stdout=subprocess.DEVNULL)
    try:
        status = process.wait(60 * max(minutes, 0))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        process.wait()
        return False
    if status:
        raise SystemExit(f"pyro-vae {' '.join(arguments)} ended with {status}")
    return True


def compute(row: Row, out: Path, parent: Path | None, minutes: float) -> None:
    """Train and evaluate what is left of a row, for so many minutes."""
    start = time.perf_counter()
    left = lambda: minutes - (time.perf_counter() - start) / 60  # noqa: E731
    words = row.train.split()
    if row.baseline:
        if (out / "evaluation.json").is_file():
            return
        options = ("--samples", "--chains", "--distributions", "--limit")
        how = [word for a, b in pairwise(words) if a in options for word in (a, b)]
        begun = ["baseline", words[1], "--resume", *how] if (out / "baseline.json").is_file() else words
        begin_with = ["--from", str(parent)] if parent is not None and begun is words else []
        run([*begun, *begin_with, "--out", str(out), "--quiet"], left())
        return
    if not finished(out):
        arguments = ["train", "--resume"] if (out / "spec.toml").is_file() else words
        if not run([*arguments, "--out", str(out), "--quiet"], left()):
            return
    if not (out / "evaluation.json").is_file() and left() > 0:
        run(["evaluate", str(out), *row.evaluate.split(), "--quiet"], left())


def finished(out: Path) -> bool:
    """Whether a run has made all of its epochs."""
    if not (out / "metrics.jsonl").is_file():
        return False
    training = tomllib.loads((out / "spec.toml").read_text())["training"]
    return (out / "metrics.jsonl").read_text().count("\n") >= training.get("epochs", 1)


def figures(row: Row, out: Path) -> dict[str, Any] | None:
    """What a table says of a row; None of one that is not evaluated."""
    if not (out / "evaluation.json").is_file():
        return None
    found = json.loads((out / "evaluation.json").read_text())
    if found["split"] != "test":
        raise SystemExit(f"error: {out} was evaluated on its {found['split']} images: evaluate it anew")
    if row.baseline:
        more = {k: found[k] for k in ("computed", "images_used", "parameters", "minutes")}
    else:
        record = tomllib.loads((out / "spec.toml").read_text())
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        more = {
            "computed": computed(found),
            "images_used": record["rows"]["train"],
            "parameters": parameters(out / "weights.safetensors"),
            "minutes": sum(line["seconds"] for line in lines) / 60,
        }
    more["own_minutes"] = more["minutes"]
    kept = ("nll", "nll_mc_se", "nll_data_se", "num_data", "bits_per_dim", "warnings")
    return {"title": row.title, "table": row.table, "printed": row.printed, **{k: found[k] for k in kept}, **more}


def computed(found: dict[str, Any]) -> str:
    """How ``evaluate`` found log p(x)."""
    if (states := found.get("states")) is not None:
        return "exact" if states == 1 else f"exact, {states:,} states"
    bad = found["khat_bad_fraction"]
    return f"IW at K = {found['num_samples']:,}" + ("" if bad is None else f" ({bad:.0%} bad k)")


def parameters(path: Path) -> int:
    """Numbers in a file of weights, by its header alone."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    total = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            size = 1
            for n in tensor["shape"]:
                size *= n
            total += size
    return total


def tables(rows: dict[str, dict[str, Any]]) -> str:
    """The three tables as Markdown, best first."""
    lines = []
    for name, title in TABLES.items():
        mine = sorted((r for r in rows.values() if r["table"] == name), key=lambda r: r["nll"])
        head = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += [f"**{title}**", "", *(head if mine else ["Not trained yet."])]
        for r in mine:
            cells = [
                r["title"], f"{r['nll']:.2f}", number(r["nll_mc_se"], 3), number(r["nll_data_se"], 2), r["computed"],
                f"{r['images_used']:,} + {r['num_data']:,} test", f"{r['parameters']:,}", f"{r['minutes']:.0f}",
                number(r["bits_per_dim"], 4), r["printed"],
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    noted = [f"* {r['title']} ({r['table']}): {text}" for r in rows.values() for text in r["warnings"]]
    return "\n".join(
        [*lines, *(["What stands against single rows, as their evaluation says:", "", *noted] if noted else [])]
    )


def number(value: float | None, decimals: int) -> str:
    """A number, or a dash."""
    return "-" if value is None else f"{value:.{decimals}f}"


def main() -> None:
    """Compute what is asked for, and print what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="names with commas between [default: all]")
    parser.add_argument("--budget", type=float, default=150, help="minutes for each row")
    parser.add_argument("--work", type=Path, default=Path("runs/seeds"))
    parser.add_argument(
        "--found", action="append", default=[], metavar="ROW=DIR", help="a row that was trained elsewhere"
    )
    parser.add_argument("--read", action="store_true", help="run nothing")
    parser.add_argument("--list", action="store_true", help="print the rows and their commands")
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"{name:<17} {row.table:<8} pyro-vae {row.train}" for name, row in ROWS.items()))
        return
    elsewhere = dict(pair.split("=", 1) for pair in args.found)
    chosen = list(ROWS) if args.rows is None else args.rows.split(",")
    if unknown := [name for name in [*chosen, *elsewhere] if name not in ROWS]:
        raise SystemExit(f"error: no row {unknown[0]!r}: {', '.join(ROWS)}")
    out = {name: Path(elsewhere.get(name, args.work / name)) for name in ROWS}
    for name in [] if args.read else chosen:
        row = ROWS[name]
        if row.after and not (out[row.after] / "evaluation.json").is_file():  # written when it is trained
            print(f"{name} waits for {row.after}", file=sys.stderr)
            continue
        compute(row, out[name], out[row.after] if row.after else None, args.budget)
    rows = {name: found for name in ROWS if (found := figures(ROWS[name], out[name])) is not None}
    for name in rows:  # with those of what it begins with
        rows[name]["minutes"] += rows.get(ROWS[name].after, {}).get("own_minutes", 0.0)
    from mnist import into_readme

    text = tables(rows)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "seeds.json").write_text(json.dumps(rows, indent=2) + "\n")
    (RESULTS / "seeds.md").write_text(text + "\n")
    into_readme("seeds", text, "docs/baselines.md")
    print(text)


if __name__ == "__main__":
    main()
