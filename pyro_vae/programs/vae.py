"""The variational autoencoder, as a Pyro program.

    p(x, z) = p(z) p(x | z)        z ~ prior,            x | z ~ likelihood(decoder(z))
    q(z | x)                       z | x ~ posterior(encoder(x))

The networks may see x in standard units (:mod:`pyro_vae.likelihoods.units`); p(x | z) is always a density of x itself.

Kingma & Welling 2014, Auto-Encoding Variational Bayes, https://arxiv.org/abs/1312.6114.
"""

from __future__ import annotations

from typing import Any

import pyro
from torch import Tensor, nn

from pyro_vae.likelihoods.base import Likelihood
from pyro_vae.likelihoods.units import By, Units
from pyro_vae.networks.base import Network
from pyro_vae.posteriors.base import Distribution, Posterior
from pyro_vae.priors.base import Prior
from pyro_vae.registry import register


@register("programs", "vae")
class VAE(nn.Module):
    """One layer of latents ``z`` under one observation ``x`` of shape ``(batch, *event_shape)``."""

    latents = True  # whether prior, posterior and networks for them are declared
    spec: Any = None  # what it was declared by, for the record of a run
    trained = False  # whether it ever was: from then on it has the units that it has, or none

    def __init__(
        self, prior: Prior, decoder: Network, likelihood: Likelihood, encoder: Network, posterior: Posterior
    ) -> None:
        super().__init__()
        self.prior, self.decoder, self.likelihood = prior, decoder, likelihood
        self.encoder, self.posterior = encoder, posterior
        self.event_shape = likelihood.event_shape

    @classmethod
    def decoder_shape(cls, latent: tuple[int, ...], **options: Any) -> tuple[int, ...]:
        """Of what the decoder takes, from the shape of the latents, and by keyword the ``event_shape`` and declared options."""
        return latent

    @classmethod
    def features_shape(cls, features: tuple[int, ...], **options: Any) -> tuple[int, ...]:
        """Of what the posterior takes, from the shape of the encoder's features."""
        return features

    @property
    def formulas(self) -> dict[str, str]:
        """What the program is in mathematics, part by part."""
        return {"prior": self.prior.formula, "likelihood": self.likelihood.formula, "guide": self.posterior.formula}

    def start_at(self, mean: Tensor, spread: float | None = None) -> None:
        """Start where p(x | z) has about the mean of the training data: see :meth:`Likelihood.start_at`."""
        self.likelihood.start_at(mean, spread)

    def model(self, x: Tensor) -> None:
        """p(z) p(x | z)."""
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", self.p(x))
            pyro.sample("x", self.likelihood(self.decoder(z)), obs=x)

    model.one_row_will_do = True  # type: ignore[attr-defined]  # of latents that are the same for all: they are decoded once

    def guide(self, x: Tensor) -> None:
        """q(z | x)."""
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", self.q(x))

    def p(self, like: Tensor) -> Distribution:
        """The density p(z), for a batch like ``like``; a prior that is made of the guide asks it in standard units."""
        return self.prior(like, lambda standard: self.posterior(self.encoder(standard)))

    def q(self, x: Tensor) -> Distribution:
        """The density q(z | x), batch shape ``(batch,)``."""
        return self.posterior(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """What the encoder makes of x, in standard units where there are some."""
        units = self.likelihood.units
        features: Tensor = self.encoder(x if units is None else units(x))
        return features

    def take_units(self, by: By) -> Units:
        """Let the networks see x in standard units from now on, a scale for each of the ``columns`` or ``one`` for all."""
        self.prior.in_standard_units()
        return self.likelihood.in_units(by)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take the units that weights come with: a program that was built anew has none."""
        scale = state_dict.get(f"{prefix}likelihood.units.scale")
        if scale is not None and self.likelihood.units is None:
            self.take_units("columns" if scale.numel() == self.event_shape[-1] else "one")
        super()._load_from_state_dict(state_dict, prefix, *rest)
