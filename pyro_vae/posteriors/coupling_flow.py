"""q(z | x) by affine coupling layers."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pyro_vae.networks.bijections import Affine
from pyro_vae.networks.dense import Widths
from pyro_vae.posteriors.base import Shape
from pyro_vae.posteriors.flow import FlowPosterior
from pyro_vae.registry import register


@register("posteriors", "coupling-flow")
class CouplingFlow(FlowPosterior):
    """Affine coupling layers conditioned on the image: half of the latents sets scale and shift of the other half.

    Dinh, Sohl-Dickstein & Bengio 2017, Real NVP, https://arxiv.org/abs/1605.08803. Cheap both ways: any z is scored in
    two passes per layer, whatever ``latent_dim``.

    Args:
        layers: the number of coupling layers.
        hidden: widths of the hidden layers of each conditioner.
    """

    formula = "q(z | x): z = mu(x) + s(x) T(e; x), T affine couplings, e ~ N(0, I)"

    def __init__(
        self,
        feature_shape: Shape,
        latent_shape: Shape,
        *,
        layers: Annotated[int, Field(ge=1, le=100)] = 4,
        hidden: Widths = (128,),
    ) -> None:
        super().__init__(feature_shape, latent_shape, Affine(), "coupling", layers, hidden)
