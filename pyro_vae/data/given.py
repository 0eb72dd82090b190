"""What users hand over, as what the library works with: a :class:`~pyro_vae.data.Data`, a tensor, or a torch Dataset."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyro_vae.data.columned import of_record
from pyro_vae.data.data import Data
from pyro_vae.data.load import load_data
from pyro_vae.data.record import Record, record_of
from pyro_vae.data.splits import fixed_permutation
from pyro_vae.errors import UserError
from pyro_vae.tensors import tensor_of

TAKEN = "a data set of load_data, a path, a tensor or array (N, *event), a DataFrame, a sparse matrix, (x, y), or a torch Dataset"


def given(data: Any, validation: float | int | None = None) -> Any:
    """What ``fit`` was given, as a :class:`~pyro_vae.data.Data`, a tensor (N, *event), or a torch Dataset.

    Args:
        data: see :data:`TAKEN`.
        validation: of a tensor, how many rows, or which share of them, are held back.

    Raises:
        UserError: something else; labels that do not fit; a share that leaves nothing.
    """
    if isinstance(data, str | os.PathLike):
        data = load_data(data)
    if isinstance(data, DataLoader):
        data = data.dataset
    y = None
    if isinstance(data, tuple) and len(data) == 2:
        data, y = data[0], tensor_of(data[1], "y")
    data = of_record(data) if isinstance(data, Record) else tensor_of(data)
    if isinstance(data, Tensor):
        if y is None and validation is None:
            return data
        return split_tensor(data, y, 0 if validation is None else validation)
    if validation is not None:
        raise UserError(
            "validation is for a tensor or array, whose rows have no splits: give load_data(..., validation=) else"
        )
    if y is not None or not isinstance(data, Data | Dataset):
        raise UserError(f"expected {TAKEN}; got {type(data).__name__}")
    return data


def split_tensor(x: Tensor, y: Any, validation: float | int) -> Data:
    """A tensor as a data set: rows held back by a fixed permutation, and no test split."""
    n = len(x)
    if y is not None and (not isinstance(y, Tensor) or y.dim() < 1 or len(y) != n):
        got = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise UserError(f"expected (x, y) of as many rows, got {n} rows of x and y of {got}")
    share = validation * n if isinstance(validation, float) else validation
    size = round(share)
    if isinstance(validation, bool) or not 0 <= size < n or (isinstance(validation, float) and not 0 <= validation < 1):
        raise UserError(f"validation = {validation}: expected a share in [0, 1), or fewer rows than the {n} there are")
    order = fixed_permutation(n)
    rows = {"train": order[size:].sort().values, "validation": order[:size].sort().values, "test": order[:0]}
    x, y = x.detach().cpu(), None if y is None else y.detach().cpu()
    train, held, test = (x[index] for index in rows.values())
    labels = {split: None if y is None else y[index] for split, index in rows.items()}
    return Data("a tensor", train, held, test, levels=None, labels=labels, rows=dict(rows))


def as_data(data: Any) -> Data:
    """What a program was trained on as a data set that can be evaluated.

    Where there is no test split, those held back for validation stand for it, or else the rows that trained.

    Raises:
        UserError: something that is no data.
    """
    data = given(record_of(data))
    if isinstance(data, Data):
        held = next(split for split in ("test", "validation", "train") if len(data.stored(split)))
        labels = {**data.labels, "test": data.labels.get(held)}
        return data if held == "test" else replace(data, test=data.stored(held), labels=labels)
    y = None
    if isinstance(data, Dataset):
        items = [data[i] for i in range(len(data))]  # type: ignore[arg-type]
        pairs = [
            (i["x"], i.get("y")) if isinstance(i, dict) else i if isinstance(i, tuple | list) else (i,) for i in items
        ]
        conditions = [p[1] for p in pairs if len(p) > 1 and p[1] is not None]
        data = torch.stack([torch.as_tensor(p[0]) for p in pairs])
        y = torch.stack([torch.as_tensor(c) for c in conditions]) if len(conditions) == len(pairs) else None
    empty = data[:0]
    split_y = {"train": y, "validation": None if y is None else y[:0], "test": y}
    return Data(name="the data given", train=data, validation=empty, test=data, levels=None, labels=split_y)
