"""What every command on a run begins with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyro_vae.training.run import Run


def open_run(path: Path, device: str, program_file: str | None = None) -> Run:
    """Load a run; the program of a ``.py`` file is run only when it is named here, and must be the one that was trained."""
    from pyro_vae.errors import UserError
    from pyro_vae.programs.file import load_program
    from pyro_vae.training.run import load, read_record

    program = None
    if program_file is not None:
        record = read_record(path)["program"]
        program = load_program(program_file, tuple(record["event_shape"]))
        if program.source["sha256"] != record.get("sha256"):
            raise UserError(f"{program_file} is not the file that {path} was trained on: its SHA-256 differs")
    return load(path, program=program, device=device)


def say(text: str) -> None:
    """A line for the user on standard error, where it disturbs no JSON."""
    print(text, file=sys.stderr)
