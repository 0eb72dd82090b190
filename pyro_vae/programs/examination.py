"""What a Program is and whether it keeps the contract: found out once, and kept while nothing that was read has changed.

A program is run on 6 draws of 8 rows, once under Pyro's own validation and once on the same rows mixed, with other values of x
in the model; then both again with small noise added to its parameters, so that nothing hides behind one that is zero (a gate, a
layer that starts at zero). What is found stands for every call with data of the same shape and dtype, until

* an attribute, hook, submodule, member of a class, global, closure, or a function's default that the program read is another
  (:mod:`pyro_vae.guard`);
* a parameter or buffer is another object, or torch counts a change of it (``_version``), or it lies elsewhere;
* data come with more distinct rows than were looked at, with more rows in all (up to 256), or with the first missing entries.

Not noticed are changes that torch does not count: ``parameter.data.add_(1)``, fused optimizers of the user's own, extensions in
C, NumPy arrays that share a tensor's memory. After these, ``examine=True``, which every public function of a program takes,
has it examined anew; so does ``torch.autograd.graph.increment_version(parameter)``. Nor is seen what a program does only with
values that none of the eight rows has, though these are those at the ends of most columns.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyro_vae.errors import DataError, UserError
from pyro_vae.guard import Guard
from pyro_vae.programs.columns import Layout, layout_of
from pyro_vae.programs.given import MISSING
from pyro_vae.programs.look import look_at, look_at_model
from pyro_vae.programs.rows import MANY, ORDER, ROWS, DependenceError
from pyro_vae.programs.trace import Traces, place_of, to_program, y_to_program
from pyro_vae.programs.values import Taken, knows_missing
from pyro_vae.seeding import ONE_THREAD

SCANNED_ROWS = 10_000  # that are looked at at once
MANY_NUMBERS = 2**20  # of rows that a program is run on at once: 4 MB in float32
MOST_KINDS = 8  # of data for which one program's examinations are kept
PLACE = "_pyro_vae_examined"  # in the program's own __dict__: what refers to it is forgotten with it


@dataclass(eq=False)
class Examination:
    """What was found of a program, for data of one kind.

    Attributes:
        traces: a run on 6 draws of 8 rows; of the model alone, where there were no data.
        distinct: how many of the rows were no repetitions.
        missing: whether one of the rows was not finite.
        many: how many rows it was run on at once, at most.
        taken: of y the least and the largest values by column that the program was run on, and whether one was missing.
    """

    traces: Traces
    distinct: int
    missing: bool
    many: int
    taken: Taken = field(default_factory=Taken)
    guard: Guard | None = None
    tensors: list[tuple[dict[str, Any], str, Any, int, int]] = field(default_factory=list)
    sizes: list[tuple[dict[str, Any], int]] = field(default_factory=list)

    def saw(self, rows: Rows) -> bool:
        """Whether it was as much as other rows are: as many, as many that differ, and missing entries where they have some."""
        return (
            rows.many <= self.many
            and (self.missing or not rows.missing)
            and (rows.most <= self.distinct or rows.distinct <= self.distinct)
        )

    def holds(self) -> bool:
        """Whether nothing has changed since."""
        if self.guard is None:
            return False
        for held, size in self.sizes:
            if len(held) != size:
                return False
        for held, name, t, version, place in self.tensors:
            if held.get(name) is not t or (t is not None and (t._version != version or t.data_ptr() != place)):
                return False
        return self.guard.changed() is None and not self.guard.changes_itself()


class _Kept(dict[Any, Examination]):
    """The examinations of one program, by the kind of data; a copy of the program has none."""

    def __init__(self, program: Any) -> None:
        super().__init__()
        self.owner = weakref.ref(program)

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


def examined(
    program: Any, x: Tensor, y: Tensor | None = None, *, rows: Rows | None = None, anew: bool = False
) -> Examination:
    """What a program is found to be with data like x.

    Args:
        program: the Program.
        x: data ``(N, *event)``, on any device and in any dtype; eight rows of them are looked at, some twice if there are fewer.
        y: what a conditional program is conditioned on, ``(N, ...)``.
        rows: of x and y, where they were looked at already.
        anew: look, whatever was found before.

    Raises:
        ProgramError: a site outside the plate, a subsampled plate, ``pyro.param``, no observed site ``x`` or a second one, a
            latent that the guide lacks, a random site that the model lacks, an observation or latent whose shape fits its
            distribution by broadcasting alone, a log-density of the wrong shape, a model that reads x,
            an observation that is other than x, a density of one row that depends on other rows or is random.
        UserError: the program cannot take a tensor of this shape, or values like these.
    """
    rows = Rows(x, y, layout=layout_of(program, x)) if rows is None else rows

    def look(guard: Guard) -> Traces:
        few = rows.chosen
        return look_at(
            program, to_program(program, x[few]), None if y is None else y_to_program(program, y[few]), guard, rows.many
        )

    try:
        return _kept(program, ("data", tuple(x.shape[1:]), *rows.patterns), y, rows, look, anew)
    except DependenceError:
        raise
    except UserError:
        lost = rows.lost
        of = None if y is None else y_to_program(program, y[lost])
        if layout_of(program, x) is None and len(lost) and not knows_missing(program, to_program(program, x[lost]), of):
            raise DataError(MISSING.format(int(lost[0]))) from None
        raise


def examined_model(
    program: Any, event_shape: tuple[int, ...], y: Tensor | None = None, *, count: int = 0, anew: bool = False
) -> Examination:
    """What a program's model is found to be, on data that it draws itself: for functions that take no data.

    Args:
        program: the Program.
        event_shape: of one datum.
        y: what a conditional program is conditioned on, ``(N, ...)``.
        count: of the rows that it will be asked for.
        anew: look, whatever was found before.

    Raises:
        ProgramError, UserError: of :func:`examined`, as far as the model goes.
    """
    rows = Rows(None, y, max(count, ROWS), math.prod(event_shape))

    def look(guard: Guard) -> Traces:
        few = None if y is None else y_to_program(program, y[rows.chosen])
        return look_at_model(program, event_shape, few, guard, rows.many)

    return _kept(program, ("model", tuple(event_shape)), y, rows, look, anew)


def _kept(
    program: Any, kind: tuple[Any, ...], y: Tensor | None, rows: Rows, look: Callable[[Guard], Traces], anew: bool
) -> Examination:
    """The examination of a program for a kind of data, if it is kept, holds, and saw as much as there is now; or a new one."""
    beside = None if y is None else (tuple(y.shape[1:]), y.dtype)
    with (
        ONE_THREAD
    ):  # which others hold while they run the program: its modes and tensors, and Pyro's flags, are put elsewhere
        kind = (*kind, beside, *place_of(program), torch.get_default_dtype(), is_validation_enabled())
        kept = vars(program).get(PLACE)
        if kept is None or kept.owner() is not program:
            kept = vars(program)[PLACE] = _Kept(program)
        found = None if anew else kept.get(kind)
        if found is not None and found.saw(rows) and found.holds():
            return found
        kept.pop(kind, None)
        guard = Guard(program, unread=frozenset({"training"}))
        found = Examination(look(guard), rows.distinct, rows.missing, rows.many)
        if y is not None:
            found.taken.add(y[rows.chosen.to(y.device)])
        if guard.saw_all and not any(t.is_inference() for t in (*program.parameters(), *program.buffers())):
            held = [d for module in program.modules() for d in (module._parameters, module._buffers)]
            found.guard, found.sizes = guard, [(d, len(d)) for d in held]
            found.tensors = [
                (d, n, t, *((0, 0) if t is None else (t._version, t.data_ptr()))) for d in held for n, t in d.items()
            ]
            while len(kept) >= MOST_KINDS:
                kept.pop(next(iter(kept)))
            kept[kind] = found
        return found


class Rows:
    """Which eight rows are looked at: some that are missing, or in which y or most columns of x are at their ends.

    Args:
        x: data ``(N, *event)``; None where the model draws them.
        y: what a conditional program is conditioned on, ``(N, ...)``.
        count: of the rows that the program will see at once, where these are others than there are here.
        size: numbers in a row.
        layout: of x, where it is a record.
    """

    def __init__(
        self, x: Tensor | None, y: Tensor | None, count: int = 0, size: int = 1, layout: Layout | None = None
    ) -> None:
        self._layout = layout
        self._x, self._y = None if x is None else x.detach(), None if y is None else y.detach()
        given = self._x if self._x is not None else self._y
        self._given = count if given is None else len(given)
        self._count, self._size = max(count, self._given), size if self._x is None else max(1, self._x[0].numel())

    @cached_property
    def ends(self) -> tuple[float, float]:
        """The least and the largest number of x, both NaN where one is; 0 where there is no x."""
        least, largest = (0.0, 0.0) if self._x is None else self._x.aminmax()
        return float(least), float(largest)

    @cached_property
    def missing(self) -> bool:
        """Whether any row is not finite."""
        return self._x is not None and self._x.is_floating_point() and not all(map(math.isfinite, self.ends))

    @cached_property
    def most(self) -> int:
        """How many of them can be no repetitions."""
        return min(ROWS, self._given)

    @cached_property
    def many(self) -> int:
        """Rows that the program is run on at once, at least as many as it will see, as far as that costs little."""
        if self._count <= len(ORDER):
            return len(ORDER)
        return max(len(ORDER), min(MANY, 1 << (self._count - 1).bit_length(), MANY_NUMBERS // self._size))

    @cached_property
    def _known(self) -> list[Tensor]:
        """Of each column of a record in which rows ``(N,)`` all of it is present, and in which some of it is missing."""
        if self._layout is None or self._x is None:
            return []
        present = [known.reshape(len(known), -1).all(1) for known in self._layout.unpacked(self._x).present.values()]
        return [where for known in present for where in (known, ~known)]

    @cached_property
    def patterns(self) -> tuple[bool, ...]:
        """Of a record, which of its columns are present, and missing, in some row."""
        return tuple(bool(where.any()) for where in self._known)

    @cached_property
    def lost(self) -> Tensor:
        """The numbers of rows that are not finite."""
        if self._x is None or not self.missing:
            return torch.zeros(0, dtype=torch.int64)
        lost = torch.cat([~torch.isfinite(x).reshape(len(x), -1).all(1) for x in self._x.split(SCANNED_ROWS)])
        return lost.nonzero()[:, 0]

    @cached_property
    def chosen(self) -> Tensor:
        """Their numbers, ``(8,)``, some of them again where there are fewer."""
        count, first = self._given, list[int]()
        if self._y is not None and self._y.numel():
            column = self._y.reshape(count, -1)[:, 0].nan_to_num().float()
            first += [int(column.argmin()), int(column.argmax())]
        first += [int(where.nonzero()[0]) for where in self._known if bool(where.any()) and not bool(where.all())]
        rows = list(dict.fromkeys([*first, *self.lost[:2].tolist(), *self._ends(), *range(self.most)]))[:ROWS]
        return torch.tensor(rows)[torch.arange(ROWS) % len(rows)]

    def _ends(self) -> list[int]:
        """The rows in which x is at its ends, and then most of its columns are."""
        if self._x is None:
            return []
        step = -(-len(self._x) // SCANNED_ROWS)
        x = self._x[::step].reshape(-1, self._size).float().nan_to_num()
        ends = torch.cat([x.min(0).indices, x.max(0).indices])
        number = torch.bincount(ends, minlength=len(x))
        most = number.argsort(descending=True, stable=True)[: min(ROWS, int((number > 0).sum()))]
        whole = [int(x.argmin()) // self._size, int(x.argmax()) // self._size]
        return [step * row for row in (*whole, *most.tolist())]

    @cached_property
    def distinct(self) -> int:
        """How many of them are no repetitions."""
        parts = [t[self.chosen.to(t.device)].reshape(ROWS, -1).float() for t in (self._x, self._y) if t is not None]
        return len(torch.cat(parts, 1).nan_to_num(0.5).unique(dim=0)) if parts else ROWS
