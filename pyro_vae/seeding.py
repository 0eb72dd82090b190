"""Random numbers by name and seed, with every generator put back.

Every use of random numbers in the library has a stream of its own, named by what the numbers are for. A seed is made from the
name and any number of integers, injectively: two names, or two lists of integers of whatever lengths, never stand for the same
seed. (numpy's ``SeedSequence`` fills up with zeros, so that ``(seed, 3)`` and ``(seed, 3, 0)`` are one seed there: an annealed
chain once had its own starting point as the first of its momenta, and the bound came out 0.45 nats too high.)
"""

from __future__ import annotations

import hashlib
import operator
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# torch's generators and Pyro's stack of handlers belong to the process: whoever uses them keeps other threads waiting
ONE_THREAD = threading.RLock()


def derive_seed(*parts: str | int) -> int:
    """One 63-bit seed from the name of a stream and integers: ``derive_seed("annealing: start", seed, first_image)``, say.

    The parts are hashed (BLAKE2b) as they are written, their kinds, signs and number included. torch's generator of a CPU keeps
    32 bits of a seed: among n streams, two share their numbers with a probability of about n^2 / 8.6e9.

    >>> derive_seed("a", 0) == derive_seed("a", 0)
    True
    >>> len({derive_seed("a", 3), derive_seed("a", 3, 0), derive_seed("a", 0, 3), derive_seed("a", -3), derive_seed("b", 3)})
    5
    """
    written = repr(tuple(part if isinstance(part, str) else operator.index(part) for part in parts))
    return int.from_bytes(hashlib.blake2b(written.encode(), digest_size=8).digest()) >> 1


def digest(*tensors: torch.Tensor | None) -> int:
    """A number from the bytes of tensors, 64 bits and above all numbers of rows: what stands there, and not where.

    >>> digest(torch.zeros(3)) == digest(torch.zeros(3), None), digest(torch.zeros(3)) == digest(torch.ones(3))
    (True, False)
    """
    found = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        if tensor is not None:
            held = tensor.detach().cpu()
            held = held + 0 if held.is_floating_point() else held  # -0 and 0 are one number
            found.update(held.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return 2**64 + int.from_bytes(found.digest())


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
    with ONE_THREAD, torch.random.fork_rng(devices=devices, device_type=device.type) if devices else _forked():
        # what torch.manual_seed does, without the half millisecond that it spends on backends that were never used
        torch.default_generator.manual_seed(seed)
        if devices:
            module = torch.get_device_module(device)
            getattr(module, "manual_seed_all", module.manual_seed)(seed)
        yield


@contextmanager
def _forked() -> Iterator[None]:
    """``torch.random.fork_rng`` of the CPU's generator alone, in half the time."""
    state = torch.default_generator.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def generator(*parts: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A private generator seeded from ``parts``, as by :func:`derive_seed`; touches no global state."""
    return torch.Generator(device=device).manual_seed(derive_seed(*parts))
