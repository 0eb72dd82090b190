"""Whether a program is conditioned on y: by the arguments of its model and guide."""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

LABELS = ("y", "ys", "label", "labels")  # names of an optional argument that labels go to; a required one may have any


def takes_y(program: Any) -> bool:
    """Whether a program may be given y: model and guide have a second positional argument, required, or None and called y."""
    defaults = [_second(function) for function in (program.model, program.guide)]
    return all(default is inspect.Parameter.empty or default is None for default in defaults)


def needs_y(program: Any) -> bool:
    """Whether a program cannot go without y: the second positional argument of its model or guide has no default."""
    return any(_second(function) is inspect.Parameter.empty for function in (program.model, program.guide))


def accepts_y(program: Any) -> bool:
    """Whether the model can be called with a second argument."""
    variadic = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(program.model).parameters.values())
    return variadic or _second(program.model) is not False


_SECONDS: WeakKeyDictionary[Any, tuple[Any, Any]] = WeakKeyDictionary()  # by function; a signature takes 20 us


def _second(function: Any) -> Any:
    """The default of a function's second positional argument; False where it has none that could be y."""
    code: Any = getattr(function, "__func__", None)
    known = None if code is None else _SECONDS.get(code)
    if known is not None and known[0] == (code.__code__, code.__defaults__):
        return known[1]
    found = _second_of(function)
    if isinstance(code, FunctionType):
        _SECONDS[code] = (code.__code__, code.__defaults__), found
    return found


def _second_of(function: Any) -> Any:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind in positional]
    if len(parameters) < 2 or (parameters[1].default is None and parameters[1].name not in LABELS):
        return False
    return parameters[1].default
