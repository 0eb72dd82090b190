"""Several layers of latents, as one Pyro program.

    p(x, z1, ..., zL) = p(zL) p(z_{L-1} | zL) ... p(z1 | z2) p(x | z1)      with ``skip``, each given all layers above it
    bottom-up    q(z1 | x) q(z2 | z1) ... q(zL | z_{L-1})
    top-down     q(zL | x) q(z_{L-1} | x, zL) ... q(z1 | x, z2)
    ladder       the same order, each factor the normalised product of p(z_l | z_{l+1}) and a normal of features d_l(x),
                 which one deterministic pass makes from x upwards

The prior and the posterior that are declared are those of the top layer, of ``latent_dim`` units: any of ours. The layers below
it are diagonal normals, given what is above them in the model.

Burda, Grosse & Salakhutdinov 2016, https://arxiv.org/abs/1509.00519, L = 2 (bottom-up); Tomczak & Welling 2018,
https://arxiv.org/abs/1705.07120, section 3 (top-down with skip); Sonderby et al. 2016, https://arxiv.org/abs/1602.02282 (ladder);
Vahdat & Kautz 2020, https://arxiv.org/abs/2007.03898, section 3.2 (residual).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pydantic import Field
from torch import Tensor, nn

from pyro_vae.errors import UserError
from pyro_vae.likelihoods.base import Likelihood
from pyro_vae.networks.base import Activation, Network, beside
from pyro_vae.networks.dense import MLP, Linear, Widths
from pyro_vae.posteriors.base import Distribution, Posterior
from pyro_vae.posteriors.diagonal_normal import DiagonalNormal
from pyro_vae.priors.base import Prior
from pyro_vae.programs.vae import VAE
from pyro_vae.registry import register

Shape = tuple[int, ...]
Hidden = Annotated[Sequence[Annotated[int, Field(ge=1, le=1_000_000)]], Field(max_length=64)]
BELOW, HIDDEN = (100,), (200,)


@register("programs", "hierarchical")
class Hierarchical(VAE):
    """Latents ``z1``, ..., ``zL`` under ``x`` ``(batch, *event_shape)``, vectors all; ``zL`` is the top.

    Args:
        below: units of the layers below the top, z1 first.
        inference: the order of the guide, and what its factors are made of.
        hidden: widths of the network between any two layers, in the model and in the guide; none for a linear map.
        activation: of these networks.
        skip: whether every layer, and x, is given all layers above it and not the next alone.
        residual: top-down only: q(z_l) = N(mu + m, (s t)^2), where p(z_l) = N(mu, s^2), so that the guide says what differs.
        weight_norm: whether weights of these networks are g v / |v| (Salimans & Kingma 2016).
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
        inference: Literal["bottom-up", "top-down", "ladder"] = "bottom-up",
        hidden: Hidden = HIDDEN,
        activation: Activation = "silu",
        skip: bool = False,
        residual: bool = False,
        weight_norm: bool = False,
    ) -> None:
        super().__init__(prior, decoder, likelihood, encoder, posterior)
        if prior.scores_guide and inference == "bottom-up":
            raise UserError(
                "a prior that is made of the guide asks it for the top layer given x, which bottom-up inference has only given "
                "the layer below: choose inference top-down or ladder, or another prior"
            )
        if residual and inference != "top-down":
            raise UserError(f"residual is of inference top-down, and this is {inference}: leave it out, or choose that")
        self.inference, self.skip, self.residual = inference, skip, residual
        dims = [*below, math.prod(prior.latent_shape)]
        layers, features = range(len(below)), math.prod(encoder.out_shape)
        above = [sum(dims[i + 1 :]) if skip else dims[i + 1] for i in layers]
        read = {  # by the guide's network of a layer
            "bottom-up": dims[:-1],
            "top-down": [features + n for n in above],
            "ladder": [features, *((hidden[-1] if hidden else features) for _ in below[1:])],
        }[inference]

        def network(inputs: int) -> Network:
            if not hidden:
                return Linear((inputs,))
            return MLP((inputs,), hidden=hidden, activation=activation, weight_norm=weight_norm)

        down, between = ([network(n) for n in inputs] for inputs in (above, read))
        self.down, self.between = nn.ModuleList(down), nn.ModuleList(between)
        made = [net.out_shape for net in between]  # of what each layer of the guide is a normal
        made = made if inference == "top-down" else [(features,), *made[:-1]]
        self.priors = nn.ModuleList(DiagonalNormal(net.out_shape, (n,)) for net, n in zip(down, below, strict=True))
        self.posteriors = nn.ModuleList(DiagonalNormal(shape, (n,)) for shape, n in zip(made, below, strict=True))

    @classmethod
    def decoder_shape(cls, latent: Shape, **options: Any) -> Shape:
        """Of what the decoder takes: z1, or all layers."""
        below = options.get("below", BELOW)
        return (sum(below) + math.prod(latent),) if options.get("skip", False) else (below[0],)

    @classmethod
    def features_shape(cls, features: Shape, **options: Any) -> Shape:
        """Of what the top's posterior takes: the encoder's features, or what the networks between the layers make of them."""
        inference, hidden = options.get("inference", "bottom-up"), options.get("hidden", HIDDEN)
        if inference != "top-down" and hidden:
            return (hidden[-1],)
        return (options.get("below", BELOW)[-1],) if inference == "bottom-up" else features

    @property
    def top(self) -> str:
        """The name of the uppermost latent."""
        return f"z{len(self.priors) + 1}"

    def model(self, x: Tensor) -> None:
        """p(zL) ... p(z1 | z2) p(x | z)."""
        with pyro.plate("data", x.shape[0], dim=-1):
            above = [self._vector(pyro.sample(self.top, self.p(x)))]
            for i in reversed(range(len(self.priors))):
                above.insert(0, pyro.sample(f"z{i + 1}", self.p_given(i, above)))
            pyro.sample("x", self.likelihood(self.decoder(self._seen(above))), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z | x), in the order that ``inference`` says."""
        with pyro.plate("data", x.shape[0], dim=-1):
            features = self.features(x).flatten(1)
            if self.inference == "bottom-up":
                for i in range(len(self.priors)):
                    features = self.between[i](pyro.sample(f"z{i + 1}", self.posteriors[i](features)))
                pyro.sample(self.top, self.posterior(features))
                return
            upward = self.upward(features)
            above = [self._vector(pyro.sample(self.top, self.posterior(upward[-1])))]
            for i in reversed(range(len(self.priors))):
                above.insert(0, pyro.sample(f"z{i + 1}", self.q_given(i, upward, above)))

    def p(self, like: Tensor) -> Distribution:
        """The density p(zL), for a batch like ``like``."""
        return self.prior(like, lambda standard: self.posterior(self.upward(self.encoder(standard).flatten(1))[-1]))

    def upward(self, features: Tensor) -> list[Tensor]:
        """What the guide's layers are made of, from the encoder's features: these for all, or the steps of a ladder."""
        found = [features]
        for network in self.between if self.inference == "ladder" else ():
            found.append(network(found[-1]))
        return found

    def p_given(self, i: int, above: list[Tensor]) -> Distribution:
        """The density p(z | what is above) of layer ``i`` from below, 0 being z1."""
        density: Distribution = self.priors[i](self.down[i](self._seen(above)))
        return density

    def q_given(self, i: int, upward: list[Tensor], above: list[Tensor]) -> Distribution:
        """The density q(z | x, what is above) of layer ``i`` from below."""
        if self.inference == "ladder":
            return product(self.p_given(i, above), self.posteriors[i](upward[i]))
        own: Distribution = self.posteriors[i](self.between[i](beside(upward[0], self._seen(above))))
        return relative(self.p_given(i, above), own) if self.residual else own

    def _seen(self, above: list[Tensor]) -> Tensor:
        return beside(*above) if self.skip else above[0]

    def _vector(self, z: Tensor) -> Tensor:
        return z.flatten(-len(self.prior.latent_shape))


def product(p: Any, q: Any) -> Distribution:
    """The normal whose density is proportional to the product of two diagonal ones: means weighted by their precisions."""
    (a, s), (b, t) = ((fn.base_dist.loc, fn.base_dist.scale) for fn in (p, q))
    scale = s * t * torch.rsqrt(s.square() + t.square())
    return _normal((a * t.square() + b * s.square()) / (s.square() + t.square()), scale, p.event_dim)


def relative(p: Any, q: Any) -> Distribution:
    """N(mu + m, (s t)^2) of p = N(mu, s^2) and q = N(m, t^2)."""
    return _normal(p.base_dist.loc + q.base_dist.loc, p.base_dist.scale * q.base_dist.scale, p.event_dim)


def _normal(loc: Tensor, scale: Tensor, event_dim: int) -> Distribution:
    density: Distribution = dist.Normal(loc, scale, validate_args=False).to_event(event_dim)
    return density
