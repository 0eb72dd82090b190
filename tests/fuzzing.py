"""What the fuzz tests have in common: broken files of every kind, and what must never come of them."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
            state = json.loads(metadata.get("state", "{}"))
            keys = sorted(state)
            if isinstance(state, dict) and keys:
                state[keys[which % len(keys)]] = junk if which % 2 else value
            metadata["state"] = json.dumps(state) if which % 5 else "[" * 100_000
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
