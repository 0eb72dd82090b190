"""Work in blocks, shared among the processes of a group, where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def own_share(blocks: Sequence[T]) -> Sequence[T]:
    """Every n-th of the blocks, of n processes; all of them for one process alone."""
    if not _joined():
        return blocks
    return blocks[dist.get_rank() :: dist.get_world_size()]


def own_stretch(num_images: int, block: int) -> slice:
    """This process's images, whole blocks that follow each other; all of them for one process alone."""
    if not _joined():
        return slice(0, num_images)
    blocks = -(-num_images // block)
    first, last = (block * -(-blocks * (dist.get_rank() + i) // dist.get_world_size()) for i in (0, 1))
    return slice(min(first, num_images), min(last, num_images))


def everyones(value: T) -> list[T]:
    """The values of all processes, in the order of their ranks, in every one of them."""
    if not _joined():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
