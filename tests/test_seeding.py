"""Every use of random numbers has a stream of its own."""

from __future__ import annotations

import ast
import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch

import pyro_vae
from pyro_vae.seeding import derive_seed, generator

# Uses that are meant to draw the same numbers, or of which no number is looked at: each with its number of places.
SHARED = {
    "initial weights": 2,  # a declared program, and a program in a file
    "recording": 2,  # a graph is recorded twice and must come out alike
}


def test_seeds_of_other_names_lengths_and_signs_differ() -> None:
    numbers = (0, 1, -1, 2**32, 2**32 + 1, 2**63)
    tuples = [t for n in range(4) for t in itertools.product(numbers, repeat=n)]
    seeds = [derive_seed(name, *t) for name in ("a", "b", "a'", "") for t in tuples]
    assert len(set(seeds)) == 4 * len(tuples)
    assert all(0 <= s < 2**63 for s in seeds)


def test_zeros_at_the_end_make_another_stream() -> None:
    first = torch.randn(5, generator=generator("chain", 3))
    for zeros in range(1, 5):
        assert not torch.equal(first, torch.randn(5, generator=generator("chain", 3, *[0] * zeros)))


def streams() -> list[tuple[str, str]]:
    """(Name, place) of every call in the library that makes a seed; a call without a name in letters is named by its source."""
    found = []
    root = Path(pyro_vae.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if path.name == "seeding.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            place = f"{path.relative_to(root)}:{node.lineno}"
            if called in ("derive_seed", "generator"):
                first = node.args[0]
                literal = isinstance(first, ast.Constant) and isinstance(first.value, str)
                written = literal or isinstance(first, ast.JoinedStr)
                found.append((ast.unparse(first).strip("'\"") if written else f"no name: {ast.unparse(node)}", place))
            elif called in ("seeded", "manual_seed") and isinstance(node.args[0], ast.Constant):
                found.append((f"no name: {ast.unparse(node)}", place))
    return found


def test_every_seed_of_the_library_has_a_name_of_its_own() -> None:
    found = streams()
    assert len(found) > 30
    assert not [place for name, place in found if name.startswith("no name")]
    counts = Counter(name for name, _ in found)
    assert {name: n for name, n in counts.items() if n > 1} == SHARED


@pytest.mark.parametrize("name", ["f'annealing: {phase}'"])
def test_names_made_while_running_are_known(name: str) -> None:
    """A name with a part that varies could meet another: those that there are were looked at."""
    varying = [n for n, _ in streams() if "{" in n]
    assert varying == [name.strip("'\"")]
