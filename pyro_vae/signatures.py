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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from pyro_vae.errors import UserError
from pyro_vae.seeding import ONE_THREAD
from pyro_vae.tensors import tensor_of

P = ParamSpec("P")
R = TypeVar("R")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, whose arguments annotated ``int``, ``float``, ``bool``, ``str`` and ``Callable`` are held to that.

    It runs in :func:`surroundings` of its own. ``None`` is taken where the annotation or the default says so; ``True`` is no
    number. A warning of the function counts one frame more to its caller (``stacklevel=3``).

    Raises:
        UserError: in one line, which argument was to be what, and what came.
    """
    signature = inspect.signature(function)
    kinds = {name: _kind(str(p.annotation)) for name, p in signature.parameters.items()}
    plain = {name: kind for name, kind in kinds.items() if kind is not None}
    tensors = {n for n in ("x", "y") if "Tensor" in str(getattr(signature.parameters.get(n), "annotation", ""))}
    optional = {n for n, p in signature.parameters.items() if p.default is None or "None" in str(p.annotation)}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # which says what is missing, or not known, as Python does
        for name, value in bound.arguments.items():
            if name in tensors:
                bound.arguments[name] = tensor_of(value, name)
            if name in plain and not (value is None and name in optional):
                bound.arguments[name] = plain[name](f"{function.__name__}: expected {name}", value)
        with surroundings(function.__name__):
            return function(*bound.args, **bound.kwargs)

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
    device = torch.get_default_device()
    if device.type != "cpu":
        raise UserError(
            f"{name}: expected the CPU as torch's default device, got {device}: the library follows the program's device; leave "
            'the default alone (torch.set_default_device("cpu")) and make tensors with device=x.device'
        )
    with torch.inference_mode(False), torch.enable_grad():
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            yield
            return
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield


def _kind(annotation: str) -> Callable[[str, Any], Any] | None:
    """What a value of this annotation has to be; None for all but plain values."""
    first = annotation.removesuffix(" | None")
    return _function if first.startswith("Callable[") or first == "Progress" else KINDS.get(first)


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


KINDS: dict[str, Callable[[str, Any], Any]] = {"int": whole, "float": _real, "bool": _flag, "str": _text}
