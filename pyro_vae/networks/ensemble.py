"""Several encoders side by side."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from pyro_vae import registry
from pyro_vae.errors import UserError
from pyro_vae.networks.base import Network, Shape, begin_alike
from pyro_vae.registry import register

Of = Annotated[str | dict[str, Any] | list[str | dict[str, Any]], registry.holding("encoders")]


@register("encoders", "ensemble")
class Ensemble(Network):
    """Encoders that share nothing, their features one after the other along the first axis.

    For the posterior ``mixture`` whose components each see their own (``sees = "own"``): S guides, networks and all, as in
    Kviman et al. 2022, https://proceedings.mlr.press/v151/kviman22a.html. S times the cost of one. Those of one kind begin
    alike, so that their codes are one.

    Args:
        members: S.
        of: an encoder by name, or as a table with options; or a list of these, taken by turns.
    """

    def __init__(
        self,
        in_shape: Shape,
        *,
        members: Annotated[int, Field(ge=1, le=1000)] = 4,
        of: Of = "mlp",
    ) -> None:
        blocks = registry.blocks("encoders", of)
        chosen = [blocks[s % len(blocks)] for s in range(members)]
        made: list[Any] = [registry.get("encoders", name)(in_shape, **options) for name, options in chosen]
        shapes = {m.out_shape for m in made}
        if len(shapes) > 1:
            raise UserError(f"the members of an ensemble make features of one shape, got {sorted(shapes)}")
        first, *rest = made[0].out_shape
        super().__init__(in_shape, (members * first, *rest))
        for turn in range(len(blocks)):
            begin_alike(made[turn :: len(blocks)] or made[:1])
        self.members = nn.ModuleList(made)

    def features(self, x: Tensor) -> Tensor:
        """Features ``(n, *out_shape)`` of ``x`` ``(n, *in_shape)``."""
        return torch.cat([member(x) for member in self.members], 1)
