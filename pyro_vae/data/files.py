"""A user's own files of arrays: .npy, .npz, .mat, and tables of text.

An archive gives one array to be cut, or arrays with a split of their own (:mod:`pyro_vae.data.named`). A sparse matrix of SciPy's
is read as the dense array that it stands for. Nothing is unpickled: to unpickle a file is to run it.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vae import memory
from pyro_vae.data import idx, table
from pyro_vae.data.arrays import from_array
from pyro_vae.data.named import filed
from pyro_vae.data.splits import Filed
from pyro_vae.errors import UserError

SPARSE = [
    {"indices", "indptr"},
    {"row", "col"},
    {"coords"},
    {"offsets"},
]  # what scipy.sparse.save_npz writes beside data and shape
PICKLES = {".pkl", ".pickle", ".p", ".joblib", ".pt", ".pth", ".dill"}


def load(path: Path) -> Filed:
    """The array of a file, memory-mapped where it is a large .npy, with its labels if it has any.

    An archive gives the array named x, data or images, or its only array, and labels named y or labels; or arrays with a
    split of their own, or a sparse matrix.

    Raises:
        UserError: the file is missing, damaged, or holds no such array.
    """
    if not path.is_file():
        raise UserError(f"there is no file {str(path)!r}: check the path")
    if idx.is_idx(path):
        return from_array(path.name, idx.read(path))
    return READERS[path.suffix.lower()](path)


def readable(path: Path) -> bool:
    """Whether a file is of a kind that is read; :class:`UserError` for one that could only be unpickled."""
    if path.suffix.lower() in PICKLES and path.is_file():
        raise UserError(
            f"{str(path)!r} is a pickle, and to unpickle a file is to run what it says, which nothing here does: open it where "
            "you trust it, and save its arrays with np.savez(path, x=..., y=...)"
        )
    return path.suffix.lower() in READERS or idx.is_idx(path)


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
            archive = np.load(file, allow_pickle=False)
            names = [] if isinstance(archive, np.ndarray) else list(archive.files)
            if is_sparse(names):
                return from_array(path.name, _dense(path))
            if isinstance(archive, np.ndarray):
                return from_array(path.name, archive)
            with archive:
                return filed(
                    repr(str(path)), path.name, names, lambda name: np.asarray(archive[name]),
                    lambda keys: _require_memory(path, archive, keys),
                )  # fmt: skip
    except UserError:
        raise
    except Exception as error:  # as above, and in those of the archive's and the compression's
        raise _unreadable(path, error) from error


def _mat(path: Path) -> Filed:
    from scipy import sparse
    from scipy.io import loadmat

    try:
        found = loadmat(path)
    except NotImplementedError as error:
        raise UserError(f"{str(path)!r} is a MATLAB file of version 7.3: save it with save(..., '-v7')") from error
    except Exception as error:  # as above
        raise _unreadable(path, error) from error
    arrays = {
        n: _as_dense(a) if sparse.issparse(a) else np.asarray(a) for n, a in found.items() if not n.startswith("__")
    }
    arrays = {n: a for n, a in arrays.items() if a.dtype.kind in "buif"}  # cells and words are none
    return filed(repr(str(path)), path.name, list(arrays), arrays.__getitem__, lambda _: None)


def _require_memory(path: Path, archive: Any, keys: list[str]) -> None:
    unpacked = {info.filename: info.file_size for info in archive.zip.infolist()}
    needed = sum(unpacked.get(key, unpacked.get(f"{key}.npy", 0)) for key in keys)
    memory.require(needed, f"{str(path)!r}, unpacked,")


def is_sparse(names: list[str]) -> bool:
    """Whether an archive holds a sparse matrix of SciPy's."""
    return {"format", "shape", "data"} <= set(names) and any(keys <= set(names) for keys in SPARSE)


def _dense(path: Path) -> np.ndarray:
    """The matrix that a sparse one stands for, in floats unless it holds zeros and ones alone: counts are no grey levels."""
    from scipy import sparse

    matrix = sparse.load_npz(path)
    memory.require(4 * math.prod(matrix.shape), f"{str(path)!r}, made dense,")
    return _as_dense(matrix)


def _as_dense(matrix: Any) -> np.ndarray:
    if matrix.dtype.kind not in "buif":
        return np.asarray(matrix.toarray())
    dense: np.ndarray = matrix.toarray()
    binary = dense.dtype.kind != "f" and bool(((dense == 0) | (dense == 1)).all())
    return dense if binary else dense.astype(np.float32)


def _unreadable(path: Path, error: BaseException) -> UserError:
    if "pickle" in str(error) or "Python objects" in str(error):
        why = "it holds Python objects or is no NumPy file, and nothing is unpickled"
    else:
        why = f"it is damaged ({' '.join(str(error).split())[:160] or type(error).__name__})"
    return UserError(f"cannot read {str(path)!r}: {why}; save a plain numeric array with np.save or np.savez")


READERS: dict[str, Callable[[Path], Filed]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".mat": _mat,
    ".csv": table.load,
    ".tsv": table.load,
}
