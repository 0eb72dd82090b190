"""What every command on a run begins with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_vae.training.run import Run


def open_run(path: Path, device: str, program_file: str | None = None) -> Run:
    """Load a run; the program of a ``.py`` file is run only when it is named here, and must be the one that was trained."""
    from pyro_vae.training.run import load, read_record

    program = None
    if program_file is not None:
        program = named_program(program_file, path, read_record(path))
    return load(path, program=program, device=device)


def named_program(file: str, path: Path, record: dict[str, Any], seed: int = 0) -> Any:
    """The program of a ``.py`` file that the user names; not run unless its SHA-256 is the one that the run recorded."""
    from pyro_vae.errors import UserError
    from pyro_vae.programs.file import load_program

    recorded = record["program"].get("sha256")
    if not isinstance(recorded, str):
        raise UserError(f"{path} was not trained on a .py file: leave --model out")
    return load_program(file, tuple(record["program"]["event_shape"]), seed=seed, sha256=recorded)


def say(text: str) -> None:
    """A line for the user on standard error, where it disturbs no JSON."""
    print(text, file=sys.stderr)
