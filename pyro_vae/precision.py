"""How numbers are computed with: matrix products in fewer bits, where they are asked for, and no denormal numbers.

Products in fewer bits are faster, and off by an amount that is to be measured. ``full`` is the program's own dtype; ``tf32``
rounds the factors of float32 products to 10 bits of mantissa, on CUDA devices that can; ``bf16`` computes products and
convolutions in bfloat16 (8 bits), densities and sums in the program's dtype.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pyro_vae.errors import UserError, nearest

PRECISIONS = ("full", "tf32", "bf16")


def require_precision(precision: str, device: torch.device, dtype: torch.dtype) -> None:
    """:class:`UserError` for a precision that is unknown, or that this device or dtype does not have."""
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision {precision!r}: {nearest(precision, PRECISIONS)}")
    if precision != "full" and dtype != torch.float32:
        raise UserError(f"the precision {precision!r} is for float32 programs, and this one is {str(dtype)[6:]}")
    if precision == "tf32" and device.type != "cuda":
        raise UserError(f"the precision 'tf32' needs a CUDA device, not {device.type!r}: use bf16, or full")


@contextmanager
def products(precision: str) -> Iterator[None]:
    """While entered, float32 products round as ``tf32`` does, if that is the precision; around what runs, graphs too."""
    if precision != "tf32":
        yield
        return
    flags: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [f.allow_tf32 for f in flags]
    for f in flags:
        f.allow_tf32 = True
    try:
        yield
    finally:
        for f, value in zip(flags, before, strict=True):
            f.allow_tf32 = value


@contextmanager
def casts(precision: str, device: torch.device) -> Iterator[None]:
    """While entered, products are computed in ``bf16``, if that is the precision; inside what a graph records."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
        yield


@contextmanager
def no_denormals() -> Iterator[None]:
    """While entered, numbers below the smallest normal one (1e-38 in float32) are zero on the CPU, in all of torch's threads.

    Processors take up to a hundred times longer over them than over others, and the gradient of a hopeless particle, or of a
    pixel that is nearly certain, makes such numbers of every product that it comes to.
    """
    if sys.float_info.min / 2 == 0:
        yield
        return
    _flush(True)
    try:
        yield
    finally:
        _flush(False)


def _flush(flag: bool) -> None:
    """A setting of a thread, which those that it starts later inherit: those that it has started are told one by one."""
    if sys.is_finalizing():  # other threads can no longer be told, and would be waited for
        return
    torch.set_flush_denormal(flag)
    parallel = _openmp()
    if parallel is not None:

        def tell(_: Any) -> None:
            torch.set_flush_denormal(flag)

        parallel(_BODY(tell), None, torch.get_num_threads(), 0)


_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _openmp() -> Any:
    """What runs a function in every thread of the pool: GNU OpenMP's, where PyTorch brings it."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    return getattr(ctypes.CDLL(str(found[0])), "GOMP_parallel", None) if found else None
