"""Every notebook runs from a clean checkout; in the fast suite the cells of the first, with training cut short."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import pyro_vae as pv

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
FIRST, *OTHERS = sorted(FOLDER.glob("*.ipynb"))
README = FOLDER.parent / "README.md"
FEWER_CELLS_THAN = 25
MOST_BYTES = 600_000
# what a traceback, a warning or a repr tells of the machine that ran it
PLACES = re.compile(r"site-packages|ipykernel_\d|(?<![\w.:/])/(?:home|root|tmp|usr|opt|Users|work)/")


def test_the_cells_of_the_first_run(monkeypatch):
    fit, estimate = pv.fit, pv.log_likelihood
    monkeypatch.setattr(pv, "fit", lambda *args, **how: fit(*args, **{**how, "epochs": 2}))
    monkeypatch.setattr(pv, "log_likelihood", lambda *args, **how: estimate(*args, **{**how, "num_samples": 30}))
    cells = [cell["source"] for cell in json.loads(FIRST.read_text())["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a guide that is hardly trained
        for lines in cells:
            exec("".join(line for line in lines if not line.startswith("%")), names)
    assert names["run"].metrics


@pytest.mark.slow
@pytest.mark.parametrize("path", [FIRST, *OTHERS], ids=lambda p: p.stem)
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
    assert len(notebook.cells) < FEWER_CELLS_THAN
    assert path.stat().st_size < MOST_BYTES
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert not any(o.output_type == "error" or o.get("name") == "stderr" for o in outputs)
    texts = [o.get("text", "") + str({k: v for k, v in o.get("data", {}).items() if k != "image/png"}) for o in outputs]
    assert not [found for t in texts if (found := PLACES.search(t))]


def test_the_readme_lists_every_notebook():
    missing = [p.name for p in (FIRST, *OTHERS) if f"notebooks/{p.name}" not in README.read_text()]
    assert not missing
