"""p(z) by a masked autoregressive flow."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pyro_vae.networks.bijections import Affine
from pyro_vae.networks.dense import Widths
from pyro_vae.networks.flows import Flow
from pyro_vae.priors.base import Shape
from pyro_vae.priors.flow import FlowPrior
from pyro_vae.registry import register


@register("priors", "maf")
class MaskedAutoregressive(FlowPrior):
    """z_i = (u_i - t_i(z_<i)) / exp(s_i(z_<i)), u ~ N(0, I), with the order of the latents reversed in every other layer.

    A density costs one pass of each layer, a draw ``latent_dim`` passes. Papamakarios, Pavlakou & Murray 2017,
    https://arxiv.org/abs/1705.07057; as the prior of a VAE, Chen et al. 2017, https://arxiv.org/abs/1611.02731.

    Args:
        layers: the number of autoregressive layers.
        hidden: widths of the hidden layers of each conditioner.
    """

    formula = "p(z) = N(f(z); 0, I) |det df/dz|, f masked autoregressive"

    def __init__(
        self, latent_shape: Shape, *, layers: Annotated[int, Field(ge=1, le=100)] = 4, hidden: Widths = (128,)
    ) -> None:
        super().__init__(latent_shape, Flow(latent_shape[0], Affine(), "autoregressive", layers, hidden))
