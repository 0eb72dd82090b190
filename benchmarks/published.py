"""Published Pyro programs, unchanged, through Pyro's own SVI and through this library.

The list stands in published_pyro.py, published_images.py, published_cells.py and published_texts.py, and was committed before
what it examines was built; the programs themselves stand in checkouts, folders ``OWNER+NAME`` under ``--sources`` at the commits
of ``published_source.COMMITS``, submodules included, which are read and never copied. Each program is a process of its own.
Stage ``pyro`` is the proof that it runs as published: three steps of Pyro's SVI. The others are this library's. Programs of a
kind other than ``ordinary`` run too, and are not counted. Some sources import what this project does not need: scvi-tools and
lightning with what they stand on, seaborn, scikit-image, lazy-loader, zuko (``PYTHONPATH`` is handed on).

    python benchmarks/published.py --sources ~/checkouts --json published.json
    python benchmarks/published.py --sources ~/checkouts --json binary.json --binary --only pyroved
    python benchmarks/published_page.py published.json --binary binary.json > docs/published.md

``--binary`` hands over, in place of a program's data, whether each number of them is above 1/2: what the library tells its user
to do whose grey levels stand under a Bernoulli. The list counts without it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import published_source
from published_source import ENTRIES, Case, Checkout, Entry

STAGES = ["pyro", "fit", "log_likelihood", "encode", "sample", "reconstruct", "load", "report", "compiled"]
STEPS, BATCH = 3, 8
UNREACHED = "not reached: nothing was trained or no log-likelihood found"
MODULES = ["published_pyro", "published_images", "published_cells", "published_texts"]


def main() -> None:
    """Run the list, or what of it is asked for, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, default=Path(), help="the folder with the checkouts")
    parser.add_argument("--list", action="store_true", help="print the list and run nothing")
    parser.add_argument("--only", action="append", help="names, or the beginnings of names")
    parser.add_argument("--counted", action="store_true", help="leave out what is not counted")
    parser.add_argument("--stages", choices=["pyro", "all"], default="all")
    parser.add_argument("--binary", action="store_true", help="data above 1/2 or not, in place of the data")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one program")
    parser.add_argument("--json", type=Path, help="write all results there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    for module in MODULES:
        importlib.import_module(module)
    if given.child:
        serve(ENTRIES[given.child], given.sources, given.stages, given.binary)
        return
    if given.list:
        print(*map(described, ENTRIES.values()), sep="\n")
        return
    names = [name for name in ENTRIES if not given.only or name.startswith(tuple(given.only))]
    names = [name for name in names if not given.counted or ENTRIES[name].kind == "ordinary"]
    results = {}
    for name in names:
        results[name] = run(name, given)
        print(row(ENTRIES[name], results[name]), file=sys.stderr, flush=True)
        if given.json:
            given.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


def run(name: str, given: argparse.Namespace) -> dict[str, str]:
    """Every stage of one program, in a process of its own: a crash costs its row alone."""
    command = [sys.executable, __file__, "--sources", str(given.sources), "--stages", given.stages, "--child", name]
    command += ["--binary"] if given.binary else []
    found: dict[str, str] = {}
    with tempfile.TemporaryFile("w+") as log:
        try:
            done = subprocess.run(command, stdout=log, stderr=subprocess.PIPE, text=True, timeout=given.timeout)
            last = f"crashed: process ended with {done.returncode}: {' '.join(done.stderr.split())[-200:]}"
        except subprocess.TimeoutExpired:
            last = f"crashed: no end after {given.timeout:g} s"
        log.seek(0)
        for line in log:
            if line.startswith("stage\t"):
                _, stage, result = line.rstrip("\n").split("\t", 2)
                found[stage] = result
    missing = [stage for stage in STAGES[: 1 if given.stages == "pyro" else None] if stage not in found]
    if missing:
        found[missing[0]] = last
    return found


def serve(entry: Entry, sources: Path, stages: str, binary: bool) -> None:
    """The child's side: every stage once, each reported when it is known."""
    warnings.simplefilter("ignore")
    checkout = Checkout(sources / entry.repository.replace("/", "+"), entry.path)
    for stage, act in works(entry, lambda: fresh(entry, checkout, binary)):
        try:
            result = act() or "ok"
        except Exception as error:
            mended = any(kind.__name__ == "UserError" for kind in type(error).__mro__)
            what = "refused" if mended else f"crashed: {type(error).__name__}"
            result = f"{what}: {error}"
        print(f"stage\t{stage}\t{' '.join(result.split())}", flush=True)
        if stage == stages or (stage == "pyro" and result != "ok"):
            return


def fresh(entry: Entry, checkout: Checkout, binary: bool) -> Case:
    """The program constructed anew, with nothing in Pyro's store, and its data, binary ones in their place where asked."""
    import pyro
    import torch

    pyro.clear_param_store()
    torch.manual_seed(0)
    case = entry.build(checkout)
    pyro.clear_param_store()
    return dataclasses.replace(case, x=(case.x > 0.5).to(case.x.dtype)) if binary else case


def works(entry: Entry, make: Callable[[], Case]) -> list[tuple[str, Callable[[], str | None]]]:
    """The stages by name; one returns what is wrong with its result, or None."""
    import torch

    import pyro_vae as pv

    folder = tempfile.mkdtemp()
    held: dict[str, Any] = {}

    def subject() -> tuple[Case, Any]:
        if "subject" not in held:
            case = make()
            held["subject"] = case, adopted(entry, case)
        return held["subject"]

    def fit(compile: str, out: str | None) -> None:
        if out is None:
            del held["subject"]  # a program anew
        case, program = subject()
        data = case.x if entry.labels is None else torch.utils.data.TensorDataset(case.x, case.y)
        run = pv.fit(
            program, data, steps=STEPS, batch_size=BATCH, compile=compile, out=out, device="cpu", **named(case)
        )
        held.setdefault("run", run)

    def likelihood(program: Any) -> torch.Tensor:
        case, _ = subject()
        result = pv.log_likelihood(program, case.x, case.y, num_samples=20, **named(case))
        return result.log_likelihood

    def log_likelihood() -> str | None:
        case, program = subject()
        held["values"] = values = likelihood(program)
        return None if values.isfinite().all() and len(values) == len(case.x) else f"wrong: {values.tolist()}"

    def encode() -> None:
        case, program = subject()
        pv.encode(program, case.x, case.y, **named(case))

    def sample() -> str | None:
        case, program = subject()
        y, inputs = (None if case.y is None else case.y[:6]), named(case, 6)
        shape = tuple(case.x.shape[1:])
        try:
            x = pv.sample(program, 6, y, event_shape=shape, **inputs)
        except (
            pv.errors.UserError
        ) as error:  # a total count that it reads from the rows: they are handed over, as it says
            if f"inputs={{{entry.observed!r}: x}}" not in str(error):
                raise
            rows = {**inputs.get("inputs", {}), entry.observed: case.x[:6]}
            x = pv.sample(program, 6, y, event_shape=shape, inputs=rows)
        return None if x.numel() == case.x[:6].numel() else f"wrong: shape {tuple(x.shape)}"

    def reconstruct() -> str | None:
        case, program = subject()
        x = pv.reconstruct(program, case.x, case.y, **named(case))
        return None if x.numel() == case.x.numel() else f"wrong: shape {tuple(x.shape)}"

    def load() -> str | None:
        if "run" not in held or "values" not in held:
            return UNREACHED
        again = pv.load(f"{folder}/run", program=adopted(entry, make()))
        same = torch.allclose(likelihood(again.program), held["values"])
        return None if same else "wrong: other numbers than before it was saved"

    def report() -> str | None:
        if "run" not in held:
            return UNREACHED
        pv.report(held["run"], f"{folder}/report.html", limit=8, num_samples=20)
        return None

    return [
        ("pyro", lambda: steps_of_svi(entry, make())),
        ("fit", lambda: fit("off", f"{folder}/run")),
        ("log_likelihood", log_likelihood),
        ("encode", encode),
        ("sample", sample),
        ("reconstruct", reconstruct),
        ("load", load),
        ("report", report),
        ("compiled", lambda: fit("on", None)),
    ]


def steps_of_svi(entry: Entry, case: Case) -> str | None:
    """Pyro's own SVI, with the objective that the program is published with."""
    import math

    import pyro

    args, kwargs = entry.arguments(case)
    enumerates = {"max_plate_nesting": entry.plates} if entry.objective == "TraceEnum_ELBO" else {}
    elbo = getattr(pyro.infer, entry.objective)(**enumerates)
    svi = pyro.infer.SVI(*case.model_and_guide, pyro.optim.Adam({"lr": 1e-4}), elbo)
    losses = [svi.step(*args, **kwargs) for _ in range(STEPS)]
    return None if all(map(math.isfinite, losses)) else f"wrong: losses {losses}"


def adopted(entry: Entry, case: Case) -> Any:
    """The program as the library is given it: adopted, where the library can; else as it is."""
    import pyro_vae as pv

    if not hasattr(pv, "adopt"):
        return case.program if not isinstance(case.program, tuple) else _namespace(*case.program)
    about = {"observed": entry.observed, "conditioned": entry.conditioned, "constants": case.constants}
    programs = case.program if isinstance(case.program, tuple) else (case.program,)
    return pv.adopt(*programs, **{name: value for name, value in about.items() if value})


def _namespace(model: Callable[..., Any], guide: Callable[..., Any]) -> Any:
    """A module with nothing in it but the pair."""
    from torch import nn

    program = nn.Module()
    program.model, program.guide = model, guide
    return program


def named(case: Case, rows: int | None = None) -> dict[str, Any]:
    """``inputs=`` where the program has any, the first rows of them."""
    return {"inputs": {name: value[:rows] for name, value in case.inputs.items()}} if case.inputs else {}


def passed(result: dict[str, str]) -> bool:
    """Whether every stage went through."""
    return all(value == "ok" for value in result.values())


def row(entry: Entry, result: dict[str, str]) -> str:
    """A line of the table: each stage as ok, or the word for what happened, and the first message."""
    words = [result.get(stage, "").split(":")[0] or "-" for stage in STAGES]
    first = next((value for value in result.values() if value != "ok"), "")
    source = f"{entry.repository}, {entry.path}"
    return " | ".join(["", entry.name, source, entry.kind, *words, first.replace("|", "/")[:160], ""]).strip()


def described(entry: Entry) -> str:
    """An entry in one line."""
    about = [
        f"{entry.repository}@{entry.commit[:10]}:{entry.path}",
        entry.kind,
        entry.objective,
        f"observed={entry.observed}",
    ]
    about += [f"y={entry.labels}"] if entry.labels else []
    about += [f"conditioned={','.join(entry.conditioned)}"] if entry.conditioned else []
    return f"{entry.name}: {'; '.join(about)}"


def table(results: dict[str, dict[str, str]]) -> str:
    """Markdown: a row for each program, then how many went through."""
    head = ["program", "source", "kind", *STAGES, "what stopped it first"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += [row(ENTRIES[name], result) for name, result in results.items()]
    ordinary = {name: r for name, r in results.items() if ENTRIES[name].kind == "ordinary"}
    kinds = Counter(ENTRIES[name].kind for name in results if name not in ordinary)
    lines += [
        "",
        f"{sum(map(passed, ordinary.values()))} of {len(ordinary)} counted programs went through every stage.",
    ]
    lines += [f"Not counted, {published_source.KINDS[kind]}: {count}." for kind, count in sorted(kinds.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
