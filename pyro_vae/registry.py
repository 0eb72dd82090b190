"""Names to classes: the table in which every block registers itself, and nowhere else.

A *kind* is ``"priors"``, ``"likelihoods"``, ``"posteriors"``, ``"encoders"``, ``"decoders"``, ``"programs"``,
``"objectives"`` or ``"baselines"``. The options that a user may declare for a block are the keyword-only arguments of its
constructor: their annotations are the schema and their defaults the defaults, so a block is described once.

    @register("priors", "standard-normal")
    class StandardNormal(Prior): ...
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, create_model

from pyro_vae.errors import UserError, nearest

T = TypeVar("T", bound=type)

# Where the classes of each kind live; every module of the package is imported before the first look-up.
PACKAGES = {
    "encoders": "pyro_vae.networks",
    "decoders": "pyro_vae.networks",
    "priors": "pyro_vae.priors",
    "likelihoods": "pyro_vae.likelihoods",
    "posteriors": "pyro_vae.posteriors",
    "programs": "pyro_vae.programs",
    "objectives": "pyro_vae.objectives",
    "baselines": "pyro_vae.baselines",
}

_classes: dict[str, dict[str, type]] = {kind: {} for kind in PACKAGES}
_schemas: dict[type, type[BaseModel]] = {}


def register(kind: str, name: str) -> Callable[[T], T]:
    """Class decorator: ``name`` in a spec, or on the command line, now means this class."""

    def decorate(cls: T) -> T:
        taken = _classes[kind].get(name)
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            raise UserError(f"{kind[:-1]} {name!r} is registered twice: by {taken.__qualname__} and {cls.__qualname__}")
        _classes[kind][name] = cls
        return cls

    return decorate


def names(kind: str) -> list[str]:
    """The registered names of one kind, in alphabetical order."""
    return sorted(_table(kind))


def get(kind: str, name: str) -> type:
    """The class called ``name``; :class:`UserError` with the nearest names where there is none."""
    table = _table(kind)
    if name not in table:
        raise UserError(f"unknown {kind[:-1]} {name!r}: {nearest(name, table)}")
    return table[name]


def schema(kind: str, name: str) -> type[BaseModel]:
    """The options of one block as a pydantic type, read off its constructor's keyword-only arguments."""
    cls = get(kind, name)
    if cls not in _schemas:
        hints = get_type_hints(cls.__init__, include_extras=True)  # type: ignore[misc]
        fields: dict[str, Any] = {
            p.name: (hints[p.name], ... if p.default is p.empty else p.default)
            for p in inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
            if p.kind is p.KEYWORD_ONLY
        }
        config = ConfigDict(extra="forbid", allow_inf_nan=False)
        _schemas[cls] = create_model(cls.__name__ + "Options", __config__=config, **fields)
    return _schemas[cls]


def validate(kind: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The declared options, converted to their types; :class:`UserError` for what is misspelt or out of range."""
    model = schema(kind, name)
    try:
        return model.model_validate(options).model_dump(exclude_unset=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else "options"
        if first["type"] == "extra_forbidden":
            known = list(model.model_fields)
            hint = nearest(key, known) if known else "it has no options"
            raise UserError(f"{kind[:-1]} {name!r} has no option {key!r}: {hint}") from None
        if first["type"] == "missing":
            raise UserError(f"{kind[:-1]} {name!r} needs the option {key!r}") from None
        raise UserError(f"{kind[:-1]} {name!r}: {key} = {first['input']!r}: {first['msg']}") from None


def blocks(kind: str, value: Any) -> list[tuple[str, dict[str, Any]]]:
    """Blocks that are an option of another, as names with validated options.

    Args:
        kind: of these blocks.
        value: a name, a table with a ``name`` and options, or a list of these.
    """
    found = []
    for one in value if isinstance(value, (list, tuple)) and value else [value]:
        options = {"name": one} if isinstance(one, str) else dict(one) if isinstance(one, dict) else {}
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise UserError(f"expected a name, a table with a name, or a list of these, got {one!r}")
        found.append((name, validate(kind, name, options)))
    return found


def holding(kind: str) -> BeforeValidator:
    """What holds an option of a block to be :func:`blocks` of a kind, and leaves it as it was declared."""

    def held(value: Any) -> Any:
        blocks(kind, value)
        return value

    return BeforeValidator(held)


def _table(kind: str) -> dict[str, type]:
    if kind not in PACKAGES:
        raise UserError(f"unknown kind {kind!r}: {nearest(kind, PACKAGES)}")
    package = importlib.import_module(PACKAGES[kind])
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
    return _classes[kind]
