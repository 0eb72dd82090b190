"""A user's own .npy and .npz files."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vae import memory
from pyro_vae.data.arrays import from_array
from pyro_vae.data.splits import Filed
from pyro_vae.errors import UserError

DATA_KEYS = ("x", "data", "images")
LABEL_KEYS = ("y", "labels")


def load(path: Path) -> Filed:
    """The array of a .npy file, memory-mapped where it is large, or of a .npz file, with its labels if it has any.

    A .npz file gives the array named x, data or images, or its only array, and labels named y or labels. Nothing is
    unpickled.

    Raises:
        UserError: the file is missing, damaged, or holds no such array.
    """
    if not path.is_file():
        raise UserError(f"there is no file {str(path)!r}: check the path")
    return READERS[path.suffix.lower()](path)


def _npy(path: Path) -> Filed:
    if zipfile.is_zipfile(path):
        raise UserError(f"{str(path)!r} is a .npz archive by its content: rename it to end in .npz")
    try:
        # Read-only: the system would refuse a map that may be written to, were it larger than the memory of the machine.
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # NumPy fails in as many ways as a file can be broken
        raise _unreadable(path, error) from error
    return from_array(path.name, array)


def _npz(path: Path) -> Filed:
    try:
        # NumPy leaves a broken file open when it is given the path.
        with path.open("rb") as file:
            x, y = _arrays(path, np.load(file, allow_pickle=False))
    except UserError:
        raise
    except Exception as error:  # as above, and in those of the archive's and the compression's
        raise _unreadable(path, error) from error
    return from_array(path.name, x, y)


def _arrays(path: Path, archive: Any) -> tuple[np.ndarray, np.ndarray | None]:
    if isinstance(archive, np.ndarray):
        return archive, None
    with archive:
        names = list(archive.files)
        labels = next((key for key in LABEL_KEYS if key in names), None)
        others = [name for name in names if name != labels]
        key = next((key for key in DATA_KEYS if key in names), others[0] if len(others) == 1 else None)
        if key is None:
            raise UserError(
                f"{str(path)!r} holds the arrays {', '.join(names) or 'none'}: expected one named "
                f"{', '.join(DATA_KEYS)}, or a single array; save it with np.savez(path, x=...)"
            )
        unpacked = {info.filename: info.file_size for info in archive.zip.infolist()}
        needed = sum(unpacked.get(name, unpacked.get(f"{name}.npy", 0)) for name in (key, labels) if name is not None)
        memory.require(needed, f"{str(path)!r}, unpacked,")
        return np.asarray(archive[key]), None if labels is None else np.asarray(archive[labels])


def _unreadable(path: Path, error: BaseException) -> UserError:
    if "pickle" in str(error) or "Python objects" in str(error):
        why = "it holds Python objects or is no NumPy file, and nothing is unpickled"
    else:
        why = f"it is damaged ({' '.join(str(error).split())[:160] or type(error).__name__})"
    return UserError(f"cannot read {str(path)!r}: {why}; save a plain numeric array with np.save or np.savez")


READERS: dict[str, Callable[[Path], Filed]] = {".npy": _npy, ".npz": _npz}
