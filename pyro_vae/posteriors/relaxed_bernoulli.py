"""q(z | x) = prod_d Bernoulli(z_d; p_d(x)), trained through the binary Concrete relaxation."""

from __future__ import annotations

from typing import Annotated, Any

import pyro.distributions as dist
import torch
from pydantic import Field
from pyro.distributions import constraints
from torch import Tensor

from pyro_vae.networks.heads import Head
from pyro_vae.posteriors.base import Distribution, Posterior, Shape
from pyro_vae.registry import register


@register("posteriors", "relaxed-bernoulli")
class RelaxedBernoulliPosterior(Posterior):
    """Binary latents; in training mode z = sigmoid((l(x) + logistic noise) / temperature), in evaluation mode discrete.

    The relaxation is a surrogate for training: z is soft there, and log q and log p are the Bernoulli's, linear in z,
    so that the estimated KL is the discrete one but for the bias of E[z]. Importance weights, validation and encoding run
    in evaluation mode, with the discrete guide of the same parameters. Maddison, Mnih & Teh 2017,
    https://arxiv.org/abs/1611.00712; Jang, Gu & Poole 2017, https://arxiv.org/abs/1611.01144.

    Args:
        temperature: of the relaxation; lower is closer to discrete, with noisier gradients.
        straight_through: hand the decoder the rounded z, and the gradient the soft one.
    """

    formula = "q(z | x) = prod_d Bernoulli(p_d(x)), relaxed in training"
    support = constraints.independent(constraints.boolean, 1)

    def __init__(
        self,
        feature_shape: Shape,
        latent_shape: Shape,
        *,
        temperature: Annotated[float, Field(gt=0)] = 0.5,
        straight_through: bool = False,
    ) -> None:
        super().__init__(feature_shape, latent_shape)
        self.temperature, self.straight_through = temperature, straight_through
        self.head = Head(feature_shape, latent_shape)

    def forward(self, features: Tensor) -> Distribution:
        """The product, relaxed in training mode, with batch shape the leading axes of ``features``."""
        (logits,) = self.head(features)
        if self.training:
            q = Relaxed(logits, self.temperature, self.straight_through)
        else:
            q = dist.Bernoulli(logits=logits, validate_args=False)
        return q.to_event(len(self.latent_shape))


class Relaxed(dist.Bernoulli):
    """A Bernoulli whose draws are the binary Concrete's, differentiable in the logits.

    Args:
        logits: ``(*batch_shape,)``.
        temperature: of the draws.
        straight_through: round them, keeping the gradient.
    """

    has_rsample = True

    def __init__(self, logits: Tensor, temperature: float, straight_through: bool) -> None:
        self.temperature, self.straight_through = temperature, straight_through
        super().__init__(logits=logits, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Relaxed:
        """The same for every element of a batch."""
        return Relaxed(self.logits.expand(torch.Size(batch_shape)), self.temperature, self.straight_through)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Soft draws in (0, 1), ``(*sample_shape, *batch_shape)``."""
        shape = self._extended_shape(sample_shape)
        eps = torch.finfo(self.logits.dtype).eps
        u = torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device).clamp(eps, 1 - eps)
        soft = ((self.logits + u.log() - (-u).log1p()) / self.temperature).sigmoid()
        return (soft > 0.5).to(soft.dtype) + soft - soft.detach() if self.straight_through else soft

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """The same without a gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape)
