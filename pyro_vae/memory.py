"""How much memory there is, the refusal of what would not fit, and memory that is used again."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from functools import cache
from pathlib import Path

import torch
from torch import nn

from pyro_vae.errors import UserError

KEPT_BYTES = 2**28  # of freed memory at the end of the heap
LARGE_BYTES = 2**25  # a tensor above this size goes back to the system by itself
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_MALLOC_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
COPIES = 2  # a program and the file it is filled from; training holds at least four


def available() -> int | None:
    """Bytes that this process may still take: free memory, or what its control group or address space leaves; None if unknown."""
    limits = [n for n in (_free(), _control_group(), _address_space()) if n is not None]
    return min(limits) if limits else None


def require(num_bytes: int, what: str) -> None:
    """:class:`UserError` with the figure where ``num_bytes`` are more than there are."""
    free = available()
    if free is not None and num_bytes > free:
        raise UserError(f"{what} would take {human(num_bytes)} of memory, and {human(free)} are free: make it smaller")


def require_for(program: nn.Module) -> None:
    """The same for a program built on the ``meta`` device, which has shapes and no memory."""
    tensors = [*program.parameters(), *program.buffers()]
    count = sum(p.numel() for p in program.parameters())
    size = sum(t.numel() * t.element_size() for t in tensors)
    require(COPIES * size, f"the declared model has {count:,} parameters: with the file they are loaded from, it")


@cache
def keep_freed() -> None:
    """Let the C library keep what is freed, up to :data:`KEPT_BYTES`, for the tensors that are made next; once for the process.

    As it comes, glibc gives megabytes back to the system as soon as they are freed, and the system clears every page anew when
    they are asked for again: half the time of an uncompiled pass. A setting by ``MALLOC_TRIM_THRESHOLD_``,
    ``MALLOC_MMAP_THRESHOLD_`` or ``GLIBC_TUNABLES`` is respected.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _MALLOC_SETTINGS):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there was no memory, on any device."""
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in text for words in ("out of memory", "can't allocate memory", "not enough memory")
    )


def human(num_bytes: int) -> str:
    """``1.5 GB``."""
    size = float(num_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def _free() -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _control_group() -> int | None:
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            return max(0, int(Path(limit).read_text()) - int(Path(used).read_text()))
    return None


def _address_space() -> int | None:
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit == resource.RLIM_INFINITY:
            return None
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
        return max(0, limit - used)
    except (ImportError, OSError, ValueError):
        return None
