"""A whole Pyro program in a Python file, for what blocks cannot express.

The file defines ``program(event_shape)``, which returns a Program for data ``(N, *event_shape)``. It is run when the user
names it, and never from a run directory, which records its SHA-256.
"""

from __future__ import annotations

import hashlib
import runpy
from pathlib import Path
from typing import Any

from pyro_vae.declared import find
from pyro_vae.errors import UserError
from pyro_vae.programs.contract import require_program
from pyro_vae.seeding import derive_seed, seeded


def load_program(source: str | Path, event_shape: tuple[int, ...], *, seed: int = 0, sha256: str | None = None) -> Any:
    """Run a declared ``.py`` model, or a file of yours, and build its program.

    Args:
        source: a declared name, or a path that ends in ``.py``.
        event_shape: of one datum.
        seed: of the initial weights; torch's generators are put back.
        sha256: what the file must have; another is refused before a line of it runs.

    Returns:
        The Program; ``program.source`` says which file it came from, for the run's record.
    """
    path = find("models", source)
    if path.suffix != ".py":
        raise UserError(f"{path} is no Python file: expected one that defines program(event_shape)")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 is not None and digest != sha256:
        raise UserError(
            f"{path} is not the file that the run was trained on: its SHA-256 differs; name the one that was"
        )
    try:
        make = runpy.run_path(str(path)).get("program")
    except Exception as error:
        raise UserError(f"{path} fails when it is run: {type(error).__name__}: {error}") from error
    if not callable(make):
        raise UserError(f"{path} defines no program(event_shape)")
    with seeded(derive_seed("initial weights", seed)):
        program = make(tuple(event_shape))
    require_program(program)
    program.source = {"file": str(path), "sha256": digest}
    return program
