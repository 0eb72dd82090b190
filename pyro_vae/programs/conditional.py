"""The conditional variational autoencoder, as a Pyro program.

    p(x, z | y) = p(z | y) p(x | z, y)      z ~ N(m(y), diag s(y)^2) or a prior without y,   x ~ likelihood(decoder(z, e(y)))
    q(z | x, y)                             z ~ posterior(encoder(x), e(y))

y is a class, of which e(y) is a learned embedding, or a vector of covariates, of which e(y) is linear. Sohn, Lee & Yan 2015,
Learning Structured Output Representation using Deep Conditional Generative Models,
https://papers.nips.cc/paper/5775-learning-structured-output-representation-using-deep-conditional-generative-models.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import pyro
import pyro.distributions as dist
from pydantic import Field
from torch import Tensor, nn

from pyro_vae.errors import UserError
from pyro_vae.likelihoods.base import Likelihood
from pyro_vae.networks.base import Network, beside, linear
from pyro_vae.posteriors.base import Distribution, Posterior
from pyro_vae.priors.base import Prior
from pyro_vae.priors.standard_normal import StandardNormal
from pyro_vae.programs.vae import VAE
from pyro_vae.registry import register

Size = Annotated[int, Field(ge=0, le=100_000)]
Width = Annotated[int, Field(ge=1, le=10_000)]
Shape = tuple[int, ...]


@register("programs", "conditional")
class Conditional(VAE):
    """One layer of latents ``z`` under ``x`` ``(batch, *event_shape)`` given ``y``: classes ``(batch,)``, or covariates.

    Args:
        classes: how many there are, where y is a class.
        covariates: how many there are, where y is ``(batch, covariates)`` numbers.
        embedding: numbers in e(y).
        in_prior: whether p(z | y) depends on y: a normal distribution, in the place of a standard-normal prior.
        in_decoder: whether p(x | z, y) does beyond z.
        in_guide: whether q(z | x, y) does.
    """

    def __init__(
        self,
        prior: Prior,
        decoder: Network,
        likelihood: Likelihood,
        encoder: Network,
        posterior: Posterior,
        *,
        classes: Size = 0,
        covariates: Size = 0,
        embedding: Width = 16,
        in_prior: bool = False,
        in_decoder: bool = True,
        in_guide: bool = True,
    ) -> None:
        super().__init__(prior, decoder, likelihood, encoder, posterior)
        if (classes > 0) == (covariates > 0):
            raise UserError(
                "the program 'conditional' is given classes or covariates: say how many there are, classes=10 or covariates=3"
            )
        if not (in_prior or in_decoder):
            raise UserError(
                "the program 'conditional' depends on y in its prior or in its decoder: switch one of them on"
            )
        if prior.scores_guide:
            raise UserError(
                "a prior that is made of the guide has no y to ask it with: choose another for a conditional program"
            )
        if in_prior and not isinstance(prior, StandardNormal):
            raise UserError(
                "in_prior makes the normal prior depend on y: choose the prior standard-normal, or in_prior=false"
            )
        self.in_decoder, self.in_guide = in_decoder, in_guide
        self.embed: nn.Module = nn.Embedding(classes, embedding) if classes else linear(covariates, embedding)
        self.locate = linear(embedding, 2 * math.prod(prior.latent_shape)) if in_prior else None

    @classmethod
    def decoder_shape(cls, latent: Shape, **options: Any) -> Shape:
        """Of what the decoder takes: latents, and the embedding behind them."""
        return _longer(latent, options) if options.get("in_decoder", True) else latent

    @classmethod
    def features_shape(cls, features: Shape, **options: Any) -> Shape:
        """Of what the posterior takes: the encoder's features, and the embedding behind them."""
        return _longer((math.prod(features),), options) if options.get("in_guide", True) else features

    def model(self, x: Tensor, y: Tensor) -> None:  # type: ignore[override]
        """p(z | y) p(x | z, y)."""
        e = self.embed(y)
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", self.p_given(x, e))
            inputs = beside(z, e) if self.in_decoder else z
            pyro.sample("x", self.likelihood(self.decoder(inputs)), obs=x)

    def guide(self, x: Tensor, y: Tensor) -> None:  # type: ignore[override]
        """q(z | x, y)."""
        with pyro.plate("data", x.shape[0], dim=-1):
            features = self.features(x)
            if self.in_guide:
                features = beside(features.flatten(1), self.embed(y))
            pyro.sample("z", self.posterior(features))

    def p_given(self, like: Tensor, e: Tensor) -> Distribution:
        """The density p(z | y), for an embedding ``(batch, embedding)``."""
        if self.locate is None:
            return self.p(like)
        loc, raw = self.locate(e).reshape(len(e), 2, *self.prior.latent_shape).unbind(1)
        return dist.Normal(loc, nn.functional.softplus(raw) + 1e-4, validate_args=False).to_event(loc.dim() - 1)


def _longer(shape: Shape, options: dict[str, Any]) -> Shape:
    if len(shape) != 1:
        raise UserError(
            f"the program 'conditional' takes latents that are vectors, and these are {shape}: choose another prior"
        )
    return (shape[0] + options.get("embedding", 16),)
