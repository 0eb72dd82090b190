"""What a report is about: a run, its program, and the data that it can be looked at with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_vae.analysis.pictures import sample_count
from pyro_vae.data import Data
from pyro_vae.errors import UserError
from pyro_vae.evaluation.evaluate import chosen_rows, rows_for
from pyro_vae.programs.labels import needs_y, takes_y
from pyro_vae.programs.trace import device_of, y_to_program
from pyro_vae.training.run import Run

LONG_SERIES = 32  # elements without names from which on a vector is taken for a series


@dataclass(frozen=True)
class Rows:
    """Some rows of a split: x as the program sees them, y where it is conditional, labels where there are any.

    Attributes:
        x: ``(n, *event)``.
        y: ``(n,)``, or None.
        labels: ``(n,)``, or None.
        index: their numbers in the split ``(n,)``.
    """

    x: Tensor
    y: Tensor | None
    labels: Tensor | None
    index: Tensor

    def first(self, num: int) -> Rows:
        """The first of them."""
        part = slice(0, num)
        y, labels = (None if t is None else t[part] for t in (self.y, self.labels))
        return Rows(self.x[part], y, labels, self.index[part])


@dataclass(frozen=True)
class Subject:
    """A run and its data, and how much of them is looked at.

    Attributes:
        run: the run.
        data: its data set, or None where there is none to be had.
        missing: why there is none.
        limit: test images that are evaluated.
        num_samples: importance samples per image, K.
        seed: of everything drawn.
    """

    run: Run
    data: Data | None
    missing: str
    limit: int
    num_samples: int
    seed: int

    @property
    def program(self) -> Any:
        """The program, with its best weights."""
        return self.run.program

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one datum."""
        return self.run.event_shape

    @property
    def name(self) -> str:
        """What the run is called."""
        return str(self.run.path) if self.run.path is not None else "a run in memory"

    @cached_property
    def kind(self) -> str:
        """What a datum is: an ``image``, a ``point`` of two numbers, a ``series`` over time, or the row of a ``table``.

        Floats beyond [0, 1] on two axes are a series of channels; a vector is one where its elements have no names and are many.
        """
        shape = self.event_shape
        if len(shape) == 2 and self.data is not None and self.data.levels is None:
            some = self.data.train[: min(len(self.data.train), 1000)].nan_to_num(0.5)
            return "series" if bool(some.min() < 0) or bool(some.max() > 1) else "image"
        if shape == (2,):
            return "point"
        if len(shape) != 1:
            return "image"
        return "series" if not self.named and shape[0] >= LONG_SERIES else "table"

    @property
    def named(self) -> tuple[str, ...]:
        """The names of the columns, where there are some."""
        return () if self.data is None else self.data.column_names or ()

    @property
    def records(self) -> bool:
        """Whether rows are records."""
        return self.data is not None and self.data.columns is not None

    @property
    def columns(self) -> tuple[str, ...]:
        """What the elements of a vector are called; none of them in an image, a series or a record."""
        if self.records or self.kind not in ("table", "point"):
            return ()
        return self.named or tuple(f"column {i}" for i in range(self.event_shape[0]))

    @cached_property
    def conditional(self) -> bool:
        """Whether the program is given labels, model(x, y): where it needs them, or takes them and there are any."""
        return needs_y(self.program) or (
            takes_y(self.program) and self.data is not None and any(t is not None for t in self.data.labels.values())
        )

    def rows(self, split: str, num: int) -> Rows:
        """A random subset of a split by a fixed seed, in the order of the file.

        Raises:
            UserError: no data, an empty split, or no labels where the program needs them.
        """
        if self.data is None:
            raise UserError("there are no data")
        stored = self.data.stored(split)
        if len(stored) == 0:
            raise UserError(f"{self.data.name} has no {split} split")
        index = chosen_rows(len(stored), num)
        labels = self.data.labels.get(split)
        labels = (
            labels if labels is not None and labels.dim() == 1 and not labels.is_floating_point() else None
        )  # classes
        x, y = rows_for(self.program, self.data, split, index)
        y = y_to_program(self.program, y)
        return Rows(x, y, None if labels is None else labels[index], index)

    @cached_property
    def test(self) -> Rows:
        """The test images that are evaluated."""
        return self.rows("test", self.limit)

    @cached_property
    def shown(self) -> Rows:
        """Test images in random order, for pictures: a file's first rows may be all of one class."""
        order = torch.randperm(len(self.test.x), generator=torch.Generator().manual_seed(self.seed))
        y, labels = (None if t is None else t[order.to(t.device)] for t in (self.test.y, self.test.labels))
        return Rows(self.test.x[order], y, labels, self.test.index[order])

    def classes(self, num: int | None = None) -> Tensor | None:
        """What to draw ``num`` samples given, all classes in equal shares; None for an unconditional program."""
        if not self.conditional:
            return None
        num = sample_count(self.event_shape) if num is None else num
        rows = self.rows("train", 10_000)
        found = rows.y if rows.labels is None else rows.labels.unique()
        if found is None:
            raise UserError("the program is conditional, model(x, y), and there are no labels to draw samples given")
        return found[torch.arange(num) * len(found) // num].to(device_of(self.program))
