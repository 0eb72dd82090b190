"""The modules that a function refers to, and a copy of a function that refers to copies of them.

Followed are closures, globals, methods, ``functools.partial``, functions of the user's own, what they take of the Python modules
that they name (``networks.decoder``), and lists and dicts of modules.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from pyro_vae.guard import is_library


def modules_of(function: Any, seen: set[int] | None = None) -> dict[str, nn.Module]:
    """The modules that a function or object refers to, by what they are called there; functions of theirs are followed."""
    seen = set() if seen is None else seen
    if id(function) in seen:
        return {}
    seen.add(id(function))
    named: list[tuple[str, Any]]
    if isinstance(function, functools.partial):
        arguments = [(str(i), a) for i, a in enumerate(function.args)]
        named = [("program", function.func), *arguments, *function.keywords.items()]
    elif isinstance(function, types.FunctionType):
        named = list(_references(function))
    else:
        named = [("program", getattr(function, "__self__", function))]
    found: dict[str, nn.Module] = {}
    for name, value in named:
        if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
            found |= modules_of(value, seen)
        else:
            found |= dict(_held(name, value))
    return found


def copied(function: Any, memo: Any) -> Any:
    """A copy of a function whose closure and globals hold copies of the modules, where they held these."""
    if not isinstance(function, types.FunctionType):
        return copy.deepcopy(function, memo)
    if id(function) in memo:
        return memo[id(function)]
    memo[id(function)] = function  # while what it refers to may refer to it
    changed = {}
    for _, value in _references(function, whole=True):
        if isinstance(value, types.ModuleType):
            own = {n: copied(v, memo) for n, v in _named_in(function, value) if _holds_modules(v)}
            if own:
                changed[id(value)] = types.ModuleType(value.__name__)
                vars(changed[id(value)]).update({**vars(value), **own})
        elif _holds_modules(value):
            changed[id(value)] = copied(value, memo)
    cells = tuple(
        types.CellType(changed[id(cell.cell_contents)]) if _filled(cell) and id(cell.cell_contents) in changed else cell
        for cell in function.__closure__ or ()
    )
    scope = {n: changed.get(id(v), v) for n, v in function.__globals__.items()}
    other = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, cells or None)
    other.__kwdefaults__ = function.__kwdefaults__
    memo[id(function)] = other
    return other


def _references(function: types.FunctionType, whole: bool = False) -> Iterator[tuple[str, Any]]:
    """What a function's closure and the globals that its code names hold; Python modules ``whole``, or what it takes of them."""
    if is_library(function.__module__ or ""):
        return
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    closed = [(name, cell.cell_contents) for name, cell in cells if _filled(cell)]
    scope = function.__globals__
    for name, value in (*closed, *((n, scope[n]) for n in _names(function.__code__) if n in scope)):
        if isinstance(value, types.ModuleType) and not whole:
            yield from _named_in(function, value)
        else:
            yield name, value


def _names(code: types.CodeType) -> list[str]:
    """The globals and attributes that code names, that of functions inside of it included, each once."""
    inner = [n for c in code.co_consts if isinstance(c, types.CodeType) for n in _names(c)]
    return list(dict.fromkeys([*code.co_names, *inner]))


def _named_in(function: types.FunctionType, module: types.ModuleType) -> list[tuple[str, Any]]:
    if is_library(module.__name__):
        return []
    return [(n, vars(module)[n]) for n in _names(function.__code__) if n in vars(module)]


def _held(name: str, value: Any, deep: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """A module, or those that a container or an object has as its own."""
    if isinstance(value, nn.Module):
        yield name, value
        return
    parts: list[tuple[str, Any]] = []
    if isinstance(value, (list, tuple)):
        parts = [(f"{name}_{i}", v) for i, v in enumerate(value)]
    elif isinstance(value, dict):
        parts = [(f"{name}_{k}", v) for k, v in value.items()]
    elif deep and not isinstance(value, (type, types.ModuleType)):
        parts = list(getattr(value, "__dict__", {}).items())
    for key, part in parts:
        if deep or isinstance(part, nn.Module):
            yield from _held(key, part, deep=False)


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _holds_modules(value: Any) -> bool:
    return bool(modules_of(value))
