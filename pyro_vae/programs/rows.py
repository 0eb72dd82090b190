"""Does each row stand for itself?

    log p(x_1, ..., x_N) = sum_n log p(x_n)

A program is run on a minibatch, and its densities are read as those of each row: they must not depend on what other rows there
are, how many, or in which order, nor on other draws. Where they do (a mean over the batch, a shape that fits by broadcasting
because there are as many draws as rows, ``torch.arange`` over rows), log p(x) of a row changes with the batch size. It is seen by
running the program on the same rows in another order, some of them twice, with as many draws more.
"""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from torch import Tensor

from pyro_vae.errors import ProgramError
from pyro_vae.programs.trace import (
    SAMPLE_PLATE,
    AtValues,
    Traced,
    arguments,
    innermost,
    is_random,
    latent_sites,
    site_log_prob,
)
from pyro_vae.seeding import derive_seed, seeded

WIDE, NARROW = 1e-7, 2e-4  # nats, and relative, in float64 and float32: products of other shapes round otherwise
ROWS, DRAWS = 4, 6  # that are looked at: latents of few values must differ somewhere
MIXED = (*reversed(range(DRAWS)), 0)  # the draws of the second run
AGAIN = (6, 2, 1, 0)  # how often a row is there again: so unevenly that a mean, of few values too, moves
PLAIN = "torch.distributions.transforms"  # whose inverses are exact; those of flows are not


def check_rows(program: Any, x: Tensor, y: Tensor | None, *, alone: bool = False) -> None:
    """:class:`ProgramError` where a density depends on other rows or draws; to be called inside of ``isolated``.

    Args:
        program: the Program.
        x: a few rows of data; four of them are used.
        y: of these, for a conditional program.
        alone: look at the model alone, with latents of its own.
    """
    x, y = x[:ROWS], None if y is None else y[:ROWS]
    count = len(x)
    rows = torch.tensor(
        [*reversed(range(count)), *(i for i, n in enumerate(AGAIN[:count]) for _ in range(n))], device=x.device
    )
    parts = [("model", program.model)] if alone else [("guide", program.guide), ("model", program.model)]
    part, function = parts[0]
    drawn = _run(part, function, x, y, {}, DRAWS, "draws of the latents")
    latents = {n: s["value"].expand(DRAWS, count, *s["fn"].event_shape) for n, s in latent_sites(drawn).items()}
    mixed = {n: v[list(MIXED)][:, rows] for n, v in latents.items()}
    for part, function in parts:
        first = _run(part, function, x, y, latents, DRAWS, "rows as they are")
        other_y = None if y is None else y[rows]
        second = _run(part, function, x[rows], other_y, mixed, len(MIXED), "rows in another order")
        name = _other(part, first, second, rows)
        if name is None:
            continue
        again = _run(part, function, x, y, latents, DRAWS, "rows as they are, again")
        if _other(part, first, again, torch.arange(count, device=x.device), draws=tuple(range(DRAWS))) is not None:
            raise ProgramError(
                f"{part}: the density of the site {name!r} is another at every run: random numbers are drawn outside of "
                "pyro.sample; make them a site of model and guide"
            )
        raise ProgramError(
            f"{part}: the density of the site {name!r} in one row depends on the other rows of the batch, on their order or "
            "number, or on other draws: let each row stand for itself (no mean, arange or length over the batch axis, and "
            "what belongs to rows of shape (batch, *event))"
        )


def log_prob_of(part: str, name: str, site: dict[str, Any], value: Tensor | None = None) -> Tensor:
    """The log-density of a site; :class:`ProgramError` where it has none at what was drawn for it."""
    try:
        return site_log_prob(site, value)
    except NotImplementedError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        said = " ".join(str(error).split())[:200]
        raise ProgramError(
            f"{part}: the site {name!r} has no log_prob at what was drawn for it ({type(error).__name__}: {said}); give guide "
            "and model the same support"
        ) from error


def _run(
    part: str, function: Any, x: Tensor, y: Tensor | None, latents: dict[str, Tensor], draws: int, stream: str
) -> Traced:
    seed = derive_seed("does each row stand for itself", stream)
    try:
        with seeded(seed, x.device), pyro.plate(SAMPLE_PLATE, draws, dim=-2), _Points(latents):
            return poutine.trace(function).get_trace(*arguments(x, y))
    except (RuntimeError, ValueError, IndexError) as error:
        said = " ".join(str(error).partition("Trace Shapes:")[0].split())[:200]
        raise ProgramError(
            f"{part}: it does not run on {draws} draws of {len(x)} row{'s'[: len(x) != 1]} of data, though on 2 "
            f"({type(error).__name__}: {said}): write the axis of rows as the last of the batch, (num_samples, batch, *event)"
        ) from error


class _Points(AtValues):
    """Give latents their values, but for point masses, whose density elsewhere is none."""

    def _pyro_sample(self, msg: Any) -> None:
        if not isinstance(innermost(msg["fn"]), Delta):
            super()._pyro_sample(msg)


def _other(part: str, first: Traced, second: Traced, rows: Tensor, draws: tuple[int, ...] = MIXED) -> str | None:
    """The first site whose density in the second run is another than that of the same row and draw in the first."""
    for name, site in first.nodes.items():
        if not is_random(site):
            continue
        other: Any = second.nodes.get(name)
        if other is None or not is_random(other):
            return str(name)
        if part == "guide" and any(
            type(t).__module__ != PLAIN for t in getattr(innermost(site["fn"]), "transforms", ())
        ):
            continue
        axes = len(site["fn"].event_shape)
        value = _whole(site["value"], axes, rows)[list(draws)][:, rows]
        if isinstance(innermost(site["fn"]), Delta):
            before, after = value, other["value"].expand(value.shape)
        else:
            try:
                before = _whole(log_prob_of(part, name, site), 0, rows)[list(draws)][:, rows]
                after = log_prob_of(part, name, other, value).expand(before.shape)
            except (NotImplementedError, KeyError):  # a flow that scores its own draws alone
                continue
        tolerance = WIDE if before.dtype == torch.float64 else NARROW
        if not torch.allclose(before, after, rtol=tolerance, atol=tolerance, equal_nan=True):
            return str(name)
    return None


def _whole(value: Tensor, axes: int, rows: Tensor) -> Tensor:
    """A tensor with its axes of draws and rows, ``(draws, rows, *event)``, whatever of these it had left out."""
    count = int(rows.max()) + 1
    return value.expand(DRAWS, count, *value.shape[value.dim() - axes :])
