"""Hold a program, and the data that it is given, to the contract of :mod:`pyro_vae.programs.trace`."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from pyro_vae.errors import ProgramError, UserError
from pyro_vae.programs.adopted import data_among, take_dtype
from pyro_vae.programs.columns import layout_of
from pyro_vae.programs.examination import SCANNED_ROWS, Examination, Rows, examined
from pyro_vae.programs.given import require_rows, require_y
from pyro_vae.programs.trace import WHOLE, Traces, latent_sites, to_program, y_to_program
from pyro_vae.programs.trace import isolated as isolated  # where scripts of before look for it
from pyro_vae.programs.values import check_conditions, check_observed, range_of, refusal, require_range
from pyro_vae.programs.walk import spans


def require_program(program: Any) -> None:
    """:class:`UserError` unless ``program`` is a module with a model and a guide."""
    missing = [name for name in ("model", "guide") if not callable(getattr(program, name, None))]
    if missing or not isinstance(program, nn.Module):
        raise UserError(
            f"expected a Program, an nn.Module with methods model(x) and guide(x); {type(program).__name__} "
            + (f"has no {' and no '.join(missing)}" if missing else "is no nn.Module")
        )


def require_gradients(program: Any) -> None:
    """:class:`UserError` where a program's tensors were made in inference mode, and no derivative can pass through them."""
    for name, tensor in (*program.named_parameters(), *program.named_buffers()):
        if tensor.is_inference():
            raise UserError(
                f"{name!r} was made inside of torch.inference_mode(), and derivatives are needed here: make the program "
                "outside of it, or hand over copy.deepcopy(program)"
            )


def require_latents(traces: Traces, what: str) -> None:
    """:class:`UserError` where a program has no latents, or none of any element, and ``what`` is about them."""
    if not any(math.prod(site["fn"].event_shape) for site in latent_sites(traces.model).values()):
        raise UserError(f"{what} is about latents, and the program has none: log_likelihood and sample do without")


def admit(
    program: Any,
    x: Any,
    y: Any = None,
    *,
    support: bool = True,
    values: bool = True,
    count: int = 0,
    anew: bool = False,
) -> Traces:
    """Hold a program and all rows of its data to the contract: what every public function that takes data begins with.

    Args:
        program: the Program.
        x: data ``(N, *event)``, on any device and in any dtype.
        y: what a conditional program is conditioned on, ``(N, ...)``.
        support: whether the values must be in the likelihood's support: not where they are encoded and not scored.
        values: whether rows are looked at at all, beyond the eight that the program is examined on: not where the caller does.
        count: of the rows that the program will see at once, where these are more.
        anew: whether to examine the program whatever was found before.

    Returns:
        The traces of a run on eight rows.

    Raises:
        UserError: of :func:`~pyro_vae.programs.examination.examined`, or for any row.
    """
    require_program(program)
    require_rows(x, program)
    require_y(program, len(x), y)
    take_dtype(program, x)
    if data_among(program, y) is not None:
        raise UserError(
            "inputs: what goes to the argument of the data are the data themselves, which are given as x: leave it out"
        )

    def part(rows: slice | Tensor) -> tuple[Tensor, Tensor | None]:
        return to_program(program, x[rows]), None if y is None else y_to_program(program, y[rows])

    layout = layout_of(program, x)
    rows = Rows(x, y, count, layout=layout)
    found = _examined(program, x, y, part, rows, anew)
    if not values:
        return found.traces
    scans = support or rows.missing or getattr(program, WHOLE, False)
    for block in spans(len(x), SCANNED_ROWS) if scans else ():
        check_observed(found.traces, *part(block), first=block.start, support=support)
    if not support and layout is None and (bounds := range_of(found.traces)) is not None:
        require_range(bounds, x, rows.ends)
    if y is not None:
        check_conditions(program, y, part, found.taken)
    return found.traces


def _examined(program: Any, x: Tensor, y: Tensor | None, part: Any, rows: Rows, anew: bool) -> Examination:
    """The examination; where it is y in other rows than the first that the program does not take, that is said."""
    try:
        return examined(program, x, y, rows=rows, anew=anew)
    except ProgramError:
        raise
    except UserError:
        if y is not None and refusal(program, *part(slice(0, 1))) is None:
            check_conditions(program, y, part)
        raise
