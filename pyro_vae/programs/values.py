"""Hold the values of data, and of what a program is conditioned on, to what the program takes: what differs from call to call.

A program looks labels up, or feeds numbers to a network; which it takes, only it knows. So it is run on the rows in which y is at
its least and its largest, column by column, and on the first that is not finite: a label that no table holds is found there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.errors import DataError, said
from pyro_vae.programs.columns import layout_of
from pyro_vae.programs.folding import bounds
from pyro_vae.programs.given import MISSING, first_lost
from pyro_vae.programs.labels import needs_y
from pyro_vae.programs.trace import WHOLE, Traces, evaluating, found_once, innermost, isolated, observation, trace
from pyro_vae.seeding import derive_seed, seeded

MOVES = "the data, as they are together, move the bounds of the likelihood"
MOST_COLUMNS = 256  # of y that are looked at
Part = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def check_observed(
    traces: Traces, x: Tensor, y: Tensor | None = None, *, first: int | Tensor = 0, support: bool = True
) -> None:
    """Hold rows of data to the likelihood.

    Args:
        traces: of the examination of the program.
        x: rows of data ``(batch, *event)``, as the program sees them.
        y: of these rows, for a conditional program.
        first: the number of the first row, for the message, or the numbers of all rows.
        support: whether the values are looked at beyond that they are there.

    Raises:
        DataError: values outside the support of the site ``x``; missing or infinite ones (NaN), unless the program gives rows
            with such a finite density: it knows what to do with them.
    """
    if (layout := layout_of(traces.program, x)) is not None:  # what is missing has been said
        for name, column in layout.columns_of(x).items() if support else ():
            _check_support(traces, x, y, first, name, column)
        return
    if not bool(torch.isfinite(x).all()):
        bad = ~torch.isfinite(x).reshape(len(x), -1).all(1)
        if not knows_missing(traces.program, x[bad], None if y is None else y[bad]):
            raise DataError(MISSING.format(_number(first, first_lost(x))))
    if getattr(traces.program, WHOLE, False) and not are_whole(x):
        row = int((x != x.round()).reshape(len(x), -1).any(1).nonzero()[0])
        raise DataError(
            f"the data in row {_number(first, row)} are no whole numbers, and this program takes nothing else (it looks them up)"
        )
    if support:
        _check_support(traces, x, y, first, observation(traces.model), x)


def are_whole(x: Tensor) -> bool:
    """Whether all data are whole numbers."""
    return bool((x == x.round()).all())


def require_range(bounds: tuple[float, float], x: Tensor, ends: tuple[float, float]) -> None:
    """:class:`DataError` for values that no datum of a bounded support comes near: bytes for a program of numbers in [0, 1].

    Args:
        bounds: of the support, :func:`range_of`.
        x: data ``(N, *event)``.
        ends: the least and the largest of them, NaN where one is.
    """
    low, high = bounds
    if not all(map(math.isfinite, ends)):  # what is missing, or beyond all numbers, the program knows what to do with
        known = x.nan_to_num(low)
        ends = float(known.min()), float(known.max())
    if ends[0] < 2 * low - high or ends[1] > 2 * high - low:
        raise DataError(
            f"the data go from {ends[0]:.4g} to {ends[1]:.4g}, and the program's are in [{low:g}, {high:g}]: prepare them as "
            "those that it was trained on, data.observed(split), or x / 255 for bytes"
        )


@found_once
def range_of(traces: Traces) -> tuple[float, float] | None:
    """The bounds of the likelihood's support, where it has two and they are the same in every row."""
    try:
        support = innermost(traces.model.nodes[observation(traces.model)]["fn"]).support
    except NotImplementedError:
        return None
    if support is constraints.boolean:
        return 0.0, 1.0
    low, high = (getattr(support, name, None) for name in ("lower_bound", "upper_bound"))
    if isinstance(low, Tensor) or isinstance(high, Tensor) or low is None or high is None:
        return None
    return float(low), float(high)


def _number(first: int | Tensor, row: int) -> int:
    return int(first[row]) if isinstance(first, Tensor) else first + row


def knows_missing(program: Any, x: Tensor, y: Tensor | None) -> bool:
    """Whether a program gives these rows, which are not finite, log-densities that are."""
    if program is None or (y is None and needs_y(program)):
        return False
    try:
        with seeded(derive_seed("missing entries"), x.device), evaluating(program), isolated():
            terms = trace(program, x, y, num_samples=2).terms(2, len(x))
    except Exception:  # a program that was not written for them fails in any way
        return False
    return bool(torch.isfinite(terms.log_weight).all()) and bool(torch.isfinite(terms.log_guide).all())


