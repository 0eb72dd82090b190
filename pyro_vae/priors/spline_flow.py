"""p(z) by a coupling flow of rational-quadratic splines."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pyro_vae.networks.bijections import Spline
from pyro_vae.networks.dense import Widths
from pyro_vae.networks.flows import Flow
from pyro_vae.priors.base import Shape
from pyro_vae.priors.flow import FlowPrior
from pyro_vae.registry import register


@register("priors", "spline-flow")
class SplineFlow(FlowPrior):
    """p(z) = N(f(z); 0, I) |det df/dz|, f a stack of coupling layers of monotone splines; cheap both ways.

    The splines reshape the box [-bound, bound]^D and leave the rest alone. Durkan et al. 2019, Neural Spline Flows,
    https://arxiv.org/abs/1906.04032.

    Args:
        layers: the number of coupling layers.
        hidden: widths of the hidden layers of each conditioner.
        bins: bins of each spline.
        bound: half the width of the box, in units of z.
    """

    formula = "p(z) = N(f(z); 0, I) |det df/dz|, f coupled splines"

    def __init__(
        self,
        latent_shape: Shape,
        *,
        layers: Annotated[int, Field(ge=1, le=100)] = 4,
        hidden: Widths = (128,),
        bins: Annotated[int, Field(ge=2, le=100)] = 8,
        bound: Annotated[float, Field(gt=0)] = 5.0,
    ) -> None:
        super().__init__(latent_shape, Flow(latent_shape[0], Spline(bins, bound), "coupling", layers, hidden))
