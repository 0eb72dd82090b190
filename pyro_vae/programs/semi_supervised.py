"""The semi-supervised variational autoencoder M2, as a Pyro program.

    p(x, label, z) = p(label) p(z) p(x | label, z)      label ~ Categorical,  z ~ prior,  x ~ likelihood(decoder(z, label))
    q(label, z | x) = q(label | x) q(z | x, label)       by one encoder

A record ``{"x": ..., "label": ...}``: the label is observed in rows where it is present, a latent that is summed over where it is
missing. Kingma, Rezende, Mohamed & Welling 2014, Semi-Supervised Learning with Deep Generative Models,
https://arxiv.org/abs/1406.5298. (M1+M2 is this on the latents of a VAE that was trained before.)
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import pyro
import pyro.distributions as dist
import torch
from pydantic import Field
from torch import Tensor, nn

from pyro_vae.data.record import Record
from pyro_vae.errors import UserError
from pyro_vae.likelihoods.base import Likelihood
from pyro_vae.networks.base import Network, beside, linear
from pyro_vae.posteriors.base import Posterior
from pyro_vae.priors.base import Prior
from pyro_vae.programs.vae import VAE
from pyro_vae.registry import register

Shape = tuple[int, ...]


@register("programs", "semi-supervised")
class SemiSupervised(VAE):
    """A class ``label`` and one layer of latents ``z`` under ``x``; without a column ``label`` it is a latent of every row.

    Args:
        classes: how many there are.
    """

    def __init__(
        self,
        prior: Prior,
        decoder: Network,
        likelihood: Likelihood,
        encoder: Network,
        posterior: Posterior,
        *,
        classes: Annotated[int, Field(ge=2, le=128)] = 10,
    ) -> None:
        super().__init__(prior, decoder, likelihood, encoder, posterior)
        if prior.scores_guide:
            raise UserError(
                "a prior that is made of the guide has no label to ask it with: choose another for a semi-supervised program"
            )
        self.classes = classes
        self.class_logits = nn.Parameter(torch.zeros(classes))
        self.classify = linear(math.prod(encoder.out_shape), classes)

    @property
    def columns(self) -> dict[str, Shape]:
        """The shape of a row of each column."""
        return {"x": tuple(self.event_shape), "label": ()}

    @classmethod
    def decoder_shape(cls, latent: Shape, **options: Any) -> Shape:
        """Of what the decoder takes: latents, and the label behind them, one number for each class."""
        if len(latent) != 1:
            raise UserError(f"the program 'semi-supervised' takes latents that are vectors, and these are {latent}")
        return (latent[0] + options.get("classes", 10),)

    @classmethod
    def features_shape(cls, features: Shape, **options: Any) -> Shape:
        """Of what the posterior takes: the encoder's features, and the label behind them."""
        return (math.prod(features) + options.get("classes", 10),)

    def model(self, x: Record | Tensor) -> None:
        """p(label) p(z) p(x | label, z)."""
        data: Tensor = x["x"] if isinstance(x, Record) else x
        with pyro.plate("data", len(data), dim=-1):
            label = pyro.sample("label", dist.Categorical(logits=self.class_logits))
            z = pyro.sample("z", self.p(data))
            pyro.sample("x", self.likelihood(self.decoder(self._beside(z, label))), obs=data)

    def guide(self, x: Record | Tensor) -> None:
        """q(label | x) q(z | x, label)."""
        data: Tensor = x["x"] if isinstance(x, Record) else x
        with pyro.plate("data", len(data), dim=-1):
            features = self.features(data).flatten(1)
            label = pyro.sample("label", dist.Categorical(logits=self.classify(features)))
            pyro.sample("z", self.posterior(self._beside(features, label)))

    def _beside(self, values: Tensor, label: Tensor) -> Tensor:
        return beside(values, nn.functional.one_hot(label.long(), self.classes).to(values.dtype))
