"""A block of a declaration: a registered name and options, as TOML, text and tables say them."""

from __future__ import annotations

import tomllib
from typing import Any

import tomli_w
from pydantic import BaseModel, ConfigDict, model_serializer

from pyro_vae import registry
from pyro_vae.errors import UserError


class Block(BaseModel):
    """A registered name and the options declared for it."""

    model_config = ConfigDict(frozen=True)
    name: str
    options: dict[str, Any] = {}

    @model_serializer
    def _plain(self) -> str | dict[str, Any]:
        return {"name": self.name, **self.options} if self.options else self.name

    def __str__(self) -> str:
        options = ",".join(f"{k}={_toml_value(v)}" for k, v in self.options.items())
        return self.name + (f":{options}" if options else "")


def parse_block(kind: str, value: Any) -> Block:
    """A validated block from ``"name"``, ``"name:key=value,..."``, ``{"name": ..., key: value}`` or a :class:`Block`."""
    block = read_block(kind, value)
    return Block(name=block.name, options=registry.validate(kind, block.name, block.options))


def read_block(kind: str, value: Any) -> Block:
    """The same with names and options as they come."""
    if isinstance(value, Block):
        return value
    options = table(value) if isinstance(value, str) else dict(value) if isinstance(value, dict) else {}
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f"{kind[:-1]}: expected a name, or a table with a name; got {value!r}")
    return Block(name=name, options=options)


def table(text: str) -> dict[str, Any]:
    """``"name"`` or ``"name:key=value,..."`` as a table."""
    name, _, options = text.partition(":")
    return {"name": name, **(dict(parse_assignment(part) for part in _split(options)) if options else {})}


def parse_assignment(text: str) -> tuple[str, Any]:
    """``key=value`` as a pair; the value is read as TOML, or else taken as a string.

    >>> parse_assignment("hidden=[300, 300]"), parse_assignment("activation=tanh")
    (('hidden', [300, 300]), ('activation', 'tanh'))
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"expected key=value, got {text!r}")
    try:
        parsed = tomllib.loads(f"v = {value.strip()}")["v"]
    except (ValueError, RecursionError):
        parsed = value.strip()
    return key.strip(), parsed


def _split(text: str) -> list[str]:
    """Split at the commas that stand outside brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "[{") - (char in "]}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _toml_value(value: Any) -> str:
    text = tomli_w.dumps({"v": value}).partition("=")[2].strip()
    return text.strip('"') if isinstance(value, str) else text.replace("\n", "").replace("    ", "").replace(",]", "]")
