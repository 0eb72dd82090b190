"""Does each row stand for itself?

    log p(x_1, ..., x_N) = sum_n log p(x_n)

A program is run on a minibatch, and its densities are read as those of each row: they must not depend on what other rows there
are, how many, or in which order, nor on other draws. Where they do (a mean over the batch, a shape that fits by broadcasting
because there are as many draws as rows, ``torch.arange`` over rows), log p(x) of a row changes with the batch size. It is seen by
running the program on the same rows in another order, some of them twice, with as many draws more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
RUNS, SURE = 3, 10.0  # with other roundings, and how many times what these change at most is still rounding
_ATEN = torch.ops.aten
SUMS = {_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm, _ATEN.convolution, _ATEN.native_layer_norm, _ATEN.cumsum}
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

        def as_they_are(stream: str, part: str = part, function: Any = function) -> Traced:
            return _run(part, function, x, y, latents, DRAWS, stream)

        first = as_they_are("rows as they are")
        second = _run(part, function, x[rows], None if y is None else y[rows], mixed, len(MIXED), "rows mixed")
        if not _other(part, first, second, rows):
            continue
        rounding = _rounding(part, first, lambda: as_they_are("rows as they are"), count)
        found = _other(part, first, second, rows, rounding=rounding)
        if not found:
            continue
        name, again = next(iter(found)), as_they_are("rows as they are, again")
        if _other(part, first, again, torch.arange(count, device=x.device), range(DRAWS), rounding):
            raise ProgramError(
                f"{part}: the density of the site {name!r} is another at every run: random numbers are drawn outside of "
                "pyro.sample; make them a site of model and guide"
            )
        raise ProgramError(
            f"{part}: the density of the site {name!r} in one row depends on the other rows of the batch, on their order or "
            "number, or on other draws: let each row stand for itself (no mean, arange or length over the batch axis, and "
            "what belongs to rows of shape (batch, *event))"
        )


class OtherRounding(TorchDispatchMode):
    """While entered, what sums are made of is moved by up to one rounding, as if another processor had added it up.

    By how much a result then changes is the size of its rounding error, whatever cancelled on the way to it (Parker, Pierce &
    Eggert 2000, Monte Carlo arithmetic, https://doi.org/10.1109/5992.852391).
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation of torch, on moved numbers where it is a sum."""
        if func.overloadpacket in SUMS or torch.Tag.reduction in func.tags:
            args = tuple(self._moved(arg) for arg in args)
        return func(*args, **(kwargs or {}))

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        noise = torch.rand(value.shape, generator=self._random).to(value)
        return value * (1 + torch.finfo(value.dtype).eps * (2 * noise - 1))


def _rounding(part: str, first: Traced, again: Callable[[], Traced], count: int) -> dict[str, Tensor]:
    """By how much rounding may change the density of each site in each row, in nats ``(rows,)``; infinite where by anything."""
    found: dict[str, Tensor] = {}
    for seed in range(RUNS):
        with OtherRounding(derive_seed("roundings of another processor", seed)):
            moved = _other(part, first, again(), torch.arange(count), range(DRAWS), least=0.0)
        for name, by in moved.items():
            worst = SURE * by.nan_to_num(nan=torch.inf, posinf=torch.inf).reshape(-1, count, *by.shape[2:]).amax(0)
            found[name] = torch.maximum(found.get(name, worst), worst)
    return found


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


def _other(
    part: str,
    first: Traced,
    second: Traced,
    rows: Tensor,
    draws: Sequence[int] = MIXED,
    rounding: Mapping[str, Tensor] | None = None,
    least: float | None = None,
) -> dict[str, Tensor]:
    """The sites whose density in the second run is another than that of the same row and draw in the first, and by how much.

    Args:
        part: ``model`` or ``guide``.
        first: a run on some rows.
        second: one on ``rows`` of these, with ``draws`` of its draws.
        rounding: what rounding may do to a site's density by row, beyond what it does to sums of usual size.
        least: nats, and relative, above which a density is another; by default what the dtype allows.
    """
    found: dict[str, Tensor] = {}
    for name, site in first.nodes.items():
        if not is_random(site):
            continue
        other: Any = second.nodes.get(name)
        if other is None or not is_random(other):
            found[str(name)] = torch.full((1, 1), torch.inf)
            continue
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
        tolerance = least if least is not None else WIDE if before.dtype == torch.float64 else NARROW
        allowed = tolerance * (1 + after.abs().nan_to_num(posinf=0.0))
        if rounding and name in rounding:
            allowed = allowed + rounding[name].to(allowed)[rows]
        by = (before - after).abs()
        same = (before == after) | (before.isnan() & after.isnan()) | (by <= allowed) | allowed.isinf()
        if not bool(same.all()):
            found[str(name)] = torch.where(same, torch.zeros_like(by), by)
    return found


def _whole(value: Tensor, axes: int, rows: Tensor) -> Tensor:
    """A tensor with its axes of draws and rows, ``(draws, rows, *event)``, whatever of these it had left out."""
    count = int(rows.max()) + 1
    return value.expand(DRAWS, count, *value.shape[value.dim() - axes :])
