"""The door of public functions that take a program: its examination, and a look at what differs from call to call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ParamSpec, TypeVar

from pyro_vae.data.record import Record
from pyro_vae.errors import UserError
from pyro_vae.programs.adopted import Adopted
from pyro_vae.programs.columns import layout_of, taken
from pyro_vae.programs.contract import admit, require_gradients, require_latents, require_program
from pyro_vae.programs.examination import examined_model
from pyro_vae.programs.given import event_shape_of, require_y
from pyro_vae.programs.trace import Traces, factors
from pyro_vae.signatures import checked

P = ParamSpec("P")
R = TypeVar("R")
NO_RECORDS = "{} takes no records: expected data as a torch tensor (N, *event), one column"
_PASSED = threading.local()


def door(
    data: bool = True,
    *,
    scored: bool = True,
    latents: str = "",
    joint: str = "",
    gradients: bool = False,
    records: bool = False,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator of functions of ``program``, of data ``x`` and ``y`` or of ``event_shape`` and ``y``.

    Plain arguments are held to their kinds (:func:`~pyro_vae.signatures.checked`), and the program and all rows of data to the
    contract; what was found of the program before is found again while it holds, unless the caller says ``examine=True``.

    Args:
        data: whether the function takes data; else its model alone is looked at.
        scored: whether values must be in the likelihood's support: not where they are encoded and not scored.
        latents: what is about latents, as the message has it where there are none.
        joint: what needs draws z ~ p(z), x ~ p(x | z) of the joint density, which they are not where there is a ``pyro.factor``.
        gradients: whether derivatives pass through the program's tensors.
        records: whether data may be a record, or a dict of tensors; refused else.
    """

    @contextmanager
    def looking(name: str, arguments: dict[str, Any], anew: bool) -> Iterator[None]:
        program, y = arguments["program"], arguments.get("y")
        if data:
            require_program(program)
            if not records and layout_of(program, arguments["x"]) is not None:
                raise UserError(NO_RECORDS.format(name))
            found = admit(program, arguments["x"], y, support=scored, anew=anew)
        else:
            require_program(program)
            require_y(program, arguments.get("num_samples"), y)
            shape, count = event_shape_of(program, arguments.get("event_shape")), arguments.get("num_samples") or 0
            found = examined_model(program, shape, y, count=count, anew=anew).traces
        if latents or joint:
            require_latents(found, latents or joint)
        if joint and (weighing := factors(found.model)):
            raise UserError(
                f"{joint} needs draws of the joint p(x, z), and the model's pyro.factor {weighing[0]!r} weighs the draws of "
                "p(z) p(x | z): they are none; write what it says as a distribution of a site, or use importance "
                "weighting or annealing"
            )
        if gradients:
            require_gradients(program)
        stack = _PASSED.__dict__.setdefault("stack", [])
        stack.append(found)
        try:
            yield
        finally:
            stack.pop()

    def with_columns(name: str, program: Any, x: Any) -> Any:
        if not isinstance(x, Mapping | Record):
            return x
        if not records:
            raise UserError(NO_RECORDS.format(name))
        require_program(program)
        return taken(program, x)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        return checked(function, partial(looking, function.__name__), with_inputs, with_columns if data else None)

    return decorate


def with_inputs(program: Any, y: Any, inputs: Any) -> Any:
    """What stands for y where tensors by name go beside it; :class:`UserError` where a program does not take them."""
    if not isinstance(program, Adopted):
        raise UserError("inputs go to the arguments of an adopted program: write program = pv.adopt(program)")
    if not isinstance(inputs, Mapping) or not inputs:
        raise UserError(
            f"expected inputs as a dict of tensors by the name of the argument, got {type(inputs).__name__}"
        )
    return program.with_inputs(y, inputs)


def admitted() -> Traces:
    """What was found at the door of the public function that is under way in this thread."""
    found: Traces = _PASSED.stack[-1]
    return found
