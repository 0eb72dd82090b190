"""How numbers are computed with: matrix products in fewer bits, where they are asked for, and no denormal numbers.

Products in fewer bits are faster, and off by an amount that is to be measured. ``full`` is the program's own dtype; ``tf32``
rounds the factors of float32 products to 10 bits of mantissa, on CUDA devices that can; ``bf16`` computes products and
convolutions in bfloat16 (8 bits), densities and sums in the program's dtype.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

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


def wide(tensor: Tensor) -> Tensor:
    """A tensor in float64: where it lies, or on the CPU where its device has no float64 (an Apple GPU)."""
    return (tensor if tensor.device.type in ("cuda", "meta") else tensor.cpu()).double()


@contextmanager
def products(precision: str) -> Iterator[None]:
    """While entered, float32 products round as ``precision`` says, whatever torch was told before; around what runs, graphs too.

    With ``tf32`` those of CUDA devices round their factors; with any other precision no float32 product does. Left to itself,
    torch rounds those of convolutions on CUDA devices, and others after ``torch.set_float32_matmul_precision``.
    """
    before = [(backend, backend.fp32_precision) for backend in _BACKENDS]
    old = _told(torch.get_float32_matmul_precision), _told(lambda: torch.backends.cudnn.allow_tf32)
    try:
        # first the flags of old, each of which sets several of the new ones as well
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        for backend, _ in before:
            on_cuda = backend not in _ON_CPU
            backend.fp32_precision = "tf32" if precision == "tf32" and on_cuda else "ieee"
        yield
    finally:
        torch.set_float32_matmul_precision(old[0] or "highest")
        torch.backends.cudnn.allow_tf32 = old[1] is not False
        for backend, value in before:
            backend.fp32_precision = value


_CUDNN, _MKLDNN = cast("Any", torch.backends.cudnn), cast("Any", torch.backends.mkldnn)
_ON_CPU = [_MKLDNN.matmul, _MKLDNN.conv, _MKLDNN.rnn]
_BACKENDS = [torch.backends.cuda.matmul, _CUDNN.conv, _CUDNN.rnn, *_ON_CPU]


def _told(ask: Callable[[], Any]) -> Any:
    """What a flag of old says; None where it has no word for what the new ones say, and then it was left at its default."""
    try:
        return ask()
    except RuntimeError:
        return None


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
