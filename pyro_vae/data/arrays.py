"""A user's own array: which arrays are data, and how they are stored.

==================================  =============================  =======
array                               stored                         levels
==================================  =============================  =======
bool; integers that are all 0 or 1  uint8                          2
uint8                               as it is                       256
other integers, all in 0 ... 255    uint8                          256
float16, float32                    float32, values as they are    None
float64                             float64, values as they are    None
==================================  =============================  =======

Grey levels that are all below 32 get a warning: an image that goes to 15 of 255 is nearly black.
Levels of shape (N, H, W) become (N, 1, H, W). Levels of shape (N, H, W, C), with C of 1, 3 or 4 and smaller than H
and W, become (N, C, H, W). Floats keep their shape, whatever it is.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.rows import RowView
from pyro_vae.data.splits import Filed
from pyro_vae.errors import UserError, warn

IN_MEMORY_BYTES = 256 * 2**20
"""Memory-mapped arrays above this size stay on the disk."""

CHUNK_VALUES = 2**22
DARKEST = 32  # grey levels of an image go above this


def from_array(name: str, x: np.ndarray, y: np.ndarray | None = None) -> Filed:
    """Check an array and its labels, and say how they are stored.

    Args:
        name: how errors and :class:`~pyro_vae.data.Data` name it.
        x: ``(N, *event)``, in memory or memory-mapped.
        y: ``(N, ...)`` numbers, or None.

    Raises:
        UserError: a kind, shape, size or value that is no data; one line that says what to do.
    """
    if x.dtype.kind not in "buif":
        raise UserError(f"{name} holds {x.dtype}: expected uint8, bool, integers or floats; convert it to one of them")
    if x.ndim < 2:
        raise UserError(
            f"{name} has shape {x.shape}: expected (N, *event) with one row per datum; "
            "reshape it, to (N, 1) if a datum is one number"
        )
    if x.size == 0:
        raise UserError(f"{name} has shape {x.shape}: expected an array that is not empty; check how it was saved")
    levels = _levels(name, x)
    event_shape, channels_last = _layout(x.shape[1:], levels)
    dtype = torch.uint8 if levels is not None else torch.float32 if x.dtype.itemsize < 8 else torch.float64
    view = RowView(x, None, dtype, event_shape, channels_last)
    large = isinstance(x, np.memmap) and x.nbytes > IN_MEMORY_BYTES
    with np.errstate(over="ignore", under="ignore"):
        rows = view if large else view[:]
    return Filed(
        name=name,
        x=rows,
        levels=levels,
        labels=None if y is None else _labels(name, y, len(x)),
        binarization="static" if levels == 2 else "none",
    )


def _levels(name: str, x: np.ndarray) -> int | None:
    if x.dtype == np.bool_:
        return 2
    if x.dtype.kind == "f":
        return None
    if x.dtype == np.uint8:
        return levels_up_to(name, _highest(x))
    low = min(int(part.min()) for _, part in _chunks(x))
    high = max(int(part.max()) for _, part in _chunks(x))
    if low < 0 or high > 255:
        raise UserError(
            f"{name} holds {x.dtype} from {low} to {high}: whole numbers are read as grey levels from "
            "0 to 255; rescale it to these, or save counts and measurements as float32"
        )
    return levels_up_to(name, high)


def levels_up_to(name: str, high: int) -> int:
    """How many levels whole numbers from 0 to ``high`` have: 2 for zeros and ones, else 256, warned of where that is dark."""
    if 1 < high < DARKEST:
        warn(
            f"{name} holds whole numbers up to {high}, and grey levels go to 255: its images are nearly black; multiply them by "
            f"{255 // high}, or save counts and class numbers as float32",
            UserWarning,
        )
    return 2 if high <= 1 else 256


def _highest(x: np.ndarray) -> int:
    """The highest value, or one that is known to be bright: a large file is not read to its end."""
    high = 0
    for _, part in _chunks(x):
        high = max(high, int(part.max()))
        if high >= DARKEST:
            break
    return high


def _chunks(x: np.ndarray) -> list[tuple[int, np.ndarray]]:
    rows = max(1, CHUNK_VALUES * len(x) // x.size)
    return [(start, x[start : start + rows]) for start in range(0, len(x), rows)]


def _layout(event: tuple[int, ...], levels: int | None) -> tuple[tuple[int, ...], bool]:
    if levels is not None and len(event) == 2:
        return (1, *event), False
    if levels is not None and len(event) == 3 and event[2] in (1, 3, 4) and event[2] < min(event[:2]):
        return (event[2], *event[:2]), True
    return event, False


def _labels(name: str, y: np.ndarray, n: int) -> Tensor:
    """Whole numbers and flags in one column as int64, anything else of n rows in the dtype that it has."""
    if y.shape in ((n, 1), (1, n)):  # one column, as MedMNIST files them, or one line, as MATLAB does
        y = y.reshape(n)
    if len(y.shape) != 0 and len(y) != n:
        raise UserError(f"{name} has {n} rows and {len(y)} labels: expected as many labels as rows; save both again")
    if y.dtype.kind == "u" and y.size and int(y.max()) > np.iinfo(np.int64).max:
        raise UserError(f"the labels of {name} reach {int(y.max())}: expected class numbers that int64 holds; relabel")
    if not y.shape or y.dtype.kind not in "buif" or y.dtype.itemsize > 8:
        raise UserError(
            f"the labels of {name} are {y.dtype} of shape {y.shape}: expected numbers, a row of them for each of the {n} rows"
        )
    if y.dtype.kind in "bui" and y.ndim == 1:
        return torch.from_numpy(y.astype(np.int64))
    kept = np.int64 if y.dtype.kind == "u" and y.dtype.itemsize > 1 else y.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(y, dtype=kept))
