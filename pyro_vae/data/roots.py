"""Where data sets lie."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from pyro_vae.errors import UserError
from pyro_vae.paths import expanded

VARIABLE = "PYRO_VAE_DATA"

_downloads: ContextVar[bool] = ContextVar("downloads", default=True)


@contextmanager
def no_downloads() -> Iterator[None]:
    """Find data sets and never fetch them: the folder comes from a file that somebody else wrote."""
    token = _downloads.set(False)
    try:
        yield
    finally:
        _downloads.reset(token)


def may_download() -> bool:
    """Whether a data set that is missing may be fetched."""
    return _downloads.get()


def data_root(root: str | os.PathLike[str] | None) -> Path:
    """The folder given, else the one that the environment variable names, else ``~/.cache/pyro_vae``."""
    chosen = root if root is not None else os.environ.get(VARIABLE) or Path("~") / ".cache" / "pyro_vae"
    return expanded(chosen)


def missing(name: str, root: Path, files: list[str], origin: str) -> UserError:
    """The error that says which files of a data set to put where."""
    return UserError(
        f"data set {name!r} is not in {str(root)!r}: put {', '.join(files)} there (from {origin}), or say where the "
        f"data lie by --data-root, root= or {VARIABLE}"
    )


def damaged(name: str, path: Path, why: object) -> UserError:
    """The error for a data set's file that does not hold what it should."""
    return UserError(f"{str(path)!r} does not hold {name}: {why}; fetch the file again")
