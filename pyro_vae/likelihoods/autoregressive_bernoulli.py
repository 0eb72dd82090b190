"""p(x | z) = prod_d Bernoulli(x_d; sigmoid f_d(x_<d, z)): the decoder of PixelVAE."""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Any, ClassVar

import pyro.distributions as dist
import torch
from pydantic import AfterValidator, Field
from pyro.distributions import constraints
from torch import Tensor

from pyro_vae.errors import UserError
from pyro_vae.likelihoods.base import Distribution, Likelihood, Shape
from pyro_vae.networks.heads import Head
from pyro_vae.networks.masked_conv import Image, PixelNet
from pyro_vae.registry import register

MOST_PIXELS = 10  # of an image whose mean is summed over all images


def _odd(kernel: int) -> int:
    if kernel % 2 == 0:
        raise ValueError("expected an odd number")
    return kernel


@register("likelihoods", "autoregressive-bernoulli")
class AutoregressiveBernoulli(Likelihood):
    """Binary pixels that depend on z and on the pixels before them, through masked convolutions over x.

    The convolutions take over texture and strokes, and z what is far apart; a decoder this strong may leave z unused.
    Scoring is one pass; drawing goes pixel by pixel, and a mean is taken over draws. Gulrajani et al. 2017, PixelVAE,
    https://arxiv.org/abs/1611.05013; van den Oord, Kalchbrenner & Kavukcuoglu 2016, https://arxiv.org/abs/1601.06759. Events are
    images (C, H, W), in raster order and channel by channel; (H, W) and (D,) are taken as images of one channel and one row.

    Args:
        channels: of the hidden layers; at least the image's own.
        layers: hidden layers after the first.
        kernel: the width of the convolutions, odd.
        maps: channels that z adds before every layer, as large as the image; it also sets the log-odds without x.
    """

    formula = "p(x | z) = prod_d Bernoulli(sigmoid f_d(x_<d, z))"
    data = "binary"
    support = constraints.boolean

    def __init__(
        self,
        feature_shape: Shape,
        event_shape: Shape,
        *,
        channels: Annotated[int, Field(ge=1, le=10_000)] = 32,
        layers: Annotated[int, Field(ge=0, le=100)] = 3,
        kernel: Annotated[int, Field(ge=3, le=99), AfterValidator(_odd)] = 7,
        maps: Annotated[int, Field(ge=1, le=1000)] = 4,
    ) -> None:
        super().__init__(feature_shape, event_shape)
        if len(event_shape) > 3 or channels < self.image[0]:
            raise UserError(
                f"the autoregressive-bernoulli likelihood takes images (C, H, W) of at most {channels} channels, not events of "
                f"shape {tuple(event_shape)}: choose more channels, or bernoulli"
            )
        c, *size = self.image
        self.head = Head(feature_shape, (c + maps, *size))
        self.net = PixelNet(self.image, channels=channels, layers=layers, kernel=kernel, maps=maps)

    @property
    def image(self) -> Image:
        """The event as channels, height and width."""
        c, h, w = (*(1,) * (3 - len(self.event_shape)), *self.event_shape)
        return c, h, w

    def forward(self, features: Tensor) -> Distribution:
        """The product of conditionals, event shape ``event_shape``."""
        (y,) = self.head(features)
        logits, maps = y.split([self.image[0], y.shape[-3] - self.image[0]], -3)
        return PixelBernoulli(self.net, logits, maps.tanh(), self.event_shape)

    def start_at(self, mean: Tensor, spread: float | None = None) -> None:
        """Log-odds without x = logit of the mean image."""
        logit = mean.clamp(1e-3, 1 - 1e-3).logit().reshape(self.image)
        bias = logit.new_zeros(self.head.event_shape)
        bias[: len(logit)] = logit
        self.head.set_bias(bias)


class PixelBernoulli(dist.TorchDistribution):
    """Binary images by a :class:`PixelNet`.

    Args:
        net: adds to the log-odds of every pixel what the pixels before it say.
        logits: the log-odds without x ``(*batch_shape, C, H, W)``.
        maps: what the net is told of z ``(*batch_shape, maps, H, W)``.
        event_shape: of x, the same number of pixels.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, net: PixelNet, logits: Tensor, maps: Tensor, event_shape: Shape) -> None:
        self.net, self.logits, self.maps = net, logits, maps
        super().__init__(logits.shape[:-3], torch.Size(event_shape), validate_args=False)

    @constraints.dependent_property(is_discrete=True)
    def support(self) -> constraints.Constraint:
        """Zeros and ones."""
        return constraints.independent(constraints.boolean, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> PixelBernoulli:
        """The same for every element of a batch."""
        logits, maps = (t.expand(torch.Size(batch_shape) + t.shape[-3:]) for t in (self.logits, self.maps))
        return PixelBernoulli(self.net, logits, maps, self.event_shape)

    def log_odds(self, value: Tensor) -> Tensor:
        """Log-odds of every pixel given those before it, ``(*leading, C, H, W)``."""
        leading = value.shape[: value.dim() - len(self.event_shape)]
        return self.logits + self.net(value.reshape(*leading, *self.logits.shape[-3:]), self.maps)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log p(x), ``(*leading,)``."""
        odds = self.log_odds(value)
        x = value.reshape(*value.shape[: value.dim() - len(self.event_shape)], *odds.shape[-3:])
        loss = torch.nn.functional.binary_cross_entropy_with_logits(odds, x.expand(odds.shape), reduction="none")
        return -loss.sum((-3, -2, -1))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws, pixel by pixel."""
        shape = torch.Size(sample_shape) + self.batch_shape
        logits, maps = (
            t.detach().expand(shape + t.shape[-3:]).reshape(shape.numel(), *t.shape[-3:])
            for t in (self.logits, self.maps)
        )
        return self.net.sample(logits, maps).reshape(shape + self.event_shape)

    @property
    def mean(self) -> Tensor:
        """E[x] of images of up to ten pixels, by summing over all of them; larger ones have no closed form."""
        pixels = math.prod(self.event_shape)
        if pixels > MOST_PIXELS:
            raise NotImplementedError("the mean of an autoregressive density has no closed form: average draws")
        all_images = torch.tensor(list(itertools.product([0.0, 1.0], repeat=pixels)), dtype=self.logits.dtype)
        x = all_images.to(self.logits.device).reshape(-1, *(1,) * len(self.batch_shape), *self.event_shape)
        mass = self.log_prob(x).exp()
        return (mass.reshape(*mass.shape, *(1,) * len(self.event_shape)) * x).sum(0)
