"""Arrays by name, as archives, MATLAB files and folders hold them: one to be cut, or a split of their own.

A name says what an array is, and of which split, in any of the ways in which data are published: ``x_train`` and ``y_test``
(Keras), ``train_images`` and ``val_labels`` (MedMNIST, Caltech-101 silhouettes), ``data`` and ``testdata``, ``target`` and
``testtarget`` (OMNIGLOT), ``train`` and ``test``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from pyro_vae.data.arrays import from_array
from pyro_vae.data.record import Record, flattened
from pyro_vae.data.rows import cut
from pyro_vae.data.splits import Filed
from pyro_vae.errors import UserError, warn

DATA_KEYS = ("x", "data", "images", "image", "inputs", "features")
LABEL_KEYS = ("y", "labels", "label", "targets", "target", "classes")
SPLIT_WORDS = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "dev": "validation", "test": "test", "testing": "test",
}  # fmt: skip

Keys = dict[tuple[str, str], str]


def split_keys(names: Sequence[str]) -> Keys:
    """(``x`` or ``y``, split) -> the array's name, in an archive with a split of its own; empty for any other.

    >>> split_keys(["x_train", "y_train", "x_test", "y_test"])[("x", "test")], split_keys(["x_train", "other"])
    ('x_test', {})
    """
    kinds = {**dict.fromkeys(DATA_KEYS, "x"), **dict.fromkeys(LABEL_KEYS, "y")}
    words, splits = ("|".join(sorted(keys, key=len, reverse=True)) for keys in (kinds, SPLIT_WORDS))
    found: Keys = {}
    for name in names:
        match = re.fullmatch(f"({words})?[_. -]?({splits})|({splits})[_. -]?({words})", name.lower())
        if match:
            kind, word = match[1] or match[4] or "x", match[2] or match[3]
            found.setdefault((kinds[kind], SPLIT_WORDS[word]), name)
    for kind in ("x", "y"):  # data beside testdata are those to train on
        plain = next((name for name in names if kinds.get(name.lower()) == kind), None)
        if plain is not None and (kind, "test") in found:
            found.setdefault((kind, "train"), plain)
    return found if {("x", "train"), ("x", "test")} <= set(found) else {}


def filed(
    what: str, name: str, names: Sequence[str], get: Callable[[str], np.ndarray], require: Callable[[list[str]], None]
) -> Filed:
    """The data among arrays by name.

    Args:
        what: the file or folder, for errors.
        name: of the data.
        names: of the arrays.
        get: reads one.
        require: told which ones will be read, before any is.

    Raises:
        UserError: no array that is data, or splits that do not fit together.
    """
    masks = {n + "_present" for n in names} & set(names)
    keys = {} if masks else split_keys(names)
    if keys:
        require(list(keys.values()))
        return _own_split(what, name, keys, get)
    labels = next((n for key in LABEL_KEYS for n in names if n.lower() == key), None)
    others = [n for n in names if n != labels]
    key = next((n for key in DATA_KEYS for n in others if n.lower() == key), others[0] if len(others) == 1 else None)
    if masks or (key is None and len(names) > 1):
        require(list(names))
        return _record(what, name, {n: get(n) for n in names})
    if key is None:
        raise UserError(
            f"{what} holds the arrays {', '.join(names) or 'none'}: expected one named x, data or images, or a single array, or "
            "x_train and x_test for a split of their own; save it with np.savez(path, x=...)"
        )
    if left := [n for n in others if n != key]:
        warn(
            f"{what}: {', '.join(left)} is left out, beside {key} and its labels: to read all as columns, say of one what is "
            f"present, {left[0]}_present",
            UserWarning,
        )
    require([n for n in (key, labels) if n is not None])
    x, y = get(key), None if labels is None else get(labels)
    if (
        y is not None and x.ndim > 1 and _count(y) == x.shape[-1] != len(x)
    ):  # a datum in each column, as MATLAB has them
        x, y = _last_axis_first(x), _last_axis_first(y) if y.shape[-1] == x.shape[-1] else y
    return from_array(name, x, y)


def _record(what: str, name: str, arrays: dict[str, np.ndarray]) -> Filed:
    """Columns by name, and of each what ``NAME_present`` says is there."""
    if len({len(a) if a.ndim else None for a in arrays.values()}) > 1:
        shapes = ", ".join(f"{n} {a.shape}" for n, a in arrays.items())
        raise UserError(
            f"{what} holds the arrays {shapes}: expected one named x, data or images, or columns of as many rows each"
        )
    masks = {n: arrays.pop(n + "_present") for n in list(arrays) if n + "_present" in arrays}
    images, levels, binarization = [n for n, a in arrays.items() if a.dtype == np.uint8 and a.ndim > 2], None, "none"
    if len(images) > 1 or masks.keys() & set(images):
        raise UserError(
            f"{what}: of a record one column of grey levels is read, without missing rows, and {', '.join(images)} hold bytes: "
            "save them as floats"
        )
    if images:
        grey = from_array(name, arrays.pop(images[0]))
        levels, binarization = grey.levels, grey.binarization
        arrays = {images[0]: grey.x[:].float().numpy(), **arrays}
    record = Record(arrays, masks, nan_is_missing=True)
    said = Record({n: np.nan_to_num(a) for n, a in arrays.items()}, masks)
    columns, flat = flattened(record)
    unsaid = tuple(n for n in record if not torch.equal(record.present[n], said.present[n]))
    return Filed(name, flat, levels, binarization=binarization, columns=columns, unsaid=unsaid)


def _own_split(what: str, name: str, keys: Keys, get: Callable[[str], np.ndarray]) -> Filed:
    """Train and validation as filed, and the test split; labels where every split has them."""
    splits = [split for split in ("train", "validation", "test") if ("x", split) in keys]
    labelled = all(("y", split) in keys for split in splits)
    parts = [get(keys["x", split]) for split in splits]
    y = [get(keys["y", split]) for split in splits] if labelled else []
    if len({p.shape[1:] for p in parts}) > 1 and len({p.shape[:-1] for p in parts}) == 1:  # a datum in each column
        y = [_last_axis_first(a) if a.shape[-1] == p.shape[-1] else a for a, p in zip(y, parts, strict=False)]
        parts = [_last_axis_first(p) for p in parts]
    shapes = {(part.dtype, part.shape[1:]) for part in parts}
    if len(shapes) > 1 or any(part.ndim < 2 for part in parts):
        each = ", ".join(f"{keys['x', s]} {p.dtype} {p.shape}" for s, p in zip(splits, parts, strict=True))
        raise UserError(f"{what} holds {each}: expected (N, *event) of one dtype and event shape; save them alike")
    y = [a.reshape(-1) if a.shape == (1, len(p)) else a for a, p in zip(y, parts, strict=False)]  # MATLAB's vectors
    for split, part, label in zip(splits, parts, y, strict=False):
        if len(label) != len(part):
            raise UserError(
                f"{what} has {len(part)} rows in {keys['x', split]} and {len(label)} labels in {keys['y', split]}: "
                "expected as many; save both again"
            )
    whole = from_array(name, np.concatenate(parts), np.concatenate(y) if labelled else None)
    test = len(whole.x) - len(parts[-1])
    return replace(
        whole,
        x=cut(whole.x, 0, test),
        test=cut(whole.x, test, len(whole.x)),
        labels=None if whole.labels is None else whole.labels[:test],
        test_labels=None if whole.labels is None else whole.labels[test:],
        validation=len(parts[1]) if len(parts) == 3 else None,
    )


def _count(y: np.ndarray) -> int:
    return max(y.shape, default=0)


def _last_axis_first(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(a, -1, 0))