def _check_support(traces: Traces, x: Tensor, y: Tensor | None, first: int | Tensor, seen: str, value: Tensor) -> None:
    """Hold what the site ``seen`` observes of these rows, ``value``, to its support."""
    fn = traces.model.nodes[seen]["fn"]
    value = value.reshape(len(x), *fn.event_shape) if fn.event_shape.numel() == value[0].numel() else value
    try:
        support = _of_one_row(fn.support)
        if support is None or traces.known.get(MOVES) or (y is not None and _has_rows(fn.support)):
            with seeded(derive_seed("supports by row"), x.device), evaluating(traces.program), isolated():
                support = trace(traces.program, x, y, num_samples=1).model.nodes[seen]["fn"].support
        inside = _without_draws(support.check(value), 1)
    except RuntimeError:  # bounds that differ by draw, or a class that states no support
        return
    if tuple(inside.shape) != (len(x),) or bool(inside.all()):
        return
    element = support
    while isinstance(element, constraints.independent):
        element = element.base_constraint
    outside = ~inside & torch.isfinite(value).reshape(len(x), -1).all(1)
    by_element = inside
    if element.event_dim == 0:
        by_element = _without_draws(element.check(value), value.dim()) | value.isnan()
    if by_element.shape == value.shape and not bool(by_element.all()):
        outside = ~by_element
    if not bool(outside.any()):
        return
    row = int(outside.reshape(len(x), -1).any(1).nonzero()[0])
    held = f"{float(value[outside][0]):.4g}, outside" if outside.shape == value.shape else "rows outside"
    base = innermost(fn)
    name = type(base).__name__
    advice = "choose a likelihood whose support holds the data (normal: all numbers)"
    known = value.nan_to_num(0.0)
    if float(known.max()) > 1 and bool((known == known.abs().round()).all()):
        advice = "for counts choose poisson or negative-binomial, for grey levels give bytes"
    elif name == "Bernoulli":
        advice = f"binarize grey levels (--binarization dynamic, or data.observed of a binarized data set), or {advice}"
    elif base.support is constraints.nonnegative_integer:
        advice = f"keep counts in a file of float32, since whole numbers are read as grey levels, or {advice}"
    raise DataError(
        f"the data hold {held} the support of the {name} likelihood at the site {seen!r} (first in row "
        f"{_number(first, row)}); {advice}"
    )


def _without_draws(found: Tensor, axes: int) -> Tensor:
    return found[0] if found.dim() == axes + 1 and len(found) == 1 else found


def _has_rows(support: Any) -> bool:
    """Whether a support has bounds of their own for draws and rows."""
    return any(bound.dim() > support.event_dim for _, _, bound in bounds(support))


def _of_one_row(support: Any) -> Any:
    """A support whose bounds were spread over draws and rows, with those of one; None where they differ."""
    if not _has_rows(support):
        return support
    support = copy.deepcopy(support)
    for owner, name, bound in bounds(support):
        if bound.dim() > support.event_dim:
            by_row = bound.reshape(-1, *bound.shape[bound.dim() - support.event_dim :])
            if not bool((by_row == by_row[:1]).all()):
                return None
            setattr(owner, name, by_row[0])
    return support


def moves_bounds(first: Any, second: Any) -> bool:
    """Whether two runs of a model on other data give the likelihood other bounds (a total count of the batch, say)."""
    try:
        a, b = (_of_one_row(fn.support) for fn in (first, second))
    except (RuntimeError, NotImplementedError):
        return False
    return a is not None and b is not None and _numbers(a) != _numbers(b)


def _numbers(constraint: Any) -> list[Any]:
    plain = [v for _, v in sorted(vars(constraint).items()) if isinstance(v, (int, float))]
    inner = [v for _, v in sorted(vars(constraint).items()) if isinstance(v, constraints.Constraint)]
    return [*plain, *(bound.tolist() for _, _, bound in bounds(constraint)), *(n for c in inner for n in _numbers(c))]


def put_inside(site: dict[str, Any]) -> None:
    """Let draws of the likelihood stand for rows of an observed site that are outside of its support."""
    fn, value = site["fn"], site["value"]
    try:
        rows = fn.support.check(value)
    except (RuntimeError, NotImplementedError):
        return
    if rows.shape != value.shape[:1]:
        return
    rows = rows | ~torch.isfinite(value).reshape(len(value), -1).all(1)  # what is missing stays
    if bool(rows.all()):
        return
    try:
        drawn = _draw_by_row(fn, len(value)).to(value.dtype)
    except RuntimeError:  # of parameters that are NaN where data are missing
        return
    site["value"] = torch.where(rows.reshape(-1, *[1] * (value.dim() - 1)), value, drawn)


