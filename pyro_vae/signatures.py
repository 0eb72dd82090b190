"""The door of public functions: plain arguments of the kinds that signatures state, and surroundings that change nothing.

A half draw, a seed of None or a progress bar that is no function would else be found after minutes, in the words of another
library, or not at all (``int(1.5)`` is a seed). Numbers of NumPy and of torch are taken, and handed on as Python's own; so are
arrays, tables and lists of numbers as x and y.

torch and Pyro keep switches around a call: gradients, inference mode and autocast are set as the library needs them, and
are the caller's again afterwards. What would make another program of the one given (a Pyro handler), or put the library's own
tensors elsewhere (a default device), is refused.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import operator
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

from pyro_vae.errors import UserError
from pyro_vae.seeding import ONE_THREAD
from pyro_vae.tensors import tensor_of

P = ParamSpec("P")
R = TypeVar("R")


def checked(
    function: Callable[P, R],
    looking: Callable[..., Any] | None = None,
    with_inputs: Callable[[Any, Any, Any], Any] | None = None,
    with_columns: Callable[[str, Any, Any], Any] | None = None,
) -> Callable[P, R]:
    """The function, whose arguments annotated ``int``, ``float``, ``bool``, ``str`` and ``Callable`` are held to that.

    It runs in :func:`surroundings` of its own. ``None`` is taken where the annotation or the default says so; ``True`` is no
    number.

    Args:
        function: to be checked.
        looking: takes the arguments by name, and whether the caller said ``examine=True``; gives what is entered around the call.
        with_inputs: makes y of the program, y and what the caller gave as ``inputs``.
        with_columns: makes x of the function's name, the program and what the caller gave as x, where this is no tensor.

    Raises:
        UserError: in one line, which argument was to be what, and what came.
    """
    parameters = inspect.signature(function).parameters
    by_place = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    needed = {n for n, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    defaults = {n: p.default for n, p in parameters.items() if n not in needed and p.kind is not p.VAR_KEYWORD}
    known = None if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else set(parameters)

    @functools.cache
    def kinds() -> dict[str, tuple[Callable[[str, Any], Any], bool]]:
        found = {name: _kind(p, function.__globals__) for name, p in parameters.items()}
        return {name: kind for name, kind in found.items() if kind is not None}

    tensors = [n for n in ("x", "y") if n in parameters and "Tensor" in str(parameters[n].annotation)]

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        anew = bool(kwargs.pop("examine", False)) if looking is not None else False
        inputs = kwargs.pop("inputs", None) if with_inputs is not None else None
        given = {**dict(zip(by_place, args, strict=False)), **kwargs}  # signature.bind takes 20 times as long
        if (
            len(given) < len(args) + len(kwargs)
            or not needed <= given.keys()
            or not (known is None or given.keys() <= known)
        ):
            return function(*args, **kwargs)  # which says what is missing, or not known, as Python does
        for name in tensors:
            if name in given:
                given[name] = tensor_of(given[name], name)
        if with_columns is not None and not hasattr(given["x"], "storage_offset"):
            given["x"] = with_columns(function.__name__, given["program"], given["x"])
        if inputs is not None and with_inputs is not None:
            given["y"] = with_inputs(given["program"], given.get("y"), inputs)
        for name, (kind, optional) in kinds().items():
            if name in given and not (optional and given[name] is None):
                given[name] = kind(f"{function.__name__}: expected {name}", given[name])
        with (
            surroundings(function.__name__),
            looking({**defaults, **given}, anew) if looking is not None else nullcontext(),
        ):
            return function(**given)  # type: ignore[call-arg, arg-type]

    return call


@contextmanager
def surroundings(name: str) -> Iterator[None]:
    """While entered, gradients can be had, and autocast is off: precision is an argument of the functions that have a choice.

    Raises:
        UserError: ``name`` is called inside of a Pyro handler, or with a default device that is not the CPU.
    """
    import torch  # the command's help does without
    from pyro.poutine.runtime import am_i_wrapped

    with ONE_THREAD:  # Pyro's stack of handlers is one for all threads: another may be inside of its own
        wrapped = am_i_wrapped()
    if wrapped:
        raise UserError(
            f"{name} is called inside of a Pyro handler (plate, condition, trace, ...), which would make another program of the "
            "one given: call it outside, and write what the handler does into the program"
        )
    device = torch.empty(0).device  # the default one, in a fifth of the time of torch.get_default_device()
    if device.type != "cpu":
        raise UserError(
            f"{name}: expected the CPU as torch's default device, got {device}: the library follows the program's device; leave "
            'the default alone (torch.set_default_device("cpu")) and make tensors with device=x.device'
        )
    autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and not autocast:  # as it is most of the time
        yield
        return
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False) if autocast else nullcontext(),
        torch.autocast("cuda", enabled=False) if autocast else nullcontext(),
    ):
        yield


def _kind(parameter: inspect.Parameter, scope: dict[str, Any]) -> tuple[Callable[[str, Any], Any], bool] | None:
    """What a value of this parameter has to be, and whether it may be None; None for all but plain values."""
    annotation = parameter.annotation
    if isinstance(annotation, str):
        try:
            annotation = eval(annotation, scope)  # as typing.get_type_hints does, one by one
        except NameError:  # of typing alone
            return None
    parts = set(typing.get_args(annotation)) if isinstance(annotation, types.UnionType) else {annotation}
    optional = parameter.default is None or type(None) in parts
    parts.discard(type(None))
    if len(parts) != 1:
        return None
    (part,) = parts
    kind = _function if typing.get_origin(part) is Callable else KINDS.get(part)
    return None if kind is None else (kind, optional)


def whole(what: str, value: Any) -> int:
    """A whole number as Python's own; ``what`` begins the message of the :class:`UserError` for anything else."""
    if not _is_flag(value):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise UserError(f"{what} to be a whole number, got {_shown(value)}")


def _real(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or math.isnan(value):
        raise UserError(f"{what} to be a number, got {_shown(value)}")
    return value if isinstance(value, int) else float(value)


def _flag(what: str, value: Any) -> bool:
    if _is_flag(value):
        return bool(value)
    raise UserError(f"{what} to be True or False, got {_shown(value)}")


def _is_flag(value: Any) -> bool:
    return type(value) is bool or (type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"))


def _text(what: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{what} to be a string, got {_shown(value)}")
    return value


def _function(what: str, value: Any) -> Any:
    if not callable(value):
        raise UserError(f"{what} to be a function, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    """A value as a message can hold it."""
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else type(value).__name__


KINDS: dict[Any, Callable[[str, Any], Any]] = {int: whole, float: _real, bool: _flag, str: _text}
