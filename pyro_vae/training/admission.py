"""What is held to what before the first step: the program to its contract, and every row of data to the likelihood.

Rows in memory are looked at once, before anything is written. Of data on a lattice of levels it is the levels that are looked
at, not the rows: none at all where they are binarized, and a count of the levels present where they are not. The items of a
torch Dataset are looked at when they are read.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_vae.data import Data
from pyro_vae.errors import DataError, UserError, warn
from pyro_vae.evaluation.blind import require_scores
from pyro_vae.evaluation.degenerate import DegenerateFitWarning, ignored_marks
from pyro_vae.programs import contract
from pyro_vae.programs.columns import layout_of
from pyro_vae.programs.labels import takes_y
from pyro_vae.programs.trace import Traces, innermost, observation, to_program, y_to_program
from pyro_vae.programs.values import check_conditions, check_observed
from pyro_vae.seeding import ONE_THREAD
from pyro_vae.training.rehearsal import rehearse
from pyro_vae.training.source import Batch, DatasetSource, Source

FIRST_ROWS = 8  # on which a program is run to be checked
BLOCK_ELEMENTS = 2**22  # of rows that are looked at together


def admit(program: Any, data: Any, source: Source, objective: Any, batch: int) -> tuple[tuple[int, ...], list[str]]:
    """Hold a program to its contract and objective, and the data to the likelihood, before anything is written.

    Args:
        program: the Program, on its device.
        data: what the user gave.
        source: its rows.
        objective: what will be minimised.
        batch: rows of a minibatch.

    Returns:
        The shape of one datum, and the names of the buffers that training changes.

    Raises:
        UserError: a program that breaks the contract, cannot take such data, or cannot be trained on such a minibatch.
        DataError: a row outside the support of the likelihood, or not finite where the program does not know what to do.
    """
    with ONE_THREAD, torch.random.fork_rng(devices=[] if not torch.cuda.is_available() else None):
        x, y = source.batch(torch.arange(min(FIRST_ROWS, source.num_rows)))
        traces = _checked(program, x, y, data if isinstance(data, Data) else None, batch)
        require_scores(traces)
        _require_records(program, x, traces, objective)
        if marks := ignored_marks(traces, objective):
            warn(marks, DegenerateFitWarning)
        if isinstance(source, DatasetSource):
            source.look = lambda rows, x, y: _look_at(traces, source.prepare(x), y, rows)
        elif not (isinstance(data, Data) and _levels_fit(traces, data, x)):
            for rows in _blocks(source.num_rows, x[0].numel()):
                _look_at(traces, *source.batch(rows), rows, data if isinstance(data, Data) else None)
            if isinstance(data, Data):
                _look_at_validation(traces, data, program)
        if y is not None:
            _look_at_conditions(program, source, data)
        moving = rehearse(program, objective, x, y, batch)
    if isinstance(data, Data) and data.levels and data.binarization == "none" and data.dequantization == "none":
        support = traces.model.nodes[observation(traces.model)]["fn"].support
        if not support.is_discrete:
            _warn_lattice(data)
    return tuple(x.shape[1:]), moving


def _require_records(program: Any, x: Tensor, traces: Traces, objective: Any) -> None:
    """:class:`UserError` for records that an objective, or its gradient, would not be right for."""
    layout = layout_of(program, x)
    if layout is None:
        return
    if not objective.records:
        raise UserError("the objective is not made for records: use elbo, analytic-elbo, iwae or wake-sleep")
    for name in layout.left_out() if layout.read else ():
        if not traces.model.nodes[name]["fn"].has_rsample:
            raise UserError(
                f"missing entries of {name!r} are read by later sites and drawn from a distribution that is not reparameterized: "
                f"its gradient is not made; give the guide a site {name!r}, or leave such rows out"
            )


def _checked(program: Any, x: Tensor, y: Tensor | None, data: Data | None, batch: int) -> Traces:
    """The traces of a run on the first rows; what is wrong with one of these is said as of any other."""
    try:
        return contract.admit(program, x, y, values=False, count=batch)
    except DataError as error:
        missing = (~torch.isfinite(x)).flatten(1).any(1)
        for row in missing.nonzero().flatten().tolist() or range(len(x)):
            try:
                contract.admit(program, x[row : row + 1], None if y is None else y[row : row + 1], values=False)
            except DataError:
                raise DataError(f"{error}{_place(x[row], row, data)}") from None
        raise


def _blocks(num_rows: int, width: int) -> tuple[Tensor, ...]:
    return torch.arange(num_rows).split(max(1, BLOCK_ELEMENTS // max(1, width)))


def _look_at(traces: Traces, x: Tensor, y: Tensor | None, rows: Tensor, data: Data | None = None) -> None:
    """:class:`DataError` that names the first of these rows that the program cannot take."""
    try:
        check_observed(traces, x, y, first=int(rows[0]))
    except DataError:
        missing = ~torch.isfinite(x).reshape(len(x), -1).all(1)
        for i in [*missing.nonzero()[:, 0].tolist(), *(~missing).nonzero()[:, 0].tolist()]:
            row = int(rows[i])
            try:
                check_observed(traces, x[i : i + 1], None if y is None else y[i : i + 1], first=row)
            except DataError as error:
                raise DataError(f"{error}{_place(x[i], row, data)}") from None
        raise
    _require_squares(x)


def _place(x: Tensor, row: int, data: Data | None) -> str:
    """Where in the row, and in the user's file, the value is."""
    missing = (~torch.isfinite(x)).nonzero()
    column = "" if len(missing) == 0 else f"; in row {row}, it is column {', '.join(str(int(i)) for i in missing[0])}"
    kept = None if data is None else data.rows.get("train")
    return (
        column
        if kept is None or data is None
        else f"{column}; row {row} of the training split is row {int(kept[row])} of {data.name}"
    )


