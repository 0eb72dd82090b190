"""How much is computed at once: halved where memory runs out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from pyro_vae.errors import UserError

T = TypeVar("T")


class SmallerChunkWarning(UserWarning):
    """Memory ran out, and the work goes on in smaller chunks; other draws, the same law."""


class Chunks:
    """Images and samples in one pass, which shrink for good where a pass finds no memory.

    Args:
        images: images in one block.
        samples: samples of each in one pass; chains that move together, with ``whole``, stay as many as they are.
    """

    def __init__(self, images: int, samples: int, *, whole: bool = False) -> None:
        self.images, self.samples, self.whole = images, samples, whole
        self.told = False

    def over(
        self, compute: Callable[[Tensor, Tensor | None, int, int], T], x: Tensor, y: Tensor | None = None
    ) -> list[T]:
        """``compute(x, y, at, samples)`` of a block's rows from ``at`` on, in as many parts as memory asks for."""
        found: list[T] = []
        at = 0
        while at < len(x):
            rows = slice(at, at + self.images)
            try:
                found.append(compute(x[rows], None if y is None else y[rows], at, self.samples))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failed = str(error)
            else:
                at += self.images
                continue
            self._halve(failed)  # outside the except clause, whose traceback keeps the tensors alive
        return found

    def _halve(self, why: str) -> None:
        before = self.images * self.samples
        if self.samples > 1 and not self.whole:
            self.samples = -(-self.samples // 2)
        elif self.images > 1:
            self.images = -(-self.images // 2)
        else:
            what = f"{self.samples:,} chains of one image" if self.whole else "one sample of one image"
            raise UserError(f"out of memory with {what} ({why.splitlines()[0][:160]}): free some memory")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not self.told:
            self.told = True
            warnings.warn(
                f"out of memory with {before:,} images times samples at once: going on with {self.images * self.samples:,}, "
                "or fewer; the size is recorded as chunk_size",
                SmallerChunkWarning,
                stacklevel=3,
            )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there was no memory, on any device."""
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in text for words in ("out of memory", "can't allocate memory", "not enough memory")
    )
