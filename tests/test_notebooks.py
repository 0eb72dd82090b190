"""Every notebook runs from a clean checkout; the first in the fast suite, all of them in the slow one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
FIRST, *OTHERS = sorted(FOLDER.glob("*.ipynb"))
MOST_CELLS = 25


@pytest.mark.parametrize(
    "path", [FIRST, *(pytest.param(p, marks=pytest.mark.slow) for p in OTHERS)], ids=lambda p: p.stem
)
def test_runs(path):
    pytest.importorskip("nbclient", reason="notebooks need pip install .[notebook]")
    done = subprocess.run(
        [sys.executable, str(FOLDER / "execute.py"), "--check", str(path)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("path", [FIRST, *OTHERS], ids=lambda p: p.stem)
def test_is_short_and_committed_with_its_pictures(path):
    nbformat = pytest.importorskip("nbformat", reason="notebooks need pip install .[notebook]")
    notebook = nbformat.read(path, as_version=4)
    assert len(notebook.cells) <= MOST_CELLS
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert not any(o.output_type == "error" or o.get("name") == "stderr" for o in outputs)
