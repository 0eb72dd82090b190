"""Does each row stand for itself?

    log p(x_1, ..., x_N) = sum_n log p(x_n)

A program is run on a minibatch, and its densities are read as those of each row: they must not depend on what other rows there
are, how many, or in which order, nor on other draws. Where they do (a mean over the batch, a shape that fits by broadcasting
because there are as many draws as rows, ``torch.arange`` over rows), log p(x) of a row changes with the batch size. It is seen by
running the program on the same rows in another order, some of them twice, with as many draws more; and, where it is given
more rows than that, on as many, up to 256. A program that couples rows only in larger batches passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae.errors import ProgramError, said
from pyro_vae.programs.trace import Traced, innermost, is_random, site_log_prob
from pyro_vae.seeding import derive_seed

WIDE, NARROW = 1e-7, 2e-4  # nats, and relative, in float64 and float32: products of other shapes round otherwise
ROWS, DRAWS = 8, 6  # that a program is looked at on: latents of few values must differ somewhere
MIXED = (*reversed(range(DRAWS)), 0)  # the draws of the second run
AGAIN = (6, 2, 1, 0)  # how often a row is there again: so unevenly that a mean, of few values too, moves
ORDER = (*reversed(range(ROWS)), *(i for i, n in enumerate(AGAIN) for _ in range(n)))  # the rows of the second run
MANY, FEW_DRAWS = (
    256,
    (1, 0),
)  # rows up to which a program is looked at on as many as it is given, and then on these draws
RUNS, SURE = (
    3,
    100.0,
)  # with other roundings; by how much more than these rounding may change a density (a square of it)
_ATEN = torch.ops.aten
SUMS = {_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm, _ATEN.convolution, _ATEN.native_layer_norm, _ATEN.cumsum}
PLAIN = "torch.distributions.transforms"  # whose inverses are exact; those of flows are not


class AxesError(ProgramError):
    """Axes that are not those of samples, rows and events: they may be where samples are folded into rows."""


class PlaceError(AxesError):
    """A site without an axis of rows, or with more plates than that one, as the program runs so far."""


class DependenceError(AxesError):
    """A density that depends on what it must not: other rows, other draws, or the data that it is to explain."""


def in_order(rows: int) -> tuple[int, ...]:
    """The rows of the second run, the first of them again where there are to be more."""
    return ORDER + (0,) * (rows - len(ORDER))


def log_prob_of(part: str, name: str, site: dict[str, Any], value: Tensor | None = None) -> Tensor:
    """The log-density of a site; :class:`ProgramError` where it has none at what was drawn for it."""
    try:
        return site_log_prob(site, value)
    except NotImplementedError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        raise ProgramError(
            f"{part}: the site {name!r} has no log_prob at what was drawn for it ({said(error)}); give guide and model the same "
            "support"
        ) from error


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


def rounding_of(part: str, first: Traced, again: Callable[[], Traced]) -> dict[str, Tensor]:
    """By how much rounding may change the density of each site in each row, in nats ``(rows,)``; infinite where by anything.

    Args:
        part: ``model`` or ``guide``.
        first: a run on 6 draws of 8 rows.
        again: makes the same run again.
    """
    found: dict[str, Tensor] = {}
    for seed in range(RUNS):
        with OtherRounding(derive_seed("roundings of another processor", seed)):
            moved = differences(part, first, again(), range(ROWS), range(DRAWS), least=0.0)
        for name, by in moved.items():
            worst = SURE * by.nan_to_num(nan=torch.inf, posinf=torch.inf).amax(tuple({0, *range(2, by.dim())}))
            found[name] = torch.maximum(found.get(name, worst), worst)
    return found


def differences(
    part: str,
    first: Traced,
    second: Traced,
    rows: Sequence[int] = ORDER,
    draws: Sequence[int] = MIXED,
    rounding: Mapping[str, Tensor] | None = None,
    least: float | None = None,
) -> dict[str, Tensor]:
    """The sites whose density in the second run is another than that of the same row and draw in the first, and by how much.

    Args:
        part: ``model`` or ``guide``.
        first: a run on 6 draws of 8 rows.
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
            found[str(name)] = torch.full((DRAWS, ROWS), torch.inf)
            continue
        fn = innermost(site["fn"])
        if part == "guide" and any(type(t).__module__ != PLAIN for t in getattr(fn, "transforms", ())):
            continue
        value = _whole(site["value"], len(site["fn"].event_shape))[list(draws)][:, list(rows)]
        if isinstance(fn, Delta):
            before, after = (
                v if v.is_floating_point() else v.float() for v in (value, other["value"].expand(value.shape))
            )
        else:
            try:
                before = _whole(log_prob_of(part, name, site), 0)[list(draws)][:, list(rows)]
                after = log_prob_of(part, name, other, value).expand(before.shape)
            except (NotImplementedError, KeyError):  # a flow that scores its own draws alone
                continue
        tolerance = least if least is not None else WIDE if before.dtype == torch.float64 else NARROW
        allowed = tolerance * (1 + after.abs().nan_to_num(posinf=0.0))
        if rounding and name in rounding:
            by_row = rounding[name].to(allowed)[list(rows)]
            allowed = allowed + by_row.reshape(-1, *[1] * (allowed.dim() - 2))
            if bool(by_row.isinf().any()):  # numbers so large that rounding decides which density is finite at all
                allowed = allowed.where(before.isfinite() & after.isfinite(), torch.inf)
        by = (before - after).abs()
        same = (before == after) | (before.isnan() & after.isnan()) | (by <= allowed) | allowed.isinf()
        if not bool(same.all()):
            found[str(name)] = torch.where(same, torch.zeros_like(by), by)
    return found


def _whole(value: Tensor, axes: int) -> Tensor:
    """A tensor with its axes of draws and rows, ``(draws, rows, *event)``, whatever of these it had left out."""
    return value.expand(DRAWS, ROWS, *value.shape[value.dim() - axes :])
