"""Run notebooks and keep their pictures: ``python notebooks/execute.py [--check] [NOTEBOOK ...]``.

Each notebook runs in a fresh kernel, in a temporary directory, so that it leaves nothing behind; what it prints to standard error (progress, warnings
with paths) is not kept. With ``--check`` nothing is written.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs; raises ``nbclient.exceptions.CellExecutionError`` where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as scratch:
        client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": scratch}})
        client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata = {}
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            for output in cell.outputs:
                if "text" in output:  # paths of the temporary directory are of this machine and this run
                    output["text"] = output["text"].replace(f"{os.path.realpath(scratch)}/", "")
    return notebook


def main() -> None:
    """Execute the notebooks named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(HERE.glob("*.ipynb")))
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    for path in args.notebooks:
        notebook = execute(path)
        if not args.check:
            nbformat.write(notebook, path)
        print(path.name)


if __name__ == "__main__":
    main()
