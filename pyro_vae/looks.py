"""How Python objects look, so that they can be compared with what becomes of them.

A look is made of what an object holds: numbers and strings, containers and attributes a few levels deep, the members of its
class, the code, defaults and attributes of functions, the values of small tensors.
What is too large or too deep is known by its identity, large tensors by torch's count of their changes as well.
"""

from __future__ import annotations

import sys
import types
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DEEP = 8  # levels that are looked into
MANY = 512  # items of a container, and objects in all, that are looked at
WIDE = 128  # members of a class that is looked into: those of tables and plots have some hundreds, which nobody changes
SMALL = 4096  # elements of a tensor or array that is compared by value
LIBRARIES = frozenset(
    {
        "torch",
        "pyro",
        "pyroapi",
        "pyro_vae",
        "numpy",
        "scipy",
        "opt_einsum",
        "sympy",
        "networkx",
        *sys.stdlib_module_names,
    }
) - {"__main__"}
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)

Look = Any


class _Absent:
    """Where there is nothing."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


class _Same:
    """Equal to itself alone; keeps the object, so that no other gets its place in memory."""

    __slots__ = ("of",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, of: Any) -> None:
        self.of = of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.of is self.of


class _Values(tuple[Any, ...]):
    """The look of a tensor or an array."""

    __slots__ = ()


def look(value: Any, here: frozenset[int] = frozenset()) -> Look:
    """How an object looks; modules whose ids are ``here`` are looked at elsewhere."""
    return _look(value, DEEP, set(here))


def _look(value: Any, depth: int, seen: set[int]) -> Look:
    kind = type(value)
    if kind in PLAIN:
        return kind, value if value == value else "nan"
    if isinstance(value, (Tensor, np.ndarray)):
        return _of_values(value)
    if id(value) in seen or depth == 0 or len(seen) > MANY:
        return _Same(value)
    if isinstance(value, (types.BuiltinFunctionType, types.ModuleType)) or value is ABSENT or of_library(value):
        return _Same(value)
    inner = partial(_look, depth=depth - 1, seen=seen)
    if isinstance(value, types.FunctionType):
        more = value.__defaults__, value.__kwdefaults__, value.__dict__ or None
        return value, value.__code__, [None if part is None else inner(part) for part in more]
    seen.add(id(value))
    if isinstance(value, type):
        return _Same(value), [(name, inner(v)) for k in value.__mro__ if not of_library(k) for name, v in _members(k)]
    if isinstance(value, types.MethodType):
        return inner(value.__func__), inner(value.__self__)
    if isinstance(value, (property, staticmethod, classmethod)):
        return inner(value.fget if isinstance(value, property) else value.__func__)
    if isinstance(value, partial):
        return kind, inner(value.func), inner(value.args), inner(value.keywords)
    if isinstance(value, dict):
        return (kind, [(inner(k), inner(v)) for k, v in value.items()]) if len(value) <= MANY else _Same(value)
    if isinstance(value, (list, tuple)):
        return (kind, [inner(v) for v in value]) if len(value) <= MANY else (_Same(value), len(value))
    if isinstance(value, (set, frozenset)):
        plain = all(type(v) in PLAIN for v in value)
        return (kind, frozenset(value)) if plain else (_Same(value), len(value))
    held = [(k, inner(v)) for k, v in _held(value).items()]
    return (kind if held else _Same(value), held, inner(kind))


def of_library(value: Any) -> bool:
    """Whether a module, class or function is of torch, Pyro, this library or their like; nothing else is."""
    if not isinstance(value, (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type)):
        return False
    name = value.__name__ if isinstance(value, types.ModuleType) else value.__module__
    return str(name).partition(".")[0] in LIBRARIES


def _members(kind: type) -> list[tuple[str, Any]]:
    """What a class holds, of a large one nothing: its functions, and all that Python does not keep there for itself."""
    if len(vars(kind)) > WIDE:
        return []
    return [(k, v) for k, v in vars(kind).items() if not k.startswith("__") or isinstance(v, types.FunctionType)]


def _held(value: Any) -> dict[str, Any]:
    """The attributes of an object, by name."""
    held = dict(vars(value)) if hasattr(value, "__dict__") else {}
    if isinstance(value, nn.Module):
        held = {k: v for k, v in held.items() if not k.startswith("_pyro_")}
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                held[name] = getattr(value, name)
    return held


def _of_values(value: Any) -> _Values:
    """A tensor's or an array's shape and kind with its values, or what is known of these."""
    if isinstance(value, np.ndarray):
        small = value.size <= SMALL and not value.dtype.hasobject
        return _Values((value.shape, str(value.dtype), value.tobytes() if small else _Same(value)))
    outline = tuple(value.shape), value.dtype, value.device, value.requires_grad
    try:
        if value.numel() <= SMALL:
            flat = value.detach().cpu().contiguous().reshape(-1)
            return _Values((*outline, flat.view(torch.uint8).numpy().tobytes()))
        return _Values((*outline, _Same(value), value._version, value.data_ptr()))
    except (RuntimeError, TypeError):  # sparse, quantized, of inference mode, or no tensor of memory at all
        return _Values((*outline, _Same(value)))


def plain_part(found: Look) -> Any:
    """A look without tensors, and without what is known by its identity alone."""
    if isinstance(found, (_Values, _Same, types.FunctionType)):
        return None
    if isinstance(found, (list, tuple)):
        return [plain_part(part) for part in found]
    return found


def short(value: Any) -> str | None:
    """A number, a string or the like in a few characters; None for anything else."""
    if type(value) not in PLAIN and value is not ABSENT:
        return None
    written = repr(value)
    return written if len(written) <= 40 else written[:37] + "..."


def unchanging(value: Any) -> bool:
    """Whether the very same object is sure to look the same."""
    if isinstance(value, tuple):
        return all(type(v) in PLAIN for v in value)
    return type(value) in PLAIN or value is ABSENT or (isinstance(value, types.FunctionType) and of_library(value))
