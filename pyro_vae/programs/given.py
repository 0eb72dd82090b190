"""What a tensor of data, and what a program is conditioned on, have to be before a program sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_vae.errors import DataError, UserError
from pyro_vae.programs.trace import accepts_y, needs_y

REMEDIES = {
    "complex": "give real and imaginary parts as numbers of their own, torch.view_as_real(x)",
    "meta": "a tensor on the meta device has no values",
}


def require_rows(x: Any, program: Any = None) -> None:
    """:class:`UserError` unless ``x`` is a dense tensor ``(N, *event)`` of one row at least, of the event shape if known."""
    if not isinstance(x, Tensor):
        raise UserError(f"expected data as a torch tensor (N, *event), got {type(x).__name__}")
    require_dense(x, "the data")
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
