"""p(z) = (1/K) sum_k q(z | u_k): the VampPrior."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import pyro.distributions as dist
import torch
from pydantic import Field
from torch import Tensor, nn

from pyro_vae.errors import UserError
from pyro_vae.priors.base import Distribution, GuideDensity, Prior, Shape
from pyro_vae.priors.gaussian_mixture import DiagonalMixture
from pyro_vae.registry import register


@register("priors", "vamp")
class Vamp(Prior):
    """p(z) = (1/K) sum_k q(z | u_k): a mixture of the guide at K learned pseudo-inputs u_k.

    Tomczak & Welling 2018, https://arxiv.org/abs/1705.07120. Every z is scored under K guide densities: the guide
    must score what it did not draw, and cheaply; a mixture of S guides makes K S of them. Pseudo-inputs bounded by a
    hardtanh, as there, get no gradient where they have left [0, 1].

    Args:
        components: the number of pseudo-inputs K.
        start: ``"random"``, draws of N(0.05, 0.01^2), or ``"data"``, rows of the training data where the program is built
            with data at hand.
        bounds: ``"unit"`` keeps pseudo-inputs in [0, 1], ``"none"`` lets them be any real numbers, as they are in standard units.
        learned: whether the pseudo-inputs are trained.
    """

    formula = "p(z) = (1/K) sum_k q(z | u_k)"
    support = None
    needs_event_shape = True
    scores_guide = True

    def __init__(
        self,
        latent_shape: Shape,
        event_shape: Shape,
        *,
        components: Annotated[int, Field(ge=1, le=1_000_000)] = 500,
        start: Literal["random", "data"] = "random",
        bounds: Literal["unit", "none"] = "unit",
        learned: bool = True,
    ) -> None:
        super().__init__(latent_shape)
        self.components, self.start, self.bounds = components, start, bounds
        pseudo_inputs = (0.05 + 0.01 * torch.randn(components, *event_shape)).clamp(0.01, 0.99)
        self.pseudo_inputs = nn.Parameter(pseudo_inputs, requires_grad=learned)

    @property
    def start_rows(self) -> int:
        """All pseudo-inputs with ``start="data"``."""
        return len(self.pseudo_inputs) if self.start == "data" else 0

    def in_standard_units(self) -> None:
        """Pseudo-inputs are in standard units from now on, and without bounds."""
        self.bounds = "none"

    @torch.no_grad()
    def start_at(self, rows: Tensor) -> None:
        """Pseudo-inputs = rows of the data, pulled in from the bounds to where there is a gradient."""
        self.pseudo_inputs.copy_(rows.clamp(0.01, 0.99) if self.bounds == "unit" else rows)

    def forward(self, like: Tensor, guide: GuideDensity | None = None) -> Distribution:
        """The mixture, with batch shape ``()``."""
        if guide is None:
            raise UserError("the vamp prior is made of the guide: call prior(x, guide) with guide(x) = q(z | x)")
        u = nn.functional.hardtanh(self.pseudo_inputs, 0.0, 1.0) if self.bounds == "unit" else self.pseudo_inputs
        q: Any = guide(u)
        parts = getattr(q, "components", (q,))  # of a mixture of S guides, p(z) has K S components
        if (
            all(isinstance(f, dist.Independent) and type(f.base_dist) is dist.Normal for f in parts)
            and q.event_dim == 1
        ):
            loc, scale = (torch.cat([getattr(f.base_dist, name) for f in parts]) for name in ("loc", "scale"))
            return Mixture(u.new_zeros(len(loc)), loc, scale)
        return dist.MixtureSameFamily(
            dist.Categorical(logits=u.new_zeros(len(u)), validate_args=False), q, validate_args=False
        )


class Mixture(DiagonalMixture):
    """The mixture of diagonal normals whose products are summed in float64: a guide's scales have no floor to speak of.

    On devices without float64 they are summed in float32.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def expand(self, batch_shape: Any, _instance: Any = None) -> Mixture:
        """The same density for every element of a batch."""
        return Mixture(self.logits, self.loc, self.scale, torch.Size(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log p(z) ``(*leading,)`` of ``value`` ``(*leading, D)``."""
        wide = torch.float32 if value.device.type == "mps" else torch.float64
        logits, loc, scale = (t.to(wide) for t in (self.logits, self.loc, self.scale))
        return DiagonalMixture(logits, loc, scale, self.batch_shape).log_prob(value.to(wide)).to(value.dtype)
