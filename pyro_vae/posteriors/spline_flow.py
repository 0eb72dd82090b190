"""q(z | x) by an autoregressive flow of rational-quadratic splines."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pyro_vae.networks.bijections import Spline
from pyro_vae.networks.dense import Widths
from pyro_vae.posteriors.base import Shape
from pyro_vae.posteriors.flow import FlowPosterior
from pyro_vae.registry import register


@register("posteriors", "spline-flow")
class SplineFlow(FlowPosterior):
    """Autoregressive layers of monotone splines, which can split one mode into several where affine layers cannot.

    Durkan et al. 2019, Neural Spline Flows, https://arxiv.org/abs/1906.04032. A z that was not drawn here takes
    ``latent_dim`` passes per layer.

    Args:
        layers: the number of autoregressive layers.
        hidden: widths of the hidden layers of each conditioner.
        bins: bins of each spline.
        bound: half the width of the box in which the splines act, in units of s(x).
    """

    formula = "q(z | x): z = mu(x) + s(x) T(e; x), T autoregressive splines, e ~ N(0, I)"
    scoring = "sequential"

    def __init__(
        self,
        feature_shape: Shape,
        latent_shape: Shape,
        *,
        layers: Annotated[int, Field(ge=1, le=100)] = 2,
        hidden: Widths = (128,),
        bins: Annotated[int, Field(ge=2, le=100)] = 8,
        bound: Annotated[float, Field(gt=0)] = 5.0,
    ) -> None:
        super().__init__(feature_shape, latent_shape, Spline(bins, bound), "autoregressive", layers, hidden)