def draw_like(x: Tensor, fn: Any) -> Tensor:
    """A draw of a likelihood for each row, shaped like x; x where they are of other sizes."""
    if fn.event_shape.numel() != x[0].numel():
        return x
    try:
        return _draw_by_row(fn, len(x)).reshape(x.shape).to(x.dtype)
    except RuntimeError:  # a total count that is read from the batch, which is none yet
        return x


def _draw_by_row(fn: Any, rows: int) -> Tensor:
    drawn: Tensor = fn.sample()
    return drawn.expand(torch.broadcast_shapes(drawn.shape, (1, rows, *fn.event_shape)))[0]


def blank(x: Tensor, kept: Tensor | None = None) -> Tensor:
    """Other data: rows of zeros and of ones by turns, one of which is not the mean, or whatever is read, of x; NaN stay.

    So does what is ``kept`` ``(*event)``: covariates, which a model may read.
    """
    turns = (torch.arange(len(x), device=x.device) % 2).to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
    if bool(((x == turns) | x.isnan()).all()):  # data that are these already
        turns = 1 - turns
    return torch.where(x.isnan() if kept is None else x.isnan() | kept, x, turns)


@dataclass
class Taken:
    """The values of y that a program was run on, by column ``(columns,)``, and whether missing ones were among them."""

    least: Tensor | None = None
    largest: Tensor | None = None
    missing: bool = False

    def add(self, y: Tensor) -> None:
        """These rows were taken too."""
        known, lost = _columns(y)
        least, largest = known.amin(0), known.amax(0)
        self.least = least if self.least is None else torch.minimum(self.least, least)
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        self.missing |= bool(lost.any())

    def beyond(self, y: Tensor) -> Tensor:
        """The numbers of rows in which y is at its ends, or first missing, where these are not known to be taken."""
        known, lost = _columns(y)
        rows = [] if self.missing else [lost.nonzero()[:1, 0]]
        if (
            self.least is None
            or self.largest is None
            or bool((known.amin(0) < self.least).any())
            or bool((known.amax(0) > self.largest).any())
        ):
            rows += [known.argmin(0), known.argmax(0)]
        return torch.cat(rows).unique() if rows else torch.zeros(0, dtype=torch.int64)


def _columns(y: Tensor) -> tuple[Tensor, Tensor]:
    flat = y.detach().reshape(len(y), -1)[:, :MOST_COLUMNS].cpu()
    return flat.nan_to_num() if flat.is_floating_point() else flat.to(torch.int64), ~torch.isfinite(flat).all(1)


def check_conditions(program: Any, y: Tensor, part: Part, taken: Taken | None = None, *, where: str = "") -> None:
    """:class:`DataError` that names a row of y that the program does not take.

    Args:
        program: the Program, which takes the first rows.
        y: ``(N, ...)``.
        part: rows of data and of y, as the program sees them, by their numbers ``(n,)``.
        taken: what is known to be taken, to which these rows are added.
        where: what to say after the number of a row.
    """
    taken = Taken() if taken is None else taken
    rows = taken.beyond(y) if y.numel() else torch.zeros(0, dtype=torch.int64)
    if len(rows) == 0:
        return
    refused = refusal(program, *part(rows))
    if refused is None:
        taken.add(y[rows.to(y.device)])
        return
    flat = y.detach().reshape(len(y), -1).cpu()
    for row in rows.tolist():
        alone = refusal(program, *part(torch.tensor([row])))
        if alone is not None:
            value = f" ({flat[row, 0].item():.4g})" if flat.shape[1] == 1 else ""
            raise DataError(
                f"y in row {row}{where}{value} is none that the program takes: {alone}; expected labels that it has a place for, "
                "and no missing values: relabel, or leave such rows out"
            )
    raise DataError(f"the program does not take y{where}: {refused}")


def refusal(program: Any, x: Tensor, y: Tensor | None) -> str | None:
    """What a program says of these rows; None where it takes them."""
    with seeded(derive_seed("conditions"), x.device), evaluating(program), isolated():
        try:
            traces = trace(program, x, y, num_samples=2)
            missing = y is not None and y.is_floating_point() and not bool(torch.isfinite(y).all())
            if missing and not bool(torch.isfinite(traces.terms(2, len(x)).log_weight).all()):
                return "it gives missing or infinite values no density"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return said(error, 160)
    return None
