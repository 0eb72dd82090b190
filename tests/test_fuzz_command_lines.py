"""Any command line, over good and bad runs, on disks and outputs that take no more: an answer, or an error of one line.

What is never seen is exit status 1, a traceback, or the words "fault of pyro-vae".
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import commands
import fuzzing
import pytest
from hypothesis import strategies as st
from test_fuzz import MEMORY, broken_runs, cases, fuzz, ground, lay

from pyro_vae import memory
from pyro_vae.cli.app import run as command

STATUS: Counter[int] = Counter()

__all__ = ["ground", "lay"]  # fixtures


class Taken(io.StringIO):
    """A stream that takes nothing."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def lines_and_places(number: int) -> st.SearchStrategy[Any]:
    """A source of command lines, what is broken in the run, and what in its surroundings."""
    surroundings = ["none"] * 9 + [
        "full disk",
        "read-only",
        "full output",
        "closed output",
        "no output",
        "no error output",
    ]
    return st.tuples(st.randoms(use_true_random=True), broken_runs, st.sampled_from(surroundings))


def laid_out(case: tuple[Random, Any, str], lay: Callable[[], Path], ground: Path) -> tuple[list[str], Path]:
    """The command line of a case, and the run directory that it is about."""
    random, broken, _ = case
    path = lay()
    places = {"RUN": path, "FOLDER": path.parent / "f", "FILE": path.parent / "file", "MISSING": path.parent / "missing",
              "LONG": path.parent / ("l" * 300), "DATA": ground / "outside" / "x.npy"}  # fmt: skip
    places["FOLDER"].mkdir()
    places["FILE"].write_text(random.choice(["", "x = [", "import nothing", "\0"]))
    shutil.copytree(ground / "whole", path.parent / "other")
    if random.random() < 0.2:
        broken[1](path / broken[0])
    elif (change := fuzzing.folder_state(random)) is not None:
        change(path)
    line = []
    for word in fuzzing.command_line(random):
        head, slash, rest = word.partition("/")
        stem, dot, suffix = head.partition(".")
        place = {**places, "OTHER": path.parent / "other"}.get(stem)
        line.append(word if place is None else f"{place}{dot}{suffix}{slash}{rest}")
    return line, path


@cases(12, 300)
def test_command_lines(number: int, ground: Path, lay: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Any command over any run, onto any disk: status 0 or 2, and never a fault of ours."""
    monkeypatch.setattr(memory, "available", lambda: MEMORY)
    monkeypatch.chdir(ground)

    def check(case: tuple[Random, Any, str]) -> None:
        line, _ = laid_out(case, lay, ground)
        out: Any = {"full output": Taken(), "no output": None}.get(case[2], io.StringIO())
        if case[2] == "closed output":
            out.close()
        err: Any = None if case[2] == "no error output" else io.StringIO()
        number = {"full disk": errno.ENOSPC, "read-only": errno.EROFS}.get(case[2])
        with fuzzing.guarded(ground / "outside"), warnings.catch_warnings(), monkeypatch.context() as patch:
            warnings.simplefilter("ignore")
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            if number is not None:
                fuzzing.no_room(patch, number)
            status = command(line)
        said = "" if err is None else err.getvalue()
        STATUS[status] += 1
        assert status in (0, 2), (line, case[2], said)
        assert "Traceback" not in said
        assert "fault of pyro-vae" not in said
        if status == 2 and err is not None:
            assert sum(text.startswith("error: ") for text in said.splitlines()) == 1, (line, said)

    fuzz(number, lines_and_places(number), check, "command lines")
    if number >= 300:  # neither all good nor all bad
        assert min(STATUS[0], STATUS[2]) >= number / 6, STATUS


@cases(1, 20)
def test_command_lines_as_processes(number: int, ground: Path, lay: Callable[[], Path]) -> None:
    """The same by processes, whose outputs are closed or full indeed, and whose files may not grow."""
    preludes = {
        "full output": "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)",
        "closed output": "import os, sys; os.close(1); sys.stdout = None",
        "no output": "import os, sys; os.close(1); sys.stdout = None",
        "no error output": "import os, sys; os.close(2); sys.stderr = None",
        "full disk": "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))",
    }

    def check(case: tuple[Random, Any, str]) -> None:
        line, path = laid_out(case, lay, ground)
        if case[2] == "read-only" and path.is_dir():
            path.chmod(0o555)
        before = fuzzing.listing(ground / "outside")
        status, _, err = commands.start(*line, prelude=preludes.get(case[2], "")).finish(120)
        if path.is_dir():
            path.chmod(0o755)
        assert status in (0, 2), (line, case[2], err)
        assert "Traceback" not in err
        assert "fault of pyro-vae" not in err
        assert fuzzing.listing(ground / "outside") == before

    fuzz(number, lines_and_places(number), check, "command lines as processes")
