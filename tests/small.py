"""Small blocks, small programs and the small data set, for tests that are about something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

import pyro_vae as pv
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
    "members": (2,),
    "of": ({"name": "mlp", "hidden": [8]},),
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


def digits() -> pv.Data:
    """The embedded digits, binarized anew in every minibatch."""
    return pv.load_data("digits")


def small_vae(data: Any, model: str = "mlp", **overrides: Any) -> Any:
    """A declared model with three latents and networks of 16 units."""
    sizes = {"latent_dim": 3, "encoder": "mlp:hidden=[16]", "decoder": "mlp:hidden=[16]"}
    return pv.build(model, "diagonal", data, **{**sizes, **overrides})


def tensors(path: Path) -> dict[str, Tensor]:
    """What a safetensors file holds."""
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
