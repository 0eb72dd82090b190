"""Matrix products in fewer bits, where they are asked for: faster, and off by an amount that is to be measured.

``full`` is the program's own dtype; ``tf32`` rounds the factors of float32 products to 10 bits of mantissa, on CUDA devices that
can; ``bf16`` computes products and convolutions in bfloat16 (8 bits), densities and sums in the program's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
