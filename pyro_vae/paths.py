"""Where files may be written: paths as users give them, and the refusal, before any work is done, of those that cannot be."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from pyro_vae.errors import UserError


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with ``~`` and ``~name`` replaced by the home they mean.

    Raises:
        UserError: no path at all, one of a user that there is not, with a zero byte, or whose bytes are no text.
    """
    if not isinstance(path, str | os.PathLike) or isinstance(os.fspath(path), bytes):
        raise UserError(f"expected a path, got {type(path).__name__}")
    text = os.fspath(path)
    if not text:
        raise UserError("expected a path, got an empty one; write . for the folder one is in")
    if "\0" in text:
        raise UserError(f"{text!r} is no path: it has a zero byte in it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"the path {text!a} is no text in UTF-8, and could not be recorded: rename the file") from None
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text!r}: there is no such user; write the whole path, or ./ before such a name") from None


def writable(path: str | os.PathLike[str], suffix: str | tuple[str, ...], kind: str) -> Path:
    """``path``, expanded, if a file of this kind, and with such a suffix, can be written there; else a :class:`UserError`."""
    path = expanded(path)
    suffixes = (suffix,) if isinstance(suffix, str) else suffix
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{kind}: expected a name that ends in {' or '.join(suffixes)}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no directory {str(path.parent)!r}; make it, or choose another")
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        what = "it is a directory" if path.is_dir() else f"the directory {str(path.parent)!r} is not writable"
        raise UserError(f"cannot write {path}: {what}; choose another")
    return path


def writable_folder(path: str | os.PathLike[str], names: tuple[str, ...] = ()) -> Path:
    """``path``, expanded, if files of these names can be written into it, be it there or still to be made; else a UserError."""
    path = expanded(path)
    found = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
    if not found.is_dir():
        raise UserError(f"cannot write into {path}: {str(found)!r} is a file in the way; choose another folder")
    if not os.access(found, os.W_OK | os.X_OK):
        raise UserError(f"cannot write into {path}: the folder {str(found)!r} is not writable; choose another")
    for name in names:
        if (path / name).is_dir():
            raise UserError(f"cannot write {path / name}: it is a directory; remove it, or choose another folder")
    return path


@contextlib.contextmanager
def made(path: Path) -> Iterator[None]:
    """While entered, the folder is there; where it was made and left empty, it goes again."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"cannot write into {path}: {error.strerror or error}; choose another folder") from error
    finally:
        with contextlib.suppress(OSError):
            for folder in new:
                folder.rmdir()


def beside(path: Path, suffix: str) -> Path:
    """A new name for a temporary file in the folder of ``path``."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}{suffix}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to, which takes the place of ``path`` when all went well, and goes when not.

    Raises:
        UserError: the file cannot be written.
    """
    temporary = beside(path, path.suffix)
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # less the umask
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another --out"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