def _look_at_conditions(program: Any, source: Source, data: Any) -> None:
    """Hold the labels of all splits that training reads to what the program takes."""
    if source.labels is not None:
        check_conditions(program, source.labels, source.batch)
    if isinstance(data, Data) and (labels := data.labels.get("validation")) is not None and len(data.validation):

        def part(rows: Tensor) -> Batch:
            return to_program(program, data.drawn("validation", rows=rows)), y_to_program(program, labels[rows])

        check_conditions(program, labels, part, where=" of the validation split")


def _look_at_validation(traces: Traces, data: Data, program: Any) -> None:
    labels = data.labels.get("validation")
    for rows in _blocks(len(data.validation), math.prod(data.event_shape)) if len(data.validation) else ():
        y = None if labels is None or not takes_y(program) else y_to_program(program, labels[rows])
        try:
            check_observed(traces, to_program(program, data.drawn("validation", rows=rows)), y, first=int(rows[0]))
        except DataError as error:
            raise DataError(f"in the validation split, {error}") from None


def _levels_fit(traces: Traces, data: Data, like: Tensor) -> bool:
    """Whether all values that data on a lattice can have are in a support that is one of single elements."""
    if data.levels is None or innermost(traces.model.nodes[observation(traces.model)]["fn"]).support.event_dim > 0:
        return False
    if data.binarization != "none":
        values = torch.tensor([0.0, 1.0])
    elif data.dequantization != "none":
        values = torch.tensor([0.5, data.levels - 0.5]) / data.levels  # strictly inside of (0, 1), as all are
    else:
        values = _levels_present(data).nonzero().flatten().to(torch.float32) / (data.levels - 1)
    every = values.to(like).view(-1, *[1] * (like.dim() - 1)).expand(-1, *like.shape[1:])
    try:
        check_observed(traces, every)
    except DataError:
        return False  # the pass over the rows says which
    return True


def _levels_present(data: Data) -> Tensor:
    """How often each level occurs in the training and validation splits."""
    counts = torch.zeros(data.levels or 0, dtype=torch.int64)
    for split in ("train", "validation"):
        stored = data.stored(split)
        for rows in _blocks(len(stored), math.prod(data.event_shape)) if len(stored) else ():
            counts += torch.bincount(stored[int(rows[0]) : int(rows[-1]) + 1].flatten(), minlength=len(counts))
    return counts


def _require_squares(x: Tensor) -> None:
    most, limit = float(x.abs().nan_to_num(0.0).max()), math.sqrt(torch.finfo(x.dtype).max)
    if most > limit:
        raise UserError(
            f"the data reach {most:.3g}, and {str(x.dtype).removeprefix('torch.')} holds no squares of numbers above "
            f"{limit:.3g}: rescale them, to a spread of about 1"
        )


def _warn_lattice(data: Data) -> None:
    warn(
        f"a density is put on {data.name}, whose values lie on {data.levels} levels: its log-likelihood grows without bound as "
        'scales shrink, and has no bits per dimension; load the data with dequantization="uniform"',
        UserWarning,
    )
