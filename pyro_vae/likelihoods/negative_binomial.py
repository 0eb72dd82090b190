"""p(x | z) = prod_d NegativeBinomial(mean mu_d(z), inverse dispersion theta_d)."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor

from pyro_vae.likelihoods.base import Distribution, InFloat64, Shape
from pyro_vae.likelihoods.counts import Dispersed, Dispersion, Library
from pyro_vae.registry import register


@register("likelihoods", "negative-binomial")
class NegativeBinomial(Dispersed):
    """Independent over-dispersed counts: mean mu, variance mu + mu^2 / theta.

    Gronbech et al. 2020, scVAE, https://doi.org/10.1093/bioinformatics/btaa293.

    Args:
        library: the mean of the total count of an event, shared out by a softmax; None for means of their own.
        dispersion: theta: ``"shared"`` (one, learned), ``"per-feature"`` or ``"decoder"`` (a function of z).
    """

    formula = "p(x | z) = prod_d NB(mean mu_d(z), variance mu_d + mu_d^2 / theta_d)"

    def __init__(
        self,
        feature_shape: Shape,
        event_shape: Shape,
        *,
        library: Library = None,
        dispersion: Dispersion = "per-feature",
    ) -> None:
        super().__init__(feature_shape, event_shape, 1, library, dispersion)

    def forward(self, features: Tensor) -> Distribution:
        """The product, event shape ``event_shape``."""
        f, *raw = self.head(features)
        theta = self.theta(raw)
        counts = NegativeBinomialInFloat64(theta, logits=self.log_mean(f) - theta.log(), validate_args=False)
        return counts.to_event(len(self.event_shape))


class NegativeBinomialInFloat64(InFloat64, dist.NegativeBinomial):
    """The negative binomial distribution."""
