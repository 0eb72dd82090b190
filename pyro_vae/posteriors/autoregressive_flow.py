"""q(z | x) by inverse autoregressive flow."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pyro_vae.networks.bijections import Affine
from pyro_vae.networks.dense import Widths
from pyro_vae.posteriors.base import Shape
from pyro_vae.posteriors.flow import FlowPosterior
from pyro_vae.registry import register


@register("posteriors", "autoregressive-flow")
class AutoregressiveFlow(FlowPosterior):
    """Inverse autoregressive flow: u_i -> exp(s_i(u_<i, x)) u_i + t_i(u_<i, x), layer upon layer.

    Kingma et al. 2016, https://arxiv.org/abs/1606.04934. Drawing, and scoring what was drawn, is one pass per layer;
    any other z takes ``latent_dim`` passes per layer.

    Args:
        layers: the number of autoregressive layers.
        hidden: widths of the hidden layers of each conditioner.
    """

    formula = "q(z | x): z = mu(x) + s(x) T(e; x), T inverse autoregressive, e ~ N(0, I)"
    scoring = "sequential"

    def __init__(
        self,
        feature_shape: Shape,
        latent_shape: Shape,
        *,
        layers: Annotated[int, Field(ge=1, le=100)] = 2,
        hidden: Widths = (128,),
    ) -> None:
        super().__init__(feature_shape, latent_shape, Affine(), "autoregressive", layers, hidden)
