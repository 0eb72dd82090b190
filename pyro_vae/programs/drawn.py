"""Columns that a model makes, given some of them.

x ~ p(x_A | x_B = given),   for columns B whose density depends on no latent: the others are drawn by going down the model
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_vae.data.record import Record
from pyro_vae.errors import UserError, nearest, said
from pyro_vae.programs.columns import LAYOUTS, TWIN, Layout, layout_of, packed
from pyro_vae.programs.contract import require_program
from pyro_vae.programs.following import Following, From, densities_reached
from pyro_vae.programs.latents import expected
from pyro_vae.programs.trace import (
    Traced,
    device_of,
    evaluating,
    factors,
    innermost,
    isolated,
    run,
    to_program,
)
from pyro_vae.seeding import derive_seed, seeded
from pyro_vae.signatures import checked


@checked
def sample_columns(
    program: Any,
    num_samples: int = 64,
    *,
    given: Mapping[str, Any] | None = None,
    columns: Mapping[str, Any] | None = None,
    mean: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Draws of every column from the model, ``(num_samples, *column)`` by name, with some held at values.

    Args:
        program: any Program with columns.
        num_samples: how many.
        given: values of columns by name, one for all draws (``{"label": 7}``) or one for each.
        columns: the shape of a row of each column by name, where the program was not run on a record before and has no attribute
            ``columns`` that says it.
        mean: the mean of each column given the latents and columns that it depends on, in place of a draw; of classes their
            probabilities. Of columns that are given, the values.
        seed: of the draws; torch's generators are put back.

    Raises:
        UserError: given columns that the model draws after latents: what is left is then no draw given these
            (:func:`pyro_vae.impute` draws from that); a model with a ``pyro.factor``.

    Example:
        >>> import pyro_vae as pv
        >>> m2 = pv.build("semi-supervised", "diagonal", (1, 4, 4), latent_dim=2)
        >>> sorted((n, tuple(v.shape)) for n, v in sample_columns(m2, 3, given={"label": 7}).items())
        [('label', (3,)), ('x', (3, 1, 4, 4))]
    """
    require_program(program)
    if num_samples < 1:
        raise UserError(f"sample_columns: expected num_samples of at least 1, got {num_samples}")
    shapes, held = _shapes(program, columns), dict(given or {})
    if unknown := [name for name in held if name not in shapes]:
        raise UserError(f"given: the program has no column {unknown[0]!r}: {nearest(unknown[0], shapes)}")
    values = {name: _given(name, held.get(name), shape, num_samples) for name, shape in shapes.items()}
    present = {name: torch.full((num_samples,), name in held) for name in shapes}
    x = to_program(program, packed(program, Record(values, present), whole=True))
    layout = layout_of(program, x)
    with evaluating(program), isolated(), seeded(derive_seed("sampled columns", seed), device_of(program)):
        following, chosen = Following(), lambda name: name.removesuffix(TWIN) not in held
        try:
            with following, From(following, chosen):
                traced = run(program.model, x)
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(
                f"the model does not run with {', '.join(held) or 'nothing'} given: {said(error)}"
            ) from None
        if found := factors(traced):
            raise UserError(f"the model's pyro.factor {found[0]!r} has no part in samples: draw from posteriors")
        for name in [name for name in held if name in traced.nodes]:
            site = traced.nodes.get(name + TWIN, traced.nodes[name])
            if not bool(
                site.get("whole", site["fn"])
                .support.check(values[name].reshape(num_samples, *site["fn"].event_shape))
                .all()
            ):
                raise UserError(
                    f"given: {name!r} has values that its distribution ({type(innermost(site['fn'])).__name__}) has not"
                )
        reached = densities_reached(following, traced, chosen)
        _require_first(traced, [*held] if following.left else reached, held)
        drawn = {n: _drawn(traced, layout, n, mean) for n in shapes if n in traced.nodes and n not in held}
    for name, value in drawn.items():
        own = value.shape[1 + len(traced.nodes[name]["fn"].event_shape) :]  # probabilities, of classes
        drawn[name] = value.expand(num_samples, *value.shape[1:]).reshape(num_samples, *shapes[name], *own)
    return {n: values[n] if n in held else drawn[n] for n in shapes if n in held or n in drawn}


def _shapes(program: Any, columns: Mapping[str, Any] | None) -> dict[str, tuple[int, ...]]:
    """The shape of a row of each column."""
    own = columns if columns is not None else getattr(program, "columns", None)
    if own is not None:
        return {name: tuple(shape) for name, shape in own.items()}
    layouts: list[Layout] = vars(program).get(LAYOUTS, [])
    if not layouts:
        raise UserError(
            f"{type(program).__name__} does not say which columns it has: pass columns={{'image': (1, 28, 28), 'label': ()}}"
        )
    return {column.name: column.shape for column in layouts[0].columns}


def _given(name: str, value: Any, shape: tuple[int, ...], rows: int) -> Tensor:
    if value is None:
        return torch.zeros(rows, *shape)
    found = torch.as_tensor(value)
    found = found.expand(rows, *shape) if found.shape == shape else found
    if found.shape[1:] != shape:
        raise UserError(f"given: expected {name!r} as {shape}, or one such for each draw, got {tuple(found.shape)}")
    return found if len(found) == rows else found[torch.arange(rows) % len(found)]


def _require_first(traced: Traced, reached: list[str], held: Mapping[str, Any]) -> None:
    """:class:`UserError` where what is given has a density that is made of what is drawn."""
    for name in (one.removesuffix(TWIN) for one in reached if one.removesuffix(TWIN) in held):
        if name not in traced.nodes:  # a covariate
            continue
        family = type(innermost(traced.nodes[name]["fn"])).__name__
        raise UserError(
            f"given: the model draws {name!r} ({family}) after latents, and what goes down the model is no "
            "draw given it: use pv.impute(program, record), which weighs"
        )


def _drawn(traced: Traced, layout: Layout | None, name: str, mean: bool) -> Tensor:
    site = traced.nodes[name]
    fn = site.get("whole", site["fn"])
    if mean:
        return expected(fn)
    drawn_there = not site["is_observed"] or layout is None or layout.read is not False
    value: Tensor = site["value"] if drawn_there else fn.sample()
    return value
