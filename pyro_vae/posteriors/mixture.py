"""q(z | x) = (1/S) sum_s q_s(z | x): several guides as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from pyro_vae import registry
from pyro_vae.errors import UserError
from pyro_vae.networks.base import begin_alike, linear
from pyro_vae.posteriors.base import Distribution, Posterior, Shape
from pyro_vae.posteriors.equal_mixture import EqualMixture
from pyro_vae.registry import register

Of = Annotated[str | dict[str, Any] | list[str | dict[str, Any]], registry.holding("posteriors")]
COSTS = ("cheap", "sequential", "impossible")


@register("posteriors", "mixture")
class Mixture(Posterior):
    """S posteriors of one family, or of several by turns, with equal weights; each z is scored under all of them.

    With the objective ``elbo`` and ``num_particles`` a multiple of S, one draw of each component is made at every step, and the
    loss is MISELBO, (1/S) sum_s E_q_s[log p(x, z) - log (1/S) sum_r q_r(z | x)], of Kviman et al. 2022,
    https://proceedings.mlr.press/v151/kviman22a.html, and 2023, https://proceedings.mlr.press/v202/kviman23a.html. With fewer
    particles components are drawn at random, without replacement, and scored under all: the same loss, cheaper and
    noisier ("some to all", Hotti et al. 2024, https://arxiv.org/abs/2406.07083). A VampPrior of K pseudo-inputs becomes a
    mixture of K S components, and costs as much. The mean of q, which ``encode`` gives, may lie between components,
    where q has little mass: draw from q where that matters. Components of one family begin alike, so that their codes are one.

    Args:
        components: S.
        of: a posterior by name, or as a table with options; or a list of these, taken by turns. It has to score any z.
        sees: ``"shared"``, the features of one encoder, each component with heads of its own; ``"one-hot"``, likewise, and all
            components have the same heads, on a hidden layer that the component's number enters as a one-hot vector (Hotti et
            al. 2024); ``"own"``, each component its S-th part of the features, as the encoder ``ensemble`` makes them.
        hidden: the width of that layer.
    """

    formula = "q(z | x) = (1/S) sum_s q_s(z | x)"

    def __init__(
        self,
        feature_shape: Shape,
        latent_shape: Shape,
        *,
        components: Annotated[int, Field(ge=1, le=10_000)] = 4,
        of: Of = "diagonal-normal",
        sees: Literal["shared", "one-hot", "own"] = "shared",
        hidden: Annotated[int, Field(ge=1, le=1_000_000)] = 128,
    ) -> None:
        super().__init__(feature_shape, latent_shape)
        self.components, self.sees = components, sees
        blocks = registry.blocks("posteriors", of)
        shape, number = self.feature_shape, components
        if sees == "one-hot":
            if len(blocks) > 1:
                raise UserError("a mixture whose components share their heads (sees='one-hot') is of one family")
            self.hidden = linear(math.prod(shape), hidden)
            self.numbers = nn.Parameter(0.05 * torch.randn(components, hidden))
            shape, number = (hidden,), 1
        elif sees == "own":
            if shape[0] % components:
                raise UserError(
                    f"{shape[0]} features are not to be cut into {components} equal parts (sees='own'): give the encoder "
                    "'ensemble' as many members as the mixture has components"
                )
            shape = (shape[0] // components, *shape[1:])
        self.each = nn.ModuleList()
        for s in range(number):
            name, options = blocks[s % len(blocks)]
            self.each.append(registry.get("posteriors", name)(shape, latent_shape, **options))
        for turn in range(len(blocks)):
            begin_alike(list(self.each)[turn :: len(blocks)] or list(self.each)[:1])
        self._take_kind([name for name, _ in blocks])

    def _take_kind(self, names: Sequence[str]) -> None:
        """Be of the support of the components, as dear as the dearest; :class:`UserError` for what cannot be mixed."""
        parts = [cast(Posterior, part) for part in self.each]
        for name, part in zip(names, parts, strict=False):
            if not _mixes(part):
                why = "has discrete latents" if part.scoring == "cheap" else "can score its own draws only"
                others = [n for n in registry.names("posteriors") if _mixes(cast(Any, registry.get("posteriors", n)))]
                raise UserError(
                    f"a mixture scores every z under the densities of all its components, and the posterior {name!r} {why}: "
                    f"choose from {', '.join(others)}"
                )
            if repr(part.support) != repr(parts[0].support):
                raise UserError(
                    f"the components of a mixture have one support, and the posteriors {names[0]!r} and {name!r} have two"
                )
        self.support = parts[0].support  # type: ignore[misc]
        self.scoring = max((part.scoring for part in parts), key=COSTS.index)  # type: ignore[misc]
        self.reparameterized = all(part.reparameterized for part in parts)  # type: ignore[misc]

    def forward(self, features: Tensor) -> Distribution:
        """The mixture, with batch shape the leading axes of ``features``."""
        if self.sees == "one-hot":
            leading = features.shape[: features.dim() - len(self.feature_shape)]
            h = self.hidden(features.reshape(*leading, -1))
            return EqualMixture([self.each[0](nn.functional.silu(h + number)) for number in self.numbers])
        if self.sees == "own":
            parts = features.chunk(self.components, -len(self.feature_shape))
            return EqualMixture([q(part) for q, part in zip(self.each, parts, strict=True)])
        return EqualMixture([q(features) for q in self.each])

    def extra_repr(self) -> str:
        """Formula, shape and S."""
        return f"{super().extra_repr()}, components={self.components}, sees={self.sees!r}"


def _mixes(family: Posterior) -> bool:
    return family.scoring != "impossible" and not family.support.is_discrete
