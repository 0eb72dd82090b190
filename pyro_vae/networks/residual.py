"""A residual convolutional pair for images whose height and width divide by four: 28x28, 32x32."""

from __future__ import annotations

import math

from torch import Tensor, nn

from pyro_vae.errors import UserError
from pyro_vae.networks.base import Network, Shape, linear, normalised
from pyro_vae.networks.conv import Width, image_shape
from pyro_vae.registry import register


def _image(shape: Shape, network: str) -> tuple[int, int, int]:
    c, h, w = image_shape(shape, network)
    if h % 4 or w % 4:
        raise UserError(
            f"the {network} takes images whose height and width divide by four, not {h}x{w}: choose conv, or pad the images"
        )
    return c, h, w


class Residual(nn.Module):
    """x + conv(silu(conv(silu(x)))), the branch started small so that a deep stack starts near the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        last = nn.Conv2d(channels, channels, 3, padding=1)
        last.weight.data.mul_(0.1)
        self.branch = nn.Sequential(nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1), nn.SiLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


@register("encoders", "residual-conv")
class ResidualEncoder(Network):
    """Three stages of residual blocks at full, half and quarter size, then a dense layer of ``hidden`` units.

    Blocks are pre-activated (He et al. 2016, https://arxiv.org/abs/1603.05027) and have no batch normalisation: what an
    image's posterior is must not depend on the other images of the minibatch.

    Args:
        channels: at full size; twice as many at half, four times at quarter size.
        blocks: residual blocks per stage.
        hidden: the number of features.
        weight_norm: whether weights are g v / |v| (Salimans & Kingma 2016).
    """

    def __init__(
        self,
        in_shape: Shape,
        *,
        channels: Width = 32,
        blocks: Width = 1,
        hidden: Width = 256,
        weight_norm: bool = False,
    ) -> None:
        c, h, w = _image(in_shape, "residual-conv encoder")
        super().__init__(in_shape, (hidden,))
        layers: list[nn.Module] = [nn.Conv2d(c, channels, 3, padding=1), *(Residual(channels) for _ in range(blocks))]
        for k in (channels, 2 * channels):
            layers += [nn.Conv2d(k, 2 * k, 3, stride=2, padding=1), *(Residual(2 * k) for _ in range(blocks))]
        dense = linear(4 * channels * (h // 4) * (w // 4), hidden)
        self.layers = nn.Sequential(*layers, nn.SiLU(), nn.Flatten(), dense, nn.SiLU())
        normalised(self, weight_norm)

    def features(self, x: Tensor) -> Tensor:
        """Features ``(n, hidden)`` of images ``(n, C, H, W)``."""
        return self.layers(x)


@register("decoders", "residual-conv")
class ResidualDecoder(Network):
    """A dense layer, then residual blocks at quarter, half and full size, joined by transposed 4x4 convolutions.

    Maps that have a quarter or half of the image's size are begun from as they are, by a convolution. The likelihood's head on
    the map of features is a 3x3 convolution.

    Args:
        channels: at full size, and of the features; twice as many at half, four times at quarter size.
        blocks: residual blocks per stage.
        weight_norm: whether weights are g v / |v| (Salimans & Kingma 2016).
    """

    def __init__(
        self, in_shape: Shape, data_shape: Shape, *, channels: Width = 32, blocks: Width = 1, weight_norm: bool = False
    ) -> None:
        _, h, w = _image(data_shape, "residual-conv decoder")
        super().__init__(in_shape, (channels, h, w))
        fitting = (k for k in (2, 1) if tuple(in_shape[1:]) == (h >> k, w >> k))
        halvings = next(fitting, 0)  # of maps that are begun from
        first = channels << (halvings or 2)
        self.start = tuple(in_shape) if halvings else (first, h // 4, w // 4)
        self.dense: nn.Module = (
            nn.Conv2d(in_shape[0], first, 3, padding=1)
            if halvings
            else linear(math.prod(in_shape), math.prod(self.start))
        )
        layers: list[nn.Module] = [Residual(first) for _ in range(blocks)]
        for k in (4 * channels, 2 * channels)[2 - (halvings or 2) :]:
            layers += [nn.SiLU(), nn.ConvTranspose2d(k, k // 2, 4, stride=2, padding=1)]
            layers += [Residual(k // 2) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers, nn.SiLU())
        normalised(self, weight_norm)

    def features(self, x: Tensor) -> Tensor:
        """Features ``(n, channels, H, W)`` of latents ``(n, *latent_shape)``."""
        if isinstance(self.dense, nn.Conv2d):
            return self.layers(self.dense(x))
        return self.layers(self.dense(x.flatten(1)).reshape(-1, *self.start))
