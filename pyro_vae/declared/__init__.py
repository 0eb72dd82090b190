"""Where the declared models and guides lie: beside this file in a wheel, in ``models/`` and ``guides/`` in a checkout."""

from __future__ import annotations

import ast
import contextlib
from pathlib import Path
from typing import Literal

from pyro_vae.errors import UserError, nearest
from pyro_vae.paths import expanded

Kind = Literal["models", "guides"]


def folder(kind: Kind) -> Path:
    """The folder of the declared models or guides."""
    here = Path(__file__).resolve().parent
    installed = here / kind
    return installed if installed.is_dir() else here.parent.parent / kind


def names(kind: Kind) -> list[str]:
    """The declared names, in alphabetical order."""
    return sorted(path.stem for path in folder(kind).iterdir() if path.suffix in (".toml", ".py"))


def find(kind: Kind, source: str | Path) -> Path:
    """The file of a declared name, or of a path that ends in ``.toml`` or ``.py``."""
    path = expanded(source)
    if path.suffix in (".toml", ".py") or len(path.parts) > 1:
        if path.suffix not in (".toml", ".py") or not path.is_file():
            raise UserError(f"no {kind[:-1]} file {str(source)!r}: expected a .toml or .py file that exists")
        return path
    for suffix in (".toml", ".py"):
        declared = folder(kind) / f"{source}{suffix}"
        if declared.is_file():
            return declared
    raise UserError(
        f"unknown {kind[:-1]} {str(source)!r}: {nearest(str(source), names(kind))} (or give the path of a .toml file)"
    )


def heading(path: Path) -> str:
    """What a declared file says of itself, in a line: its mathematics and reference, the comment that it begins with.

    Of a ``.py`` file the first paragraph of its docstring, or else of its ``program``'s, or else of a class's.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        with contextlib.suppress(SyntaxError, ValueError):
            tree = ast.parse(text)
            named = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "program"]
            classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
            nodes: tuple[ast.Module | ast.FunctionDef | ast.ClassDef, ...] = (tree, *named, *classes)
            for node in nodes:
                if found := ast.get_docstring(node):
                    return " ".join(found.partition("\n\n")[0].split())
    for line in text.splitlines():
        said = line.strip().lstrip("#").strip()
        if said and (path.suffix != ".py" or line.lstrip().startswith("#")):
            return said
    return ""
