"""Data by name or by path."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pyro_vae.data import digits, files, idx, image_folder, mat, static_mnist, torchvision_sets, toys
from pyro_vae.data.columned import counts_of
from pyro_vae.data.content import Changed, Content, content_of
from pyro_vae.data.data import Data
from pyro_vae.data.names import DATA_SETS, OWN, TOYS, require_known
from pyro_vae.data.preparation import check_preparation
from pyro_vae.data.roots import data_root
from pyro_vae.data.splits import Filed, in_float32, split
from pyro_vae.errors import DataError, UserError, nearest
from pyro_vae.paths import expanded
from pyro_vae.signatures import checked

LOADERS: dict[str, Callable[[Path], Filed]] = {
    "digits": digits.load,
    "mnist": torchvision_sets.mnist,
    "static-mnist": static_mnist.load,
    "fashion-mnist": torchvision_sets.fashion_mnist,
    "kmnist": torchvision_sets.kmnist,
    "omniglot": mat.omniglot,
    "frey-face": mat.frey_face,
    "cifar10": torchvision_sets.cifar10,
}


@checked
def load_data(
    name: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    *,
    binarization: str | None = None,
    dequantization: str = "none",
    validation: int | None = None,
    present: str | None = None,
) -> Data:
    """A data set by name, or a user's own from a .npy, .npz, .mat, .csv or IDX file, or a folder of images or IDX files.

    A name of :data:`~pyro_vae.data.DATA_SETS` always means that data set; write ``./mnist`` for a folder of that
    name. How arrays and folders are read is told in :mod:`pyro_vae.data.arrays` and
    :mod:`pyro_vae.data.image_folder`.

    Args:
        name: a name of :data:`~pyro_vae.data.DATA_SETS`, or a path.
        root: the folder where data sets lie; else the environment variable ``PYRO_VAE_DATA``, else
            ``~/.cache/pyro_vae``. MNIST, its kin and CIFAR-10 are downloaded there when they are missing.
        binarization: none, static, dynamic or threshold; where None, what is usual for the data: dynamic for digits,
            MNIST and its kin and Omniglot, static for binary data, none for the rest and for dequantized data.
        dequantization: none or uniform.
        validation: how many rows validate; 0 trains on all. Where None: 10,000 for MNIST and its kin and
            static-mnist, 5,000 for CIFAR-10, 1,345 for Omniglot, 200 for Frey faces, a tenth of any other.
        present: of which column so many training rows alone are present for programs that read columns, and by which seed:
            ``label=100,seed=1``; as many of each class as can be, and none of the validation split. ``nan`` says that NaN in
            columns of a file are missing.

    Raises:
        UserError: an unknown name, files that are missing or damaged, arrays that are no data, or a preparation that
            the data cannot have.

    Example:
        >>> load_data("moons")
        Data(moons: 8,000 train, 1,000 validation, 1,000 test, shape (2,), floats)
    """
    if not isinstance(name, str | os.PathLike):
        raise UserError(f"data must be a name or a path, not {type(name).__name__}: {nearest('', DATA_SETS)}")
    if name not in DATA_SETS:
        expanded(name)
    return _load(os.fspath(name), root, binarization, dequantization, validation, None, present)


def load_whole(
    name: str | os.PathLike[str], root: str | os.PathLike[str] | None = None, present: str | None = None
) -> Data:
    """All rows of a file or folder, or of a data set that is not filed in splits, in their order, as its ``test``: to be scored.

    One that is filed with a test split gives that. Levels stay as they are stored. Of ``present`` it is ``nan`` that counts.
    """
    filed = _read(os.fspath(name), root)
    _require_said(filed, present)
    x, y = (filed.x, filed.labels) if filed.test is None else (filed.test, filed.test_labels)
    labels = {"train": None, "validation": None, "test": y}
    names: dict[str, Any] = {
        "label_names": filed.label_names,
        "column_names": filed.column_names,
        "columns": filed.columns,
    }
    return Data(filed.name, filed.x[:0], filed.x[:0], x, filed.levels, labels=labels, **names)


def load_again(source: dict[str, Any], recorded: Content, what: str) -> Data:
    """The data set of a run, with exactly the rows that it was trained, validated and tested on.

    Args:
        source: keyword arguments of :func:`load_data`.
        recorded: what the run kept of its data.
        what: names the run in errors.

    Raises:
        UserError: as :func:`load_data`.
        Changed: what is other than when the run was trained.
    """
    arguments: dict[str, Any] = {
        "root": None,
        "binarization": None,
        "dequantization": "none",
        "validation": None,
        "present": None,
        **source,
    }
    name = arguments.pop("name")
    try:
        data = _load(name, **arguments, recorded=recorded)
        recorded.require_same(content_of(data), data.name)
    except Changed as error:
        raise Changed(f"{what}: {error}") from error
    return data


def _load(
    key: str,
    root: str | os.PathLike[str] | None,
    binarization: str | None,
    dequantization: str,
    validation: int | None,
    recorded: Content | None,
    present: str | None = None,
) -> Data:
    source: dict[str, Any] = {"name": key if key in DATA_SETS else str(expanded(key).absolute())}
    if root is not None and key in LOADERS:
        source["root"] = str(data_root(root).absolute())
    source["validation"] = validation
    if present is not None:
        counts_of(present)  # which says what is wrong with it
        source["present"] = present
    filed = _read(key, root)
    _require_said(filed, present)
    if recorded is not None and recorded.form.get("dtype") != "float64" and filed.x.dtype == torch.float64:
        filed = in_float32(filed)  # as runs of 0.1 kept their rows
    if binarization is None:
        binarization = filed.binarization if dequantization == "none" else "none"
    if recorded is None:  # else what changed is the first thing to say
        check_preparation(filed.name, filed.levels, binarization, dequantization)
    return split(filed, validation, source, recorded).with_(binarization=binarization, dequantization=dequantization)


def _require_said(filed: Filed, present: str | None) -> None:
    """:class:`DataError` for NaN in columns that nobody calls missing."""
    if filed.unsaid and (present is None or not counts_of(present).nan):
        raise DataError(
            f"{filed.name}: the column {filed.unsaid[0]!r} has NaN: say that they are missing, present='nan' (--present nan), or "
            f"which entries are there, by an array of booleans {filed.unsaid[0] + '_present'!r}"
        )


def _read(key: str, root: str | os.PathLike[str] | None) -> Filed:
    if key in TOYS:
        return toys.load(key)
    if key in LOADERS:
        return LOADERS[key](data_root(root))
    path = expanded(key)
    if path.is_dir():
        inside = [p for p in (path / "raw", path) if p.is_dir() and any(map(idx.is_idx, p.iterdir()))]
        return idx.load(path, list(inside[0].iterdir())) if inside else image_folder.load(path)
    if files.readable(path):
        return files.load(path)
    if path.is_file():
        raise UserError(f"cannot read {key!r}: the extension {path.suffix!r} is unknown; give {OWN}")
    require_known(key)
    raise UserError(f"{key!r} is no ordinary file or folder: give {OWN}")
