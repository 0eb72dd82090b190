"""Several processes, started by ``torchrun``, on one or more machines and devices.

    torchrun --nproc-per-node 2 --max-restarts 3 -m pyro_vae.cli train mnist --out runs/a

Every process has the whole program and a slice of each batch; ``DistributedDataParallel`` averages the gradients. Only the
first one writes. A run that is restarted goes on from its checkpoint.
"""

from __future__ import annotations

import atexit
import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyro_vae.errors import UserError
from pyro_vae.objectives.base import Objective
from pyro_vae.training.noise import BatchAxis, GlobalNoise

TIMEOUT = timedelta(minutes=10)  # for a process that hangs; one that dies is noticed at once
STORE_PORT = "pyro_vae/port"  # where the first process says which port its store listens on
LOST = ("gloo", "nccl", "connection", "socket", "timed out", "timeout", "store", "peer")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def own(self, batch: Any) -> Any:
        """This process's slice of the rows of a tensor, or of each tensor of a batch."""
        if self.size == 1 or batch is None:
            return batch
        if isinstance(batch, tuple):
            return tuple(self.own(part) for part in batch)
        return batch.chunk(self.size)[self.rank]

    def shared(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes, in all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def mean(self, value: Tensor) -> Tensor:
        """The mean over processes, on the device."""
        if self.size == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value / self.size

    def require_divisible(self, batch: int) -> None:
        """:class:`UserError` unless every process gets as many rows."""
        if batch % self.size:
            raise UserError(
                f"a batch of {batch} rows does not divide among {self.size} processes: choose batch_size anew"
            )


ALONE = Ranks()


def launched() -> bool:
    """Whether ``torchrun`` started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def is_first() -> bool:
    """Whether this process is the one that speaks for all."""
    return not launched() or os.environ["RANK"] == "0"


def restarted() -> bool:
    """Whether ``torchrun`` started it again, after a process had died."""
    return launched() and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def join() -> Ranks:
    """The processes that ``torchrun`` started, joined for the rest of this one's life; or those of the caller's own group."""
    if not dist.is_available() or not (launched() or dist.is_initialized()):
        return ALONE
    if not dist.is_initialized():
        from torch.distributed.nn import functional  # noqa: F401  has a group as a default argument, and would keep this one for good

        cuda = torch.cuda.is_available() and dist.is_nccl_available()
        # not left and joined again: the second meeting would find the addresses of the first
        found = {"store": _fresh_store(), "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT, **found)
        atexit.register(_leave)
    return Ranks(dist.get_rank(), dist.get_world_size())


def _fresh_store() -> Any:
    """A store that knows no process of an earlier attempt.

    The store of torchrun's agent outlives a restart, and with it the addresses of processes that are dead: gloo would call
    them. So the first process opens one of its own, and leaves its port with the agent; who finds the port of a dead one
    looks again.
    """
    host, first, deadline = (
        os.environ["MASTER_ADDR"],
        os.environ["RANK"] == "0",
        time.monotonic() + TIMEOUT.total_seconds(),
    )
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return dist.TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=first, timeout=TIMEOUT)
    agent = dist.TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=False, timeout=TIMEOUT)
    if first:
        own = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        agent.set(STORE_PORT, str(own.port))
        return own
    while True:
        try:
            own = dist.TCPStore(host, int(agent.get(STORE_PORT)), is_master=False, timeout=timedelta(seconds=2))
        except (dist.DistNetworkError, dist.DistStoreError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            own.set_timeout(TIMEOUT)
            return own


def _leave() -> None:
    """Leave the group, and join its threads.

    They live as long as one object that knows the group; one that lets go of a tensor while the interpreter ends would abort
    the process.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


@contextmanager
def told(path: Path | None) -> Iterator[None]:
    """Say in one line that another process was lost, and what is left."""
    try:
        yield
    except UserError:
        raise
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in LOST) or not dist.is_initialized():
            raise
        kept = (
            f"go on from the checkpoint in {path} with --resume" if path is not None else "train again, and give out="
        )
        raise UserError(
            f"another process of this training died or cannot be reached: {kept} (torchrun --max-restarts N does so by itself)"
        ) from error


class SlicedObjective(nn.Module):
    """An objective on a slice of the batch, with the noise of the whole, as a forward for DistributedDataParallel."""

    def __init__(self, program: Any, objective: Objective, ranks: Ranks) -> None:
        super().__init__()
        self.program, self.objective, self.ranks = program, objective, ranks

    def forward(self, x: Tensor, y: Tensor | None, step: int) -> tuple[Tensor, Tensor]:
        """The slice's loss and surrogate."""
        noise = GlobalNoise(len(x), self.ranks.rank, self.ranks.size)
        with noise, BatchAxis(noise):
            return self.objective(self.program, x, y, step)


def parallel(program: Any, objective: Objective, ranks: Ranks, x: Tensor, y: Tensor | None) -> Any:
    """``(x, y, step) -> (loss, surrogate)`` whose gradients, after ``surrogate.backward()``, are the means over processes.

    One pass on the example x, y shows whether there are parameters that a step does not reach, for which others must
    not wait.
    """
    module = SlicedObjective(program, objective, ranks)
    named = [(n, p) for n, p in program.named_parameters() if p.requires_grad]
    device = named[0][1].device
    _, surrogate = module(x, y, 0)
    grads = torch.autograd.grad(surrogate, [p for _, p in named], allow_unused=True)
    unused = any(ranks.gathered(any(g is None for g in grads)))
    return nn.parallel.DistributedDataParallel(
        module, device_ids=[device] if device.type == "cuda" else None, find_unused_parameters=unused
    )
