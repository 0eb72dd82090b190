"""What the fuzz tests have in common: broken files of every kind, and what must never come of them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import strategies as st

CASE_SECONDS = 60.0
CASE_MEGABYTES = 700

Ruin = Callable[[Path], None]


@contextlib.contextmanager
def guarded(outside: Path) -> Iterator[None]:
    """A case that hangs, takes much memory, or writes outside its own folder fails."""
    before, most = listing(outside), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def late(signum: int, frame: Any) -> None:
        raise AssertionError(f"the case hung for {CASE_SECONDS} s")

    handler = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most) / 1024
    assert grown < CASE_MEGABYTES, f"the case took {grown:.0f} MB"
    assert listing(outside) == before, "the case wrote outside its folder"


def no_room(patch: pytest.MonkeyPatch, number: int) -> None:
    """Let every file that is to be written, and every folder that is to be made, fail as the system says it with a number."""

    def refuse(*args: Any, **how: Any) -> Any:
        raise OSError(number, os.strerror(number), str(args[0]) if args else None)

    opened = os.open

    def no_new(path: Any, flags: int, *rest: Any, **how: Any) -> int:
        return refuse(path) if flags & os.O_CREAT else opened(path, flags, *rest, **how)  # type: ignore[no-any-return]

    patch.setattr("os.open", no_new)
    patch.setattr(Path, "mkdir", refuse)
    patch.setattr(Path, "write_bytes", refuse)
    patch.setattr(Path, "write_text", refuse)


def listing(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, and what it holds."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def clear(path: Path) -> None:
    """Remove whatever is there."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def truncate(share: float) -> Ruin:
    """Cut a file short."""
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def flip(places: list[tuple[float, int]]) -> Ruin:
    """Flip bits of a file."""

    def ruin(path: Path) -> None:
        content = bytearray(path.read_bytes())
        for share, bit in places:
            if content:
                content[min(int(share * len(content)), len(content) - 1)] ^= 1 << bit
        path.write_bytes(bytes(content))

    return ruin


def replace(content: bytes) -> Ruin:
    """Put other bytes in its place."""
    return lambda path: path.write_bytes(content)


def insert(share: float, content: bytes) -> Ruin:
    """Put bytes in between."""

    def ruin(path: Path) -> None:
        old = path.read_bytes()
        at = int(share * len(old))
        path.write_bytes(old[:at] + content + old[at:])

    return ruin


def special(kind: str) -> Ruin:
    """Put in its place what is no ordinary file."""

    def ruin(path: Path) -> None:
        path.unlink(missing_ok=True)
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "itself":
            path.symlink_to(path)
        elif kind != "nothing":
            path.symlink_to(kind)

    return ruin


def header(change: Callable[[dict[str, Any]], Any]) -> Ruin:
    """Change the header of a safetensors file, leaving the tensors as they are."""

    def ruin(path: Path) -> None:
        content = path.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        table = json.loads(content[8 : 8 + size])
        table = change(table) or table
        text = json.dumps(table).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])

    return ruin


NAMES = [
    "../../outside",
    "/etc/passwd",
    "program..",
    "",
    "\x00",
    "a" * 10_000,
    "optimizer.x.y",
    "optimizer.99999.exp_avg",
]
HUGE = [0, 1, -1, 2**31, 2**63 - 1, 10**18, 10**30]


@st.composite
def headers(draw: st.DrawFn) -> Ruin:
    """A change of one thing in a safetensors header."""
    what = draw(st.sampled_from(["shape", "dtype", "name", "offsets", "extra", "metadata", "size"]))
    value = draw(st.sampled_from(HUGE))
    name = draw(st.sampled_from(NAMES))
    dtype = draw(st.sampled_from(["F64", "F32", "F8_E4M3", "U64", "I8", "BOOL", "X", 3, None]))
    which = draw(st.integers(0, 10**6))
    leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
    junk = draw(st.recursive(leaves, lambda inner: st.lists(inner, max_size=3), max_leaves=5))

    def change(table: dict[str, Any]) -> Any:
        keys = sorted(k for k in table if k != "__metadata__")
        key = keys[which % len(keys)]
        if what == "shape":
            table[key]["shape"] = [value, *table[key]["shape"][1:]]
        elif what == "dtype":
            table[key]["dtype"] = dtype
        elif what == "name":
            table[name] = table.pop(key)
        elif what == "offsets":
            table[key]["data_offsets"] = [table[key]["data_offsets"][0], value]
        elif what == "extra":
            table[name] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        elif what == "metadata":
            metadata = table.setdefault("__metadata__", {})
            state = json.loads(metadata.get("header", "{}"))
            keys = sorted(state)
            if isinstance(state, dict) and keys:
                state[keys[which % len(keys)]] = junk if which % 2 else value
            metadata["header"] = json.dumps(state) if which % 5 else "[" * 100_000
        return None

    if what == "size":
        return lambda path: path.write_bytes(struct.pack("<Q", max(0, value) % 2**64) + path.read_bytes()[8:])
    return header(change)


