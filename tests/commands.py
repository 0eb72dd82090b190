"""The command line in processes of its own, for tests that kill, starve and interrupt it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "pyro_vae.cli"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(*arguments: str, prelude: str = "", **how: Any) -> subprocess.Popen[str]:
    """Start ``pyro-vae *arguments``; ``prelude`` is Python that runs first in its process."""
    command = [*COMMAND, *arguments]
    if prelude:
        command = [sys.executable, "-c", f"{prelude}\nfrom pyro_vae.cli import main\nmain({list(arguments)!r})"]
    how = {"env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **how}
    return subprocess.Popen(command, **how)


def finish(process: subprocess.Popen[str], timeout: float = 300) -> tuple[int, str, str]:
    """Wait for its end: exit status, standard output and standard error."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def run(*arguments: str, **how: Any) -> tuple[int, str, str]:
    """``pyro-vae *arguments`` from start to end."""
    return finish(start(*arguments, **how))


def metrics(run_path: Path) -> list[dict[str, Any]]:
    """The metrics of a run but for the clock's."""
    lines = (run_path / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def require_same(run_path: Path, other: Path) -> None:
    """The final weights, to the bit, and the metrics of two runs; no temporary file in the first."""
    assert metrics(run_path) == metrics(other)
    assert (run_path / "weights.safetensors").read_bytes() == (other / "weights.safetensors").read_bytes()
    left = {p.name for p in run_path.iterdir()} - {p.name for p in other.iterdir()}
    assert not left, f"left behind: {left}"
