"""What a tensor of data, and what a program is conditioned on, have to be before a program sees them."""

from __future__ import annotations

import operator
from typing import Any, NoReturn

import torch
from torch import Tensor

from pyro_vae.errors import DataError, UserError, said
from pyro_vae.programs.columns import layout_of
from pyro_vae.programs.labels import accepts_y, needs_y

MISSING = (
    "the data have NaN or infinite values (first in row {0}); remove or impute them, or give the program a likelihood that "
    "leaves missing entries out (dist.NanMaskedNormal, .mask) and a guide that reads around them"
)
_AXES = (
    "; every axis but that of the data plate is an event axis: write .to_event(n); and the plate is not subsampled, for the "
    "library does the minibatching"
)
REMEDIES = {
    "complex": "give real and imaginary parts as numbers of their own, torch.view_as_real(x)",
    "meta": "a tensor on the meta device has no values",
}


def require_rows(x: Any, program: Any = None) -> None:
    """:class:`UserError` unless ``x`` is a dense tensor ``(N, *event)`` of one row at least, of the event shape if known."""
    if not isinstance(x, Tensor):
        raise UserError(f"expected data as a torch tensor (N, *event), got {type(x).__name__}")
    require_dense(x, "the data")
    if layout_of(program, x) is not None:
        return
    shape, expected = tuple(x.shape), getattr(program, "event_shape", None)
    whole = f"(N, {', '.join(map(str, expected or ()))})"
    if expected is not None and shape == tuple(expected):
        raise UserError(f"expected data {whole}, got a lone datum of shape {shape}: give it a batch axis, x[None]")
    if x.dim() < 2 or x.numel() == 0:
        lone = (
            "; a lone datum needs a batch axis, x[None], and N numbers an event axis, x[:, None]" if x.dim() < 2 else ""
        )
        raise UserError(f"expected data (N, *event) with at least one row, got {shape}{lone}")
    if expected is not None and shape[1:] != tuple(expected):
        raise UserError(f"expected data {whole}, as {type(program).__name__}.event_shape says, got {shape}")


def require_y(program: Any, num_rows: int | None, y: Any) -> None:
    """:class:`UserError` unless ``y`` is what the program takes: a dense tensor of as many rows as x (if known), or None."""
    if y is None:
        if needs_y(program):
            raise UserError("the program is conditional, model(x, y): give y, one row for each row of x")
        return
    if not accepts_y(program):
        raise UserError(f"{type(program).__name__} takes no y: its model has one argument; leave y out")
    if not isinstance(y, Tensor) or y.dim() < 1 or len(y) != (len(y) if num_rows is None else num_rows):
        got = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        rows = "N" if num_rows is None else num_rows
        raise UserError(f"expected y as a torch tensor ({rows}, ...), one row for each row of x, got {got}")
    require_dense(y, "y")


def require_dense(x: Tensor, what: str) -> None:
    """:class:`DataError` for a tensor that does not hold all its numbers, one after the other, as real ones."""
    kind = (
        "nested" if x.is_nested
        else "complex" if x.is_complex()
        else "quantized" if x.is_quantized
        else "meta" if x.device.type == "meta"
        else f"{x.element_size() * 8}-bit floating" if x.is_floating_point() and x.element_size() < 2
        else str(x.layout).removeprefix("torch.").replace("_", " ") if x.layout != torch.strided
        else None
    )  # fmt: skip
    if kind is not None:
        remedy = REMEDIES.get(
            kind, "convert it, x.float()" if "bit" in kind else "convert it, x.to_dense() of a sparse one"
        )
        raise DataError(f"{what}: expected a dense tensor of real numbers, got a {kind} one; {remedy}")


def refuse_run(program: Any, x: Tensor, y: Tensor | None, error: Exception) -> NoReturn:
    """:class:`UserError` that says why a program does not run on data x, given y."""
    if layout_of(program, x) is None and not torch.isfinite(x).all():
        raise DataError(MISSING.format(first_lost(x))) from error
    if y is not None and y.is_floating_point() and not torch.isfinite(y).all():
        raise DataError(
            f"y has NaN or infinite values (first in row {first_lost(y)}), which the program does not take: impute them, or "
            "leave such rows out"
        ) from error
    words, layout = said(error, 300), layout_of(program, x)
    if layout is not None:
        columns = ", ".join(f"{c.name} {c.shape}" for c in layout.columns)
        raise UserError(
            f"the program {type(program).__name__} does not run on a record of the columns {columns}: {words}; a program reads "
            "them by name, x['NAME'], and one that does not is given a torch tensor"
        ) from error
    kind = None if y is None else str(y.dtype).removeprefix("torch.")
    beside = "" if y is None else f" and y of shape {tuple(y.shape[1:])} per row, {kind}"
    raise UserError(
        f"the program {type(program).__name__} does not run on data of shape {tuple(x.shape[1:])} per row{beside}: {words}"
        + (_AXES if "Shape mismatch inside plate" in words else "")
    ) from error


def first_lost(x: Tensor) -> int:
    """The number of the first row that is not finite."""
    return int((~torch.isfinite(x)).reshape(len(x), -1).any(1).nonzero()[0])


def event_shape_of(program: Any, event_shape: Any) -> tuple[int, ...]:
    """The shape of a datum: the one given, or what the program says; :class:`UserError` where neither is."""
    shape = event_shape if event_shape is not None else getattr(program, "event_shape", None)
    if shape is None:
        raise UserError(
            f"{type(program).__name__} does not say the shape of a datum: set program.event_shape or pass event_shape="
        )
    try:
        found = tuple(operator.index(n) for n in shape)
    except TypeError:
        found = (-1,)
    if isinstance(shape, str) or any(n < 1 for n in found):
        raise UserError(f"expected event_shape as whole numbers of at least 1, (C, H, W), say, got {shape!r}")
    return found
