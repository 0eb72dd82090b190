"""Layers of spatial latents on convolutional networks, as one Pyro program.

    p(x, z1, ..., zL) = p(zL) prod_l p(z_l | z_{>l}) p(x | z)      h_l = block(h_{l+1} + map(z_{l+1})), z_l and x given h_l
    q(z | x) = q(zL | x) prod_l q(z_l | x, z_{>l})                 by h_l, and maps d_l(x) that one pass makes from x upwards

The state h goes down past every layer and keeps what is above it (skip connections): x is given all latents. zL is a vector, with
the prior, the posterior and the encoder that are declared; the layers below it are maps, two or more times smaller than x.

Maaloe et al. 2019, https://arxiv.org/abs/1902.02102 (two directions, skip connections); Vahdat & Kautz 2020,
https://arxiv.org/abs/2007.03898 (residual blocks, residual normals); Child 2021, https://arxiv.org/abs/2011.10650 (one vector at
the top, no batch normalisation).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Any

import pyro
import torch
from pydantic import Field
from torch import Tensor, nn

from pyro_vae.errors import UserError
from pyro_vae.likelihoods.base import Likelihood
from pyro_vae.networks.base import Network, linear, normalised
from pyro_vae.networks.conv import Width
from pyro_vae.networks.dense import Widths
from pyro_vae.networks.residual import Residual
from pyro_vae.posteriors.base import Distribution, Posterior
from pyro_vae.posteriors.diagonal_normal import DiagonalNormal
from pyro_vae.priors.base import Prior
from pyro_vae.programs.hierarchical import relative
from pyro_vae.programs.vae import VAE
from pyro_vae.registry import register

Shape = tuple[int, ...]
BELOW, CHANNELS = (2, 4), 16


@register("programs", "bidirectional")
class Bidirectional(VAE):
    """Latents ``z1``, ..., ``zL`` under images ``x`` ``(batch, C, H, W)``: maps, and a vector ``zL`` at the top.

    Args:
        below: channels of the latents at each scale, from a half of the image's height and width downwards: z1 first.
        repeat: layers of latents at each scale.
        channels: of the state at the largest scale, and twice as many at every next.
        residual: q(z_l) = N(mu + m, (s t)^2), where p(z_l) = N(mu, s^2), so that the guide says what differs.
        weight_norm: whether weights of the convolutions are g v / |v| (Salimans & Kingma 2016).
    """

    def __init__(
        self,
        prior: Prior,
        decoder: Network,
        likelihood: Likelihood,
        encoder: Network,
        posterior: Posterior,
        *,
        below: Widths = BELOW,
        repeat: Annotated[int, Field(ge=1, le=100)] = 1,
        channels: Width = CHANNELS,
        residual: bool = True,
        weight_norm: bool = False,
    ) -> None:
        super().__init__(prior, decoder, likelihood, encoder, posterior)
        scales = _scales(self.event_shape, below, channels)
        self.repeat, self.start_shape = repeat, scales[-1]
        widths = [self.event_shape[0], *(shape[0] for shape in scales)]
        self.up = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1), Residual(o)) for i, o in pairwise(widths)
        )
        self.start = linear(math.prod(prior.latent_shape), math.prod(self.start_shape))
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(o, i, 4, stride=2, padding=1) for i, o in pairwise(widths[1:]))
        self.layers = nn.ModuleList(
            _Layer(shape, count, residual) for shape, count in zip(scales, below, strict=True) for _ in range(repeat)
        )
        for part in (self.up, self.enlarge, self.layers):
            normalised(part, weight_norm)

    @classmethod
    def decoder_shape(cls, latent: Shape, **options: Any) -> Shape:
        """Of what the decoder takes: the state, at the largest scale."""
        below, channels = options.get("below", BELOW), options.get("channels", CHANNELS)
        return _scales(options["event_shape"], below, channels)[0]

    def model(self, x: Tensor) -> None:
        """p(zL) ... p(z1 | z_{>1}) p(x | z)."""
        with pyro.plate("data", x.shape[0], dim=-1):
            state = self._begin(pyro.sample(f"z{len(self.layers) + 1}", self.p(x)))
            for i in reversed(range(len(self.layers))):
                layer: Any = self.layers[i]
                state = self._go_on(i, layer.take(state, pyro.sample(f"z{i + 1}", layer.p(state))))
            pyro.sample("x", self.likelihood(self.decoder(state)), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(zL | x) ... q(z1 | x, z_{>1})."""
        seen = x if self.likelihood.units is None else self.likelihood.units(x)
        maps: list[Tensor] = []
        for network in self.up:
            maps.append(network(maps[-1] if maps else seen))
        with pyro.plate("data", x.shape[0], dim=-1):
            state = self._begin(pyro.sample(f"z{len(self.layers) + 1}", self.posterior(self.encoder(seen))))
            for i in reversed(range(len(self.layers))):
                layer: Any = self.layers[i]
                z = pyro.sample(f"z{i + 1}", layer.q(state, maps[i // self.repeat]))
                state = self._go_on(i, layer.take(state, z)) if i else state

    def _begin(self, z: Tensor) -> Tensor:
        """The state at the smallest scale, from the top's latents."""
        flat = self.start(z.flatten(-len(self.prior.latent_shape)))
        return flat.reshape(*flat.shape[:-1], *self.start_shape)

    def _go_on(self, i: int, state: Tensor) -> Tensor:
        """The state below layer ``i``: enlarged after the last layer of a scale."""
        scale, last = divmod(i, self.repeat)
        return _on_maps(self.enlarge[scale - 1], state) if scale and not last else state


class _Layer(nn.Module):
    """One layer of latents ``(count, h, w)``: its densities given the state ``(C, h, w)``, and what it adds to the state."""

    def __init__(self, shape: Shape, count: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.prior_block, self.merge = Residual(shape[0]), nn.Conv2d(2 * shape[0], shape[0], 3, padding=1)
        self.prior = DiagonalNormal(shape, (count, *shape[1:]))
        self.posterior = DiagonalNormal(shape, (count, *shape[1:]))
        self.add, self.block = nn.Conv2d(count, shape[0], 1), Residual(shape[0])

    def p(self, state: Tensor) -> Distribution:
        density: Distribution = self.prior(_on_maps(self.prior_block, state))
        return density

    def q(self, state: Tensor, maps: Tensor) -> Distribution:
        """Of the state ``(*leading, C, h, w)`` and of maps of x ``(batch, C, h, w)``."""
        both = torch.cat([state, maps.expand(state.shape)], -3)
        own: Distribution = self.posterior(nn.functional.silu(_on_maps(self.merge, both)))
        return relative(self.p(state), own) if self.residual else own

    def take(self, state: Tensor, z: Tensor) -> Tensor:
        return _on_maps(self.block, state + _on_maps(self.add, z))


def _on_maps(module: Any, x: Tensor) -> Tensor:
    """A module of maps ``(n, C, H, W)``, for any leading axes."""
    found: Tensor = module(x.flatten(0, -4))
    return found.reshape(*x.shape[:-3], *found.shape[1:])


def _scales(event: Shape, below: Any, channels: int) -> list[Shape]:
    """The shapes of the state, from the largest scale downwards."""
    part = 2 ** len(below)
    if len(event) != 3 or event[1] % part or event[2] % part:
        raise UserError(
            f"the program 'bidirectional' halves images (channels, height, width) {len(below)} times, and these are "
            f"{tuple(event)}: pad the images, declare fewer scales in below, or choose the program hierarchical"
        )
    return [(channels << s, event[1] >> s + 1, event[2] >> s + 1) for s in range(len(below))]
