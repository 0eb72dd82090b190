"""Encoder and decoder as graphs of tensors, to be run where there is neither Pyro nor this library.

    encoder: x -> the guide's mean of every latent site          decoder: latents -> the mean of p(x | z)

They are ``torch.export`` programs (https://docs.pytorch.org/docs/stable/export.html): ``torch.export.load(path).module()``
is called with a batch of any size, on the device that they were exported on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.export import Dim, ExportedProgram

from pyro_vae.errors import UserError, nearest
from pyro_vae.paths import made, replacing, writable_folder
from pyro_vae.programs.contract import require_program
from pyro_vae.programs.given import event_shape_of
from pyro_vae.programs.labels import needs_y
from pyro_vae.programs.latents import point_of, sample, sample_latents
from pyro_vae.programs.trace import (
    AtValues,
    Program,
    device_of,
    dtype_of,
    evaluating,
    innermost,
    isolated,
    latent_values,
    observation,
    run,
    y_to_program,
)

PARTS = ("encoder", "decoder")
ROWS = 3  # of the example; the batch is left open


def export(
    program: Program,
    out: str | Path | None = None,
    *,
    parts: Sequence[str] = PARTS,
    y: Tensor | None = None,
    event_shape: Any = None,
) -> dict[str, ExportedProgram]:
    """Export a program's encoder and decoder.

    Args:
        program: any Program whose guide and likelihood have means in closed form.
        out: a folder to write ``encoder.pt2`` and ``decoder.pt2`` into; None to write nothing.
        parts: which of the two.
        y: for a conditional program, three rows of what it is conditioned on, as an example.
        event_shape: of one datum, where the program does not say it as ``program.event_shape``.

    Returns:
        The exported programs by name. The encoder takes x ``(N, *event)`` and gives a dict of the sites' means
        ``(N, *latent)``; the decoder takes such a dict and gives ``(N, *event)``. A conditional program's take y after it.

    Raises:
        UserError: a folder that cannot be written into; a part that is unknown, or whose mean has no closed form; a structure
            that ``torch.export`` cannot follow.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.build("ppca", "linear", (3,), latent_dim=2)
        >>> exported = pv.export(vae)
        >>> exported["encoder"].module()(torch.zeros(7, 3))["z"].shape
        torch.Size([7, 2])
    """
    require_program(program)
    for part in parts:
        if part not in PARTS:
            raise UserError(f"unknown part {part!r}: {nearest(part, PARTS)}")
    if needs_y(program) and (y is None or len(y) != ROWS):
        raise UserError(f"the program is conditional, model(x, y): give y, {ROWS} rows as an example")
    folder = None if out is None else writable_folder(out, tuple(f"{part}.pt2" for part in parts))
    shape = event_shape_of(program, event_shape)
    examples: dict[str, Any] = {
        "encoder": sample(program, ROWS, y, event_shape=shape),
        "decoder": sample_latents(program, ROWS, y, event_shape=shape),
    }
    modules: dict[str, nn.Module] = {"encoder": _Encoder(program), "decoder": _Decoder(program, shape)}
    found = {}
    for part in parts:
        args = (examples[part],) if y is None else (examples[part], y_to_program(program, y))
        with evaluating(program), isolated():
            found[part] = _exported(part, modules[part], args)
    if folder is not None:
        with made(folder):
            for part, one in found.items():
                with replacing(folder / f"{part}.pt2") as temporary:
                    torch.export.save(one, temporary)
    return found


def _exported(part: str, module: nn.Module, args: tuple[Any, ...]) -> ExportedProgram:
    shapes = tuple({n: {0: Dim.AUTO} for n in a} if isinstance(a, dict) else {0: Dim.AUTO} for a in args)
    try:
        return torch.export.export(module, args, dynamic_shapes=shapes, strict=False)
    except NotImplementedError:
        raise UserError(
            f"the {part} has no mean in closed form to export: choose another guide or likelihood, or the other part"
        ) from None
    except Exception as error:  # the exporter fails in as many ways as a program can be written
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"the {part} cannot be exported: torch.export says {why[:200]!r}") from error


def _closed_form(fn: Any) -> Tensor:
    """The mode of class numbers, and the mean of anything else, as ``encode`` gives them."""
    mean: Tensor = point_of(fn) if isinstance(innermost(fn), Categorical) else fn.mean
    return mean


class _Encoder(nn.Module):
    def __init__(self, program: Any) -> None:
        super().__init__()
        self.program = program

    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        """The means of the latent sites, each given those of the sites before it."""
        return latent_values(run(self.program.guide, x, y, at=AtValues({}, default=_closed_form)))


class _Decoder(nn.Module):
    def __init__(self, program: Any, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.program, self.event_shape = program, event_shape

    def forward(self, latents: dict[str, Tensor], y: Tensor | None = None) -> Tensor:
        """The mean of the data."""
        rows = next(iter(latents.values())).shape[0]
        x = torch.zeros(rows, *self.event_shape, dtype=dtype_of(self.program), device=device_of(self.program))
        traced = run(self.program.model, x, y, at=latents)
        mean: Tensor = traced.nodes[observation(traced)]["fn"].mean
        return mean.expand(rows, *self.event_shape)
