"""The variational autoencoder, as a Pyro program.

    p(x, z) = p(z) p(x | z)        z ~ prior,            x | z ~ likelihood(decoder(z))
    q(z | x)                       z | x ~ posterior(encoder(x))

Kingma & Welling 2014, Auto-Encoding Variational Bayes, https://arxiv.org/abs/1312.6114.
"""

from __future__ import annotations

from typing import Any

import pyro
from torch import Tensor, nn

from pyro_vae.likelihoods.base import Likelihood
from pyro_vae.networks.base import Network
from pyro_vae.posteriors.base import Distribution, Posterior
from pyro_vae.priors.base import Prior
from pyro_vae.registry import register


@register("programs", "vae")
class VAE(nn.Module):
    """One layer of latents ``z`` under one observation ``x`` of shape ``(batch, *event_shape)``."""

    spec: Any = None  # what it was declared by, for the record of a run

    def __init__(
        self, prior: Prior, decoder: Network, likelihood: Likelihood, encoder: Network, posterior: Posterior
    ) -> None:
        super().__init__()
        self.prior, self.decoder, self.likelihood = prior, decoder, likelihood
        self.encoder, self.posterior = encoder, posterior
        self.event_shape = likelihood.event_shape

    def model(self, x: Tensor) -> None:
        """p(z) p(x | z)."""
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", self.prior(x, self.q))
            pyro.sample("x", self.likelihood(self.decoder(z)), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z | x)."""
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", self.q(x))

    def q(self, x: Tensor) -> Distribution:
        """The density q(z | x), batch shape ``(batch,)``."""
        return self.posterior(self.encoder(x))
