"""Arrays, tables and lists of numbers as the tensors that they are."""

from __future__ import annotations

import math
import os
import warnings
from typing import Any

from pyro_vae import memory
from pyro_vae.errors import DataError

WIDER = {"uint16": "int32", "uint32": "int64", "uint64": "int64"}  # what torch has few operations for


def tensor_of(x: Any, what: str = "the data") -> Any:
    """Arrays, memory maps, DataFrames, sparse matrices and lists of numbers as a tensor of their values; anything else as it is.

    Raises:
        DataError: something of this kind that holds other things than numbers.
    """
    import torch

    if x is None or isinstance(x, torch.Tensor | str | bytes | os.PathLike):
        return x
    import numpy as np

    if type(x).__module__.partition(".")[0] == "pandas" and hasattr(x, "to_numpy"):
        words = [str(n) for n, d in x.dtypes.items() if getattr(d, "kind", "O") not in "buif"] if x.ndim == 2 else []
        if words:
            raise DataError(
                f"{what}: the columns {', '.join(words[:5])} hold no numbers: leave them out, or encode them"
            )
        x = x.to_numpy()
    elif hasattr(x, "toarray") and hasattr(x, "nnz"):
        memory.require(x.dtype.itemsize * math.prod(x.shape), f"{what}, made dense,")
        x = x.toarray()
    elif hasattr(x, "__array__") or (isinstance(x, list) and x):
        try:
            x = np.asarray(x)
        except ValueError as error:
            raise DataError(f"{what}: the rows of the list are no array: {str(error)[:100]}") from None
    if not isinstance(x, np.ndarray):
        return x
    if x.dtype.kind not in "buif" or x.dtype.itemsize > 8:
        raise DataError(f"{what} hold {x.dtype}: expected numbers of one kind; convert them, or leave columns out")
    dtype = np.dtype(WIDER.get(x.dtype.newbyteorder("=").name, x.dtype.newbyteorder("=")))
    if x.dtype != dtype or any(stride < 0 for stride in x.strides):
        x = np.array(x, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a memory map may not be written to, which nobody does
        return torch.from_numpy(x)
