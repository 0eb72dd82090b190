"""p(x | z) = prod_d [pi_d(z) at 0 + (1 - pi_d(z)) NegativeBinomial(mu_d(z), theta_d)]."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor

from pyro_vae.likelihoods.base import Distribution, Shape
from pyro_vae.likelihoods.counts import Dispersed, Dispersion, Library
from pyro_vae.likelihoods.negative_binomial import NegativeBinomialInFloat64
from pyro_vae.registry import register


@register("likelihoods", "zero-inflated-negative-binomial")
class ZeroInflatedNegativeBinomial(Dispersed):
    """Over-dispersed counts with zeros in excess: genes that a cell expresses and the experiment misses.

    Lopez et al. 2018, scVI, https://doi.org/10.1038/s41592-018-0229-2, with one library size for all cells.

    Args:
        library: the mean of the total count of an event, shared out by a softmax; None for means of their own.
        dispersion: theta: ``"shared"`` (one, learned), ``"per-feature"`` or ``"decoder"`` (a function of z).
    """

    formula = "p(x | z) = prod_d [pi_d(z) 1(x_d = 0) + (1 - pi_d(z)) NB(x_d; mu_d(z), theta_d)]"

    def __init__(
        self,
        feature_shape: Shape,
        event_shape: Shape,
        *,
        library: Library = None,
        dispersion: Dispersion = "per-feature",
    ) -> None:
        super().__init__(feature_shape, event_shape, 2, library, dispersion)
        self.head.set_bias(-2.0, param=1)

    def forward(self, features: Tensor) -> Distribution:
        """The product, event shape ``event_shape``."""
        f, gate, *raw = self.head(features)
        theta = self.theta(raw)
        logits = self.log_mean(f) - theta.log()
        base = NegativeBinomialInFloat64(theta, logits=logits, validate_args=False)
        counts = dist.ZeroInflatedDistribution(base, gate_logits=gate, validate_args=False)
        return counts.to_event(len(self.event_shape))
