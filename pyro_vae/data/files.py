"""A user's own .npy and .npz files.

An archive gives one array to be cut, or arrays with a split of their own: ``x_train`` and ``x_test``, as Keras files them,
``train_images`` and ``test_images``, as MedMNIST does, with ``val`` (or ``valid``, ``validation``) and labels beside them if
there are any. A sparse matrix of SciPy's is read as the dense array that it stands for.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vae import memory
from pyro_vae.data.arrays import from_array
from pyro_vae.data.rows import cut
from pyro_vae.data.splits import Filed
from pyro_vae.errors import UserError

DATA_KEYS = ("x", "data", "images")
LABEL_KEYS = ("y", "labels")
SPLIT_WORDS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
SPARSE = [
    {"indices", "indptr"},
    {"row", "col"},
    {"coords"},
    {"offsets"},
]  # what scipy.sparse.save_npz writes beside data and shape


def load(path: Path) -> Filed:
    """The array of a .npy file, memory-mapped where it is large, or of a .npz file, with its labels if it has any.

    A .npz file gives the array named x, data or images, or its only array, and labels named y or labels; or arrays with a
    split of their own, or a sparse matrix. Nothing is unpickled.

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
            archive = np.load(file, allow_pickle=False)
            names = [] if isinstance(archive, np.ndarray) else list(archive.files)
            own = split_keys(names)
            if own:
                return _own_split(path, archive, own)
            if is_sparse(names):
                return from_array(path.name, _dense(path))
            x, y = _arrays(path, archive)
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
                f"{', '.join(DATA_KEYS)}, or a single array, or x_train and x_test for a split of their own; save it with "
                "np.savez(path, x=...)"
            )
        _require_memory(path, archive, [name for name in (key, labels) if name is not None])
        return np.asarray(archive[key]), None if labels is None else np.asarray(archive[labels])


def _require_memory(path: Path, archive: Any, keys: list[str]) -> None:
    unpacked = {info.filename: info.file_size for info in archive.zip.infolist()}
    needed = sum(unpacked.get(key, unpacked.get(f"{key}.npy", 0)) for key in keys)
    memory.require(needed, f"{str(path)!r}, unpacked,")


def split_keys(names: list[str]) -> dict[tuple[str, str], str]:
    """(``x`` or ``y``, split) -> the array's name, in an archive with a split of its own; empty for any other.

    >>> split_keys(["x_train", "y_train", "x_test", "y_test"])[("x", "test")], split_keys(["x_train", "other"])
    ('x_test', {})
    """
    kinds = {**dict.fromkeys(DATA_KEYS, "x"), **dict.fromkeys(LABEL_KEYS, "y")}
    words, splits = "|".join(kinds), "|".join(sorted(SPLIT_WORDS, key=len, reverse=True))
    found = {}
    for name in names:
        match = re.fullmatch(f"({words})_({splits})|({splits})_({words})", name.lower())
        if match:
            kind, word = match[1] or match[4], match[2] or match[3]
            found[kinds[kind], SPLIT_WORDS[word]] = name
    return found if {("x", "train"), ("x", "test")} <= set(found) else {}


def _own_split(path: Path, archive: Any, keys: dict[tuple[str, str], str]) -> Filed:
    """Train and validation as filed, and the test split; labels where every split has them."""
    splits = [split for split in ("train", "validation", "test") if ("x", split) in keys]
    labelled = all(("y", split) in keys for split in splits)
    with archive:
        _require_memory(path, archive, list(keys.values()))
        parts = [np.asarray(archive[keys["x", split]]) for split in splits]
        y = [np.asarray(archive[keys["y", split]]) for split in splits] if labelled else []
    shapes = {(part.dtype, part.shape[1:]) for part in parts}
    if len(shapes) > 1 or any(part.ndim < 2 for part in parts):
        each = ", ".join(f"{keys['x', s]} {p.dtype} {p.shape}" for s, p in zip(splits, parts, strict=True))
        raise UserError(
            f"{str(path)!r} holds {each}: expected (N, *event) of one dtype and event shape; save them alike"
        )
    for split, part, label in zip(splits, parts, y, strict=False):
        if len(label) != len(part):
            raise UserError(
                f"{str(path)!r} has {len(part)} rows in {keys['x', split]} and {len(label)} labels in {keys['y', split]}: "
                "expected as many; save both again"
            )
    whole = from_array(path.name, np.concatenate(parts), np.concatenate(y) if labelled else None)
    test = len(whole.x) - len(parts[-1])
    return replace(
        whole,
        x=cut(whole.x, 0, test),
        test=cut(whole.x, test, len(whole.x)),
        labels=None if whole.labels is None else whole.labels[:test],
        test_labels=None if whole.labels is None else whole.labels[test:],
        validation=len(parts[1]) if len(parts) == 3 else None,
    )


def is_sparse(names: list[str]) -> bool:
    """Whether an archive holds a sparse matrix of SciPy's."""
    return {"format", "shape", "data"} <= set(names) and any(keys <= set(names) for keys in SPARSE)


def _dense(path: Path) -> np.ndarray:
    """The matrix that a sparse one stands for, in floats unless it holds zeros and ones alone: counts are no grey levels."""
    from scipy import sparse

    matrix = sparse.load_npz(path)
    memory.require(4 * math.prod(matrix.shape), f"{str(path)!r}, made dense,")
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


READERS: dict[str, Callable[[Path], Filed]] = {".npy": _npy, ".npz": _npz}
