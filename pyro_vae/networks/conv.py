"""The convolutional pair of the classic example on 28x28 images."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from pyro_vae.errors import UserError
from pyro_vae.networks.base import Network, Shape, linear
from pyro_vae.registry import register

Width = Annotated[int, Field(ge=1, le=100_000)]


def image_shape(shape: Shape, network: str) -> tuple[int, int, int]:
    """``shape`` as channels, height and width, both even; :class:`UserError` for anything else."""
    if len(shape) != 3 or shape[1] % 2 or shape[2] % 2 or min(shape) < 1:
        raise UserError(
            f"the {network} takes images (channels, height, width) of even height and width, not events of shape "
            f"{tuple(shape)}: choose an mlp, or pad or crop the images"
        )
    return shape[0], shape[1], shape[2]


@register("encoders", "conv")
class ConvEncoder(Network):
    """Convolutions 32, 64 (stride 2), 64, 64, all 3x3 with ReLU, then a dense layer of ``hidden`` units with ReLU.

    The classic convolutional VAE on 28x28 images; any even height and width will do.
    """

    def __init__(self, in_shape: Shape, *, channels: Width = 32, hidden: Width = 32) -> None:
        c, h, w = image_shape(in_shape, "conv encoder")
        super().__init__(in_shape, (hidden,))
        k = channels
        self.convolutions = nn.Sequential(
            *(nn.Conv2d(c, k, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(k, 2 * k, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(2 * k, 2 * k, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(2 * k, 2 * k, 3, padding=1), nn.ReLU()),
        )
        self.dense = nn.Sequential(nn.Flatten(), linear(2 * k * (h // 2) * (w // 2), hidden), nn.ReLU())

    def features(self, x: Tensor) -> Tensor:
        """Features ``(n, hidden)`` of images ``(n, C, H, W)``."""
        return self.dense(self.convolutions(x))


@register("decoders", "conv")
class ConvDecoder(Network):
    """A dense layer, then a transposed convolution 32 of stride 2, 3x3 with ReLU: features ``(32, H, W)``.

    The likelihood's head on a map of features is the last 3x3 convolution of the classic example.
    """

    def __init__(self, in_shape: Shape, data_shape: Shape, *, channels: Width = 32) -> None:
        _, h, w = image_shape(data_shape, "conv decoder")
        super().__init__(in_shape, (channels, h, w))
        self.start = (2 * channels, h // 2, w // 2)
        self.dense = nn.Sequential(linear(math.prod(in_shape), math.prod(self.start)), nn.ReLU())
        self.transposed = nn.Sequential(
            nn.ConvTranspose2d(2 * channels, channels, 3, stride=2, padding=1, output_padding=1), nn.ReLU()
        )

    def features(self, x: Tensor) -> Tensor:
        """Features ``(n, channels, H, W)`` of latents ``(n, latent_dim)``."""
        return self.transposed(self.dense(x.flatten(1)).reshape(-1, *self.start))
