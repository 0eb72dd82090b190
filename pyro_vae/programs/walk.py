"""One walk over rows and draws: the program's device, y, the processes of a group, memory that runs out, progress.

    walk = Walk(program, x, y, rows=at_once("inference gaps"), progress=progress)
    for block in walk:
        with block:
            walk.keep(compute(block.x, block.y))
    parts = walk.gathered()

A block is computed in evaluation mode, and where it finds no memory it comes again with half as much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pyro_vae.errors import UserError, warn
from pyro_vae.memory import is_out_of_memory
from pyro_vae.programs.trace import evaluating, to_program, y_to_program

T = TypeVar("T")

# How much is computed at once, by use, and what the size is for. A block places its random draws: with another size they are
# other numbers of the same law.
AT_ONCE = {
    # numbers of the observed site: images times samples of each
    "importance weights": 2**20,  # 4 MB in float32, so that a block of activations stays near the cache
    "posterior draws": 2**20,  # likewise, for all rows of a block together
    "posterior": 2**17,  # rows of x in one block: an eighth, for each has some thousand draws that are kept
    "chains: cpu": 2**19,  # so many that a CPU keeps them in its cache
    "chains": 2**26,  # or that a GPU is busy
    # rows
    "validation": 1000,  # one draw of each
    "latent means": 2000,  # the encoder alone
    "active units": 500,  # as many images as the reference takes: one block
    "information": 250,  # some draws of each
    "inference gaps": 100,  # each with parameters of its own, their gradients and moments
    # draws of each row
    "active units: draws": 64,  # as many as are made at first: one pass decides most units
    # pairs and points
    "information: pairs": 2**22,  # numbers in the latents of pairs (draw, row): 16 MB in float32
    "calibration": 2**16,  # simulations times draws that are ranked
    "uniform ranks": 2**22,  # simulated ranks: 32 MB
    "manifold": 2**16,  # points of the plane that a prior scores
}


class SmallerChunkWarning(UserWarning):
    """Memory ran out, and the work goes on in smaller chunks; other draws, the same law."""


def at_once(use: str, size: int = 1, least: int = 1) -> int:
    """How many things of ``size`` numbers each are computed at once for a use of :data:`AT_ONCE`, at least ``least``."""
    return max(least, AT_ONCE[use] // max(1, size))


def spans(total: int, size: int) -> Iterator[slice]:
    """``total`` things in parts of ``size``, the last one what is left.

    >>> [(span.start, span.stop) for span in spans(5, 2)]
    [(0, 2), (2, 4), (4, 5)]
    """
    return (slice(first, min(first + size, total)) for first in range(0, total, size))


class Walk:
    """Rows of data in blocks, one after the other; where memory runs out, blocks are halved from there on.

    Args:
        program: whose device and dtype the blocks come in, and which is in evaluation mode inside of one.
        x: data ``(N, *event)``, a tensor or what makes one of a slice of rows.
        y: what a conditional program is conditioned on, ``(N, ...)``.
        rows: in one block.
        draws: of each row that are computed together; they are halved before the rows.
        whole: whether draws (chains that move together) stay as many as they are.
        shared: whether the processes of a group, where one is joined, each walk over a stretch of the blocks; all of them then
            have to walk. :meth:`gathered` has what all of them kept.
        begin: rows of this process that were done before.
        progress: called with rows' worth of work done, which add up to the number of rows.

    Attributes:
        rows, draws: at once, by now.
        first: the next row.
        kept: what was kept of the blocks that are done.
    """

    def __init__(
        self,
        program: Any,
        x: Any,
        y: Tensor | None = None,
        *,
        rows: int,
        draws: int = 1,
        whole: bool = False,
        shared: bool = False,
        begin: int = 0,
        progress: Callable[[Any], None] | None = None,
    ) -> None:
        self.program, self.x, self.y = program, x, y
        self.rows, self.draws, self.whole = rows, draws, whole
        own = _own(len(x), rows) if shared else slice(0, len(x))
        self.first, self.end = own.start + begin, own.stop
        self.kept: list[Any] = []
        self.failed: str | None = None  # why the block under way found no memory
        self._shared, self._progress, self._warned = shared, progress, False
        self.tell(begin)

    def __iter__(self) -> Iterator[Block]:
        while self.first < self.end:
            self.failed = None
            block = Block(self, slice(self.first, min(self.first + self.rows, self.end)))
            yield block
            if self.failed is None:
                self.first = block.rows.stop
                self.tell(len(block) - block.told)
            else:
                self.tell(-block.told)
                del block  # and what it holds
                self._halve(self.failed)

    def keep(self, value: Any) -> None:
        """File what a block came to."""
        self.kept.append(value)

    def gathered(self) -> list[Any]:
        """What was kept, by all processes, in the order of rows; ``rows`` and ``draws`` are then the least of all."""
        if not self._shared:
            return self.kept
        shares = everyones((self.kept, self.rows, self.draws))
        _, self.rows, self.draws = min(shares, key=lambda share: share[1] * share[2])
        return [value for kept, _, _ in shares for value in kept]

    def tell(self, rows: float) -> None:
        """Report rows' worth of work."""
        if rows and self._progress is not None:
            self._progress(rows)

    def _halve(self, why: str) -> None:
        before = self.rows * self.draws
        if self.draws > 1 and not self.whole:
            self.draws = -(-self.draws // 2)
        elif self.rows > 1:
            self.rows = -(-self.rows // 2)
        else:
            what = f"{self.draws:,} chains of one image" if self.whole else "one sample of one image"
            raise UserError(f"out of memory with {what} ({why}): free some memory")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not self._warned:
            self._warned = True
            warn(
                f"out of memory with {before:,} images times samples at once: going on with {self.rows * self.draws:,}, or "
                "fewer; a result that depends on the size records it as chunk_size",
                SmallerChunkWarning,
            )


class Block:
    """Some rows of a walk, to be computed inside of it: ``with block``.

    Attributes:
        rows: which ones of the walk's.
        told: rows' worth of work that has been reported of it.
    """

    def __init__(self, walk: Walk, rows: slice) -> None:
        self.walk, self.rows = walk, rows
        self.told: float = 0

    def __len__(self) -> int:
        return int(self.rows.stop - self.rows.start)

    @property
    def first(self) -> int:
        """The place of the first row in the data."""
        return int(self.rows.start)

    @cached_property
    def x(self) -> Tensor:
        """Data ``(batch, *event)``, on the program's device and in its dtype."""
        return to_program(self.walk.program, self.walk.x[self.rows])

    @cached_property
    def y(self) -> Tensor | None:
        """What a conditional program is conditioned on, likewise."""
        return y_to_program(self.walk.program, self.walk.y, self.rows)

    def report(self, share: float) -> None:
        """Say that a further share of the block's work is done."""
        self.told += share * len(self)
        self.walk.tell(share * len(self))

    def __enter__(self) -> Block:
        self._evaluating = evaluating(self.walk.program)
        self._evaluating.__enter__()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        self._evaluating.__exit__(kind, error, traceback)
        if isinstance(error, (RuntimeError, MemoryError)) and is_out_of_memory(error):
            # the traceback, which keeps the tensors alive, is gone when the walk goes on
            self.walk.failed = next(iter(str(error).splitlines()), type(error).__name__)[:160]
        return self.walk.failed is not None


def everyones(value: T) -> list[T]:
    """The values of all processes of a group, in the order of their ranks, in every one of them."""
    if not _joined():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _own(num_rows: int, block: int) -> slice:
    """This process's rows, whole blocks that follow each other; all of them for one process alone."""
    if not _joined():
        return slice(0, num_rows)
    blocks = -(-num_rows // block)
    first, last = (block * -(-blocks * (dist.get_rank() + i) // dist.get_world_size()) for i in (0, 1))
    return slice(min(first, num_rows), min(last, num_rows))


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
