"""A whole Pyro program in a Python file, for what blocks cannot express.

The file defines ``program(event_shape)``, which returns a Program for data ``(N, *event_shape)``; further arguments of it, with
defaults, are what ``--set`` sets. It is run when the user names it, and never from a run directory, which records the file's
SHA-256 and that of its syntax: a comment, a docstring or a blank line more make no other program.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pyro_vae.declared import find
from pyro_vae.errors import UserError, nearest
from pyro_vae.programs.contract import require_program
from pyro_vae.seeding import derive_seed, seeded


def load_program(
    source: str | Path,
    event_shape: tuple[int, ...],
    *,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    recorded: Mapping[str, Any] | None = None,
    trust: bool = False,
) -> Any:
    """Run a declared ``.py`` model, or a file of yours, and build its program.

    Args:
        source: a declared name, or a path that ends in ``.py``.
        event_shape: of one datum.
        seed: of the initial weights; torch's generators are put back.
        settings: keyword arguments of ``program``; of a run those that it recorded.
        recorded: what a run says of the file that it was trained on; another is refused before a line of it runs.
        trust: whether to take another all the same: its weights must then fit by name and shape.

    Returns:
        The Program; ``program.source`` says which file it came from, for the run's record.
    """
    path = find("models", source)
    if path.suffix != ".py":
        raise UserError(f"{path} is no Python file: expected one that defines program(event_shape)")
    origin: dict[str, Any] = {"file": str(path), **fingerprint(path)}
    if recorded is not None:
        settings = recorded.get("settings", {})
        if not isinstance(settings, Mapping):
            raise UserError(
                f"the run's program.settings = {settings!r}: expected a table of arguments; restore its spec.toml"
            )
        if not (trust or is_recorded(path, recorded)):
            raise UserError(
                f"{path} is not the file that the run was trained on: more than comments differs; name the one that was, or say "
                "--trust-program to let this one have its weights"
            )
        origin |= {key: recorded[key] for key in ("file", "sha256", "syntax") if key in recorded}
    make = _factory(path)
    chosen = _held(path, make, dict(settings or {}))
    with seeded(derive_seed("initial weights", seed)):
        program = make(tuple(event_shape), **chosen)
    require_program(program)
    program.source = {**origin, "settings": chosen} if chosen else origin
    return program


def options(source: str | Path) -> dict[str, Any]:
    """The arguments of a file's ``program`` beside the event shape, with their defaults; the file is run."""
    return _options(_factory(find("models", source)))


def fingerprint(path: Path) -> dict[str, str]:
    """SHA-256 of a file, and of its syntax without docstrings and comments."""
    content = path.read_bytes()
    try:
        tree = ast.parse(content, str(path))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path} fails when it is run: {type(error).__name__}: {error}") from None
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    digests = {"sha256": content, "syntax": ast.unparse(tree).encode()}
    return {name: hashlib.sha256(text).hexdigest() for name, text in digests.items()}


def is_recorded(path: Path, recorded: Mapping[str, Any]) -> bool:
    """Whether a file is the one that a run was trained on, as far as Python reads it."""
    return any(digest == recorded.get(name) for name, digest in fingerprint(path).items())


def _factory(path: Path) -> Callable[..., Any]:
    try:
        make = runpy.run_path(str(path)).get("program")
    except Exception as error:
        raise UserError(f"{path} fails when it is run: {type(error).__name__}: {error}") from error
    if not callable(make):
        raise UserError(f"{path} defines no program(event_shape)")
    return make


def _options(make: Callable[..., Any]) -> dict[str, Any]:
    beside = list(inspect.signature(make).parameters.values())[1:]
    return {p.name: p.default for p in beside if p.default is not p.empty and p.kind is not p.POSITIONAL_ONLY}


def _held(path: Path, make: Callable[..., Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, held to the names and kinds of the defaults."""
    known = _options(make)
    for key, value in settings.items():
        if key not in known:
            raise UserError(f"program(event_shape) of {path} has no argument {key!r}: {nearest(key, known)}")
        kinds = (int, float) if type(known[key]) is float else (type(known[key]),)
        if known[key] is not None and (not isinstance(value, kinds) or isinstance(value, bool) > (kinds == (bool,))):
            raise UserError(
                f"{path}: {key} = {value!r}: expected {kinds[-1].__name__}, as its default {known[key]!r} is"
            )
        if isinstance(known[key], float):
            settings[key] = float(value)
    return settings