shares = st.floats(0.0, 1.0)
ruins = st.one_of(
    shares.map(truncate),
    st.lists(st.tuples(shares, st.integers(0, 7)), min_size=1, max_size=8).map(flip),
    st.lists(st.tuples(st.floats(0.0, 0.02), st.integers(0, 7)), min_size=1, max_size=8).map(flip),
    st.binary(max_size=200).map(replace),
    st.builds(insert, shares, st.binary(min_size=1, max_size=20)),
    st.sampled_from(
        ["folder", "pipe", "itself", "nothing", "/dev/zero", "/dev/null", "/etc/hostname", "../../outside/secret"]
    ).map(special),
)

KEYS = ["latent_dim", "program", "prior", "likelihood", "decoder", "encoder", "posterior", "name", "hidden", "components",
        "scale", "x"]  # fmt: skip
BLOCKS = ["mlp", "linear", "gated-mlp", "conv", "normal", "bernoulli", "vamp", "gaussian-mixture", "full-rank-normal"]
WORDS = [
    *BLOCKS,
    "vae",
    "low-rank-normal",
    "spline-flow",
    "maf",
    "student-t",
    "categorical",
    "laplace",
    "shared",
    "../x",
    "",
    "é",
]
plain = st.one_of(
    st.sampled_from(WORDS),
    st.integers(-3, 40),
    st.sampled_from([10**5, 10**6, 10**9, 2**63, -(2**63), 10**400]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.booleans(),
    st.text(max_size=8),
    st.dates(),
)
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)
tables = st.dictionaries(st.sampled_from(KEYS), values, max_size=6)


# Command lines: RUN, OTHER, DATA, FILE, FOLDER, MISSING and LONG are places; what else is a value is right, wrong or absurd.

COUNTS = ["1", "2", "3", "0", "-1", "1.5", "x", "", "nan"]
OUT = [
    "FOLDER/o",
    "FOLDER/a/o",
    "FILE/below",
    "FILE",
    "LONG",
    "MISSING/x/y",
    "",
    "FOLDER",
    "~nobody-of-that-name/o",
    "a\0b",
]
SOME = {
    "--seed": ["0", "7", "-1", "x", str(2**63), str(2**70)],
    "--device": ["cpu", "auto", "cuda", "mps", "abacus", ""],
    "--data-root": ["FOLDER", "MISSING", "FILE"],
}
PICTURE = {**SOME, "--num": COUNTS, "--out": [f"{o}.png" for o in OUT] + OUT}
SPLITS = ["train", "validation", "test", "tets", ""]
FEW = {"--samples": COUNTS, "--limit": COUNTS}
FLAGS = ("--json", "--quiet", "--python", "--draws", "--resume", "--verbose")
LINES: dict[str, tuple[list[str], dict[str, list[str]]]] = {
    "evaluate": (
        ["RUN", "--samples", "3"],
        {**SOME, **FEW, "--split": SPLITS,
         "--method": ["iw", "ais --distributions 3 --leapfrog 1", "bdmc --distributions 3 --leapfrog 1", "magic"],
         "--start": ["prior", "guide", "end"],
         "--precision": ["full", "tf32", "bf16", "half"], "--noise": ["random", "sobol", "pink"],
         "--target-error": ["0.1", "0", "-1", "nan", "x"], "--json": [], "--quiet": []},
    ),
    "compare": (
        ["RUN", "OTHER"],
        {**SOME, **FEW, "--split": SPLITS, "--json": [], "--report": [f"{o}.html" for o in OUT], "--group": [],
         "--format": ["latex", "csv", "word"], "--baseline": ["RUN", "MISSING", ""], "--figure": [f"{o}.pdf" for o in OUT]},
    ),
    "score": (
        ["RUN", "DATA"],
        {**SOME, "--samples": COUNTS, "--threshold": ["-3", "nan", "x"], "--streams": ["place", "content", ""], "--json": [],
         "--out": [f"{o}.csv" for o in OUT] + OUT},
    ),
    "runs": (["FOLDER"], {"--format": ["latex", "csv", "word"], "--json": []}),
    "sample": (["RUN", "--num", "2"], {**PICTURE, "--draws": [], "--temperature": ["0.5", "0", "inf"], "--shared": ["z", "q"]}),
    "reconstruct": (["RUN", "--num", "2"], {**PICTURE, "--split": SPLITS}),
    "interpolate": (["RUN", "--num", "2"], {**PICTURE, "--split": SPLITS, "--steps": COUNTS,
                                               "--path": ["line", "sphere", "crow"]}),
    "manifold": (["RUN"], PICTURE),
    "posterior": (
        ["RUN", "--samples", "4", "--warmup", "3", "--chains", "2", "--images", "1", "--quiet"],
        {**SOME, "--source": ["guide", "psis", "mcmc", "x"], "--mcmc": ["1", "0", "x"], "--predictive": COUNTS,
         "--split": SPLITS, "--out": [f"{o}.nc" for o in OUT] + OUT},
    ),
    "anomaly": (["RUN", "DATA"], {**SOME, **FEW, "--json": [], "--out": [f"{o}.png" for o in OUT]}),
    "report": (["RUN", "--samples", "3", "--limit", "2", "--quiet"], {**SOME, "--out": [f"{o}.html" for o in OUT]}),
    "export": (["RUN"], {**SOME, "--out": OUT, "--only": ["encoder", "decoder", "codec"]}),
    "list": ([], {"--json": []}),
    "show": (["mlp"], {"--shape": ["1,8,8", "3", "0", "-1,2", "x", ""], "--set": ["latent_dim=3", "latent_dim=0", "=", "a.b=1"],
                       "--python": []}),
    "train": (
        ["DATA", "--model", "mlp", "--likelihood", "normal", "--set", "latent_dim=2",
         "--encoder", "mlp:hidden=[4]", "--decoder", "mlp:hidden=[4]",
         "--steps", "1", "--out", "FOLDER/new", "--quiet"],
        {**SOME, "--likelihood": ["normal", "bernoulli", "normal:scale=shared", "x", "normal:", "normal:x=1"],
         "--prior": ["standard-normal", "vamp:components=2", "vamp:components=0", "\u00e9"],
         "--posterior": ["full-rank-normal", ""],
         "--guide": ["linear", "spline", "FILE", "MISSING"], "--objective": ["iwae", "elbo:beta=0", "elbo:beta=2", "x:y"],
         "--batch-size": COUNTS, "--lr": ["0.1", "0", "-1", "nan", "inf", "x"], "--patience": COUNTS,
         "--average": ["0", "1", "x"],
         "--clip-norm": ["1", "0", "nan"], "--skip-gradients": ["100", "0", "inf"],
         "--optimizer": ["sgd", "lion", "adamw:weight_decay=0.1", "adam:x=1", ":"],
         "--dtype": ["float64", "x"],
         "--schedule": ["cosine", "stages:growth=2", "cosine:final=2", "x"], "--accumulate": COUNTS, "--from": ["RUN", "MISSING"],
         "--out": [*OUT, "RUN"],
         "--resume": [], "--binarization": ["static", "dynamic", "none", "x"], "--validation": COUNTS, "--compile": ["off", "x"]},
    ),
}  # fmt: skip
ODD = [
    [], ["--version"], ["--help"], ["evaluate", "--help"], ["evaluat"], ["--json"], ["list", "nothing"], ["show"],
    ["compare", "RUN"], ["train", "--steps", "1", "--epochs", "1"], ["\udcff"], [""], ["show", "FILE"],
    ["train", "FILE", "--steps", "1"],
]  # fmt: skip


