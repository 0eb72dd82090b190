"""Commands as a user types them, in this process, with what they printed."""

from __future__ import annotations

import shlex

import pytest

from pyro_vae.cli.app import run as command


class Typed:
    """``typed("train digits --out runs/a")``; ``.out`` and ``.err`` hold what was printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, line: str, status: int = 0) -> str:
        self._capsys.readouterr()
        found = command(shlex.split(line))
        self.out, self.err = self._capsys.readouterr()
        assert found == status, f"pyro-vae {line}: status {found}\n{self.out}\n{self.err}"
        return self.out + self.err
