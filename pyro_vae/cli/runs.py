"""What every command on a run begins with."""

from __future__ import annotations

import sys
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_vae.training.run import Run

TRUST: ContextVar[bool] = ContextVar("trust", default=False)  # whether --trust-program was said


def open_run(path: Path, device: str, program_file: str | None = None) -> Run:
    """Load a run; the program of a ``.py`` file is run only when it is named here, and must be the one that was trained."""
    from pyro_vae.training.run import load, read_record

    program = None
    if program_file is not None:
        program = named_program(program_file, path, read_record(path))
    return load(path, program=program, device=device)


def file_of(path: Path, files: list[str]) -> str | None:
    """Which of several ``.py`` files that the user names a run was trained on; the only one where there is one; None of a run
    that was declared.
    """
    from pyro_vae.declared import find
    from pyro_vae.errors import UserError
    from pyro_vae.programs.file import is_recorded
    from pyro_vae.training.run import read_record

    recorded = read_record(path)["program"]
    if "sha256" not in recorded or len(files) < 2:
        return files[0] if files and "sha256" in recorded else None
    for file in files:
        if is_recorded(find("models", file), recorded):
            return file
    raise UserError(
        f"{path} was trained on none of {', '.join(files)}: name the .py file that it was trained on by --model"
    )


def named_program(file: str, path: Path, record: dict[str, Any], seed: int = 0) -> Any:
    """The program of a ``.py`` file that the user names; not run unless it is the one that the run recorded, or is trusted."""
    from pyro_vae.errors import UserError
    from pyro_vae.programs.file import load_program

    recorded = record["program"]
    if not isinstance(recorded.get("sha256"), str):
        raise UserError(f"{path} was not trained on a .py file: leave --model out")
    return load_program(file, tuple(recorded["event_shape"]), seed=seed, recorded=recorded, trust=TRUST.get())


def say(text: str) -> None:
    """A line for the user on standard error, where it disturbs no JSON."""
    print(text, file=sys.stderr)
