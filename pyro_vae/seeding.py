"""Random numbers by seed, with every generator put back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

# torch's generators and Pyro's stack of handlers belong to the process: whoever uses them keeps other threads waiting
ONE_THREAD = threading.RLock()


def derive_seed(*parts: int) -> int:
    """One 63-bit seed from several integers, well mixed: (seed, first image, first sample), say.

    >>> derive_seed(0, 1) == derive_seed(0, 1) != derive_seed(1, 0)
    True
    """
    state = np.random.SeedSequence([int(p) & 0xFFFFFFFFFFFFFFFF for p in parts]).generate_state(2, np.uint32)
    return (int(state[0]) << 31) ^ int(state[1])


@contextmanager
def seeded(seed: int | None, device: torch.device | str = "cpu") -> Iterator[None]:
    """Draw from torch's generators as if they had just been seeded with ``seed``, then put them back.

    Covers the CPU's generator and that of ``device``; other threads wait. ``seed=None`` draws from the generators as they stand.
    """
    if seed is None:
        yield
        return
    device = torch.device(device)
    devices = [device] if device.type != "cpu" else []
    with ONE_THREAD, torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        # what torch.manual_seed does, without the half millisecond that it spends on backends that were never used
        torch.default_generator.manual_seed(seed)
        if devices:
            module = torch.get_device_module(device)
            getattr(module, "manual_seed_all", module.manual_seed)(seed)
        yield


def generator(*parts: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A private generator seeded from ``parts``; touches no global state."""
    return torch.Generator(device=device).manual_seed(derive_seed(*parts))