def command_line(random: Random) -> list[str]:
    """A command and its arguments, in which places are still words."""
    if random.random() < 0.08:
        return list(random.choice(ODD))
    name = random.choice(list(LINES))
    arguments, options = LINES[name]
    line = [name, *(random.choice(["RUN", "DATA", "FILE", "MISSING", "LONG", "FOLDER"]) if
                    a in ("RUN", "DATA", "OTHER") and random.random() < 0.08 else a for a in arguments)]  # fmt: skip
    if name == "list":
        line += [random.choice(["priors", "posteriors", "models", "likelihoods", "data", "x"])]
    for option in random.sample(list(options), min(len(options), random.choice([0, 0, 1, 1, 2]))):
        likely = options[option][:2] if random.random() < 0.6 else options[option]  # the first are right
        line += [option, *(random.choice(likely).split(" ") if likely else [])]
    if random.random() < 0.05:
        line += [random.choice([*FLAGS, "stray"])]
    return line


def folder_state(random: Random) -> Ruin | None:
    """What becomes of a whole run directory; None where that is nothing."""

    def emptied(path: Path) -> None:
        for file in path.iterdir():
            file.unlink()

    def gone(path: Path) -> None:
        emptied(path)
        path.rmdir()

    def a_file(path: Path) -> None:
        gone(path)
        path.write_text("no run")

    def of_the_future(path: Path) -> None:
        spec = path / "spec.toml"
        text = re.sub(r"(?m)^(\S*pyro.vae\S*) = .*$", r'\1 = "99.0"', spec.read_text())
        spec.write_text(text.replace("[training]", "[training]\nwarp = 9") + "\n[future]\nx = 1\n")

    def without_one(path: Path) -> None:
        random.choice(sorted(path.iterdir())).unlink()

    def foreign(path: Path) -> None:
        random.choice(sorted(path.iterdir())).write_bytes(random.randbytes(random.choice([0, 1, 50, 5000])))

    return random.choice([None] * 14 + [emptied, gone, a_file, of_the_future, without_one, foreign])
