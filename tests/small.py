"""Every registered block, made small: what it has of the options below, in the type that it takes them."""

from __future__ import annotations

from typing import Any

from pyro_vae import registry
from pyro_vae.errors import UserError

SMALL: dict[str, tuple[Any, ...]] = {
    "levels": (5,),
    "classes": (3,),
    "components": (3,),
    "layers": (2,),
    "blocks": (1,),
    "hidden": ([8], 8),
    "rank": (2,),
    "bins": (5,),
    "channels": (4, [4]),
}


def small(kind: str, name: str) -> dict[str, Any]:
    """Options of a block that make it small; of several values, the first that is valid."""
    options: dict[str, Any] = {}
    for key in registry.schema(kind, name).model_fields.keys() & SMALL.keys():
        for value in SMALL[key]:
            try:
                options |= registry.validate(kind, name, {key: value})
                break
            except UserError:
                continue
    return options
