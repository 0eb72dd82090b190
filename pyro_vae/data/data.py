"""Data as stored, and as a program sees it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_vae.data.names import SPLITS
from pyro_vae.data.preparation import BLOCK, binarize_once, block_generator, check_preparation, is_random, prepare
from pyro_vae.data.record import Column, unflattened
from pyro_vae.data.rows import Rows
from pyro_vae.errors import UserError, nearest
from pyro_vae.seeding import digest, generator
from pyro_vae.signatures import whole

MEAN_ROWS = 60_000


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """Three splits as stored, their labels, and how they are prepared for a program.

    ``train``, ``validation`` and ``test`` are ``(n, *event_shape)``: uint8 levels or floats, as tensors, or, for
    large files, as memory-mapped views that are indexed like tensors. A program never sees them but what
    :meth:`observed` (evaluation: drawn once, by a fixed seed) and :meth:`prepare` (training: drawn afresh) make of
    them; the mathematics is in :mod:`pyro_vae.data.preparation`.

    Attributes:
        name: the data set's name, or the file's or folder's.
        levels: how many levels a stored value can have (256, 17, 2), or None for floats.
        binarization: none, static (drawn once and for all and stored so: ``levels`` is then 2), dynamic or threshold.
        dequantization: none or uniform.
        labels: split -> ``(n, ...)``, int64 ``(n,)`` where they are numbers of classes, or None where there are none.
        rows: split -> int64 ``(n,)``, which rows of the whole array (or of the sorted list of files) the split has;
            None where the split is as filed.
        source: keyword arguments, fit for JSON, with which ``load_data(**source)`` gives the same data again.
        label_names: the classes' names in the order of the labels, or None.
        column_names: of a table whose file names its columns, or None.
        columns: of rows that are records (:mod:`pyro_vae.data.columned`), which are stored flat, how they lie there; or None.

    Example:
        >>> from pyro_vae.data import load_data
        >>> data = load_data("digits")
        >>> data
        Data(digits: 1,439 train, 179 validation, 179 test, shape (1, 8, 8), levels 17, dynamic binarization)
        >>> data.observed("test").shape, data.observed("test").unique().tolist()
        (torch.Size([179, 1, 8, 8]), [0.0, 1.0])
        >>> data.with_(binarization="none").observed("test", rows=[0, 3]).shape
        torch.Size([2, 1, 8, 8])
    """

    name: str
    train: Rows
    validation: Rows
    test: Rows
    levels: int | None
    binarization: str = "none"
    dequantization: str = "none"
    labels: dict[str, Tensor | None] = field(default_factory=lambda: dict.fromkeys(SPLITS))
    rows: dict[str, Tensor | None] = field(default_factory=lambda: dict.fromkeys(SPLITS))
    source: dict[str, Any] = field(default_factory=dict)
    label_names: tuple[str, ...] | None = None
    column_names: tuple[str, ...] | None = None
    # The data with its grey levels, where these splits were binarized once and for all.
    grey: Data | None = None
    columns: tuple[Column, ...] | None = None
    # The data as they were before labels were made a column, or some of a column missing.
    plain: Data | None = None
    # Split -> digests of its rows as stored, where they were read for them (pyro_vae.data.content).
    digests: dict[str, Tensor] | None = None

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one datum: (C, H, W) for images."""
        return tuple(self.train.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Of what a program sees: float64 where floats are stored so, else float32."""
        return torch.float64 if self.levels is None and self.train.dtype == torch.float64 else torch.float32

    @property
    def observed_levels(self) -> int | None:
        """How many values an entry of :meth:`observed` can have: 2 when binarized, None for a continuum."""
        if self.levels is None or self.dequantization != "none":
            return None
        return self.levels if self.binarization == "none" else 2

    @property
    def log_jacobian(self) -> float | None:
        """D log(levels) in nats per datum for dequantized data: log P(levels) >= E log p(x) - log_jacobian; else None.

        It is for the caller to know whether the likelihood is a density (subtract it) or a probability (nothing).
        """
        if self.dequantization == "none" or self.levels is None:
            return None
        return math.prod(self.event_shape) * math.log(self.levels)

    def stored(self, split: str) -> Rows:
        """``train``, ``validation`` or ``test`` by name; a UserError for any other name."""
        if split not in SPLITS:
            raise UserError(f"split {split!r} is unknown: {nearest(str(split), SPLITS)}")
        chosen: Rows = getattr(self, split)
        return chosen

    def prepare(self, stored: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A minibatch as a program sees it in training, freshly drawn where anything is drawn.

        Args:
            stored: ``(n, *event_shape)`` rows as stored, on any device.
            generator: of the same device; torch's global generator where None.

        Returns:
            ``(n, *event_shape)`` of :attr:`dtype` on the same device. Traceable: torch operations only.
        """
        how = (self.levels, self.binarization, self.dequantization, generator)
        if self.columns is None or self.levels is None:
            return prepare(stored, *how)
        size = self.columns[0].numel  # whose levels they are
        return torch.cat([prepare(stored[..., :size], *how), stored[..., size:]], -1)

    def observed(
        self,
        split: str = "test",
        seed: int = 0,
        rows: Tensor | Sequence[int] | None = None,
        *,
        streams: Literal["place", "content"] = "place",
    ) -> Any:
        """What a program sees of a split, drawn once: the same tensor whenever the seed is the same.

        Rows are drawn in fixed blocks of 1,000, each seeded by (seed, split, block), so that the draw for a row does
        not depend on which others are asked for, and only the blocks that are touched are read.

        Args:
            split: train, validation or test.
            seed: of the draws; leave it alone for evaluation. Statically binarized data do not depend on it.
            rows: which rows, in which order; all where None.
            streams: what a row is drawn by: its place, or its content, so that it is the same row in any file.

        Returns:
            ``(n, *event_shape)`` of :attr:`dtype` on the CPU; levels are given as level / (levels - 1). A
            :class:`~pyro_vae.Record` where there are :attr:`columns`.

        Raises:
            UserError: an unknown split, or a row that the split does not have.
        """
        drawn = self.drawn(split, seed, rows, streams)
        return drawn if self.columns is None else unflattened(self.columns, drawn)

    def drawn(
        self, split: str = "test", seed: int = 0, rows: Tensor | Sequence[int] | None = None, streams: str = "place"
    ) -> Tensor:
        """The same in one tensor, as it is stored: records are flat rows."""
        stored, seed = self.stored(split), whole("observed: expected seed", seed)
        index = self._checked(rows, split, len(stored))
        out = torch.empty((len(index), *stored.shape[1:]), dtype=self.dtype)
        order = torch.argsort(index // BLOCK, stable=True)
        blocks, counts = torch.unique_consecutive(index[order] // BLOCK, return_counts=True)
        random = is_random(self.binarization, self.dequantization)
        if random and streams == "content":
            found = (stored[index[i : i + 1]] for i in range(len(index)))
            return torch.cat([out[:0], *(self.prepare(x, generator("a row prepared", seed, digest(x))) for x in found)])
        for block, where in zip(blocks.tolist(), order.split(counts.tolist()), strict=True):
            if random:
                start = block * BLOCK
                drawn = self.prepare(stored[start : start + BLOCK], block_generator(seed, split, block))
                out[where] = drawn[index[where] - start]
            else:
                out[where] = self.prepare(stored[index[where]])
        return out

    def with_(self, *, binarization: str | None = None, dequantization: str | None = None) -> Data:
        """A copy that is prepared otherwise, from the same stored data; what is None stays as it is.

        Raises:
            UserError: a preparation that these data cannot have.
        """
        base = self if self.grey is None else self.grey
        binarization = self.binarization if binarization is None else binarization
        dequantization = self.dequantization if dequantization is None else dequantization
        check_preparation(self.name, base.levels, binarization, dequantization)
        source = {**self.source, "binarization": binarization, "dequantization": dequantization}
        prepared = replace(base, binarization=binarization, dequantization=dequantization, source=source, grey=None)
        if binarization != "static" or base.levels is None or base.levels == 2:
            return prepared
        train, validation, test = (binarize_once(base.stored(split), base.levels, split) for split in SPLITS)
        return replace(prepared, train=train, validation=validation, test=test, levels=2, grey=base)

    def mean_image(self) -> Tensor:
        """The mean of the training split, level / (levels - 1) or the floats that are there: float32 ``event_shape``.

        Over at most 60,000 rows, evenly spaced; computed once. It is where a decoder's bias may start.
        """
        return self._mean.clone()

    @cached_property
    def _mean(self) -> Tensor:
        n = len(self.train)
        count = min(n, MEAN_ROWS)
        index = torch.arange(count) * n // count
        total, there = (torch.zeros(self.event_shape, dtype=torch.float64) for _ in range(2))
        for part in index.split(BLOCK):
            rows = self.train[part]
            total += rows.nansum(0, dtype=torch.float64)
            there += (~rows.isnan()).sum(0)
        scale = 1 if self.levels is None else self.levels - 1
        return (total / (there.clamp(min=1) * scale)).to(torch.float32)

    def _checked(self, rows: Tensor | Sequence[int] | None, split: str, n: int) -> Tensor:
        if rows is None:
            return torch.arange(n)
        try:
            index = torch.as_tensor(rows).cpu()
        except (TypeError, ValueError, RuntimeError):
            raise UserError(
                f"rows must be a list of row numbers, not {type(rows).__name__}: give int64 of shape (n,)"
            ) from None
        if index.numel() == 0:
            return torch.zeros(0, dtype=torch.int64)
        if index.dim() != 1 or index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
            raise UserError(
                f"rows must be a list of row numbers, not {index.dtype} of shape {tuple(index.shape)}: "
                "give int64 of shape (n,)"
            )
        index = index.to(torch.int64)
        outside = index[(index < 0) | (index >= n)]
        if len(outside):
            raise UserError(
                f"row {int(outside[0])} is not in the {split} split of {self.name}, which has {n} rows: "
                f"choose rows from 0 to {n - 1}"
            )
        return index

    def __repr__(self) -> str:
        sizes = ", ".join(f"{len(self.stored(split)):,} {split}" for split in SPLITS)
        levels = "floats" if self.levels is None else f"levels {self.levels}"
        how = [f"{self.binarization} binarization"] if self.binarization != "none" else []
        how += [f"{self.dequantization} dequantization"] if self.dequantization != "none" else []
        return f"Data({self.name}: {sizes}, shape {self.event_shape}, {', '.join([levels, *how])})"
