"""q(z | x) = prod_d Categorical(z_d; p_d(x)), z_d one-hot, trained through the Gumbel-softmax relaxation."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from pyro.distributions import constraints
from torch import Tensor

from pyro_vae.errors import UserError
from pyro_vae.networks.heads import Head
from pyro_vae.posteriors.base import Distribution, Posterior, Shape
from pyro_vae.posteriors.categorical import OneHot, one_hot
from pyro_vae.registry import register


@register("posteriors", "relaxed-categorical")
class RelaxedCategorical(Posterior):
    """One-hot latents; in training mode z = softmax((l(x) + Gumbel noise) / temperature), in evaluation mode discrete.

    The relaxation is a surrogate for training: z is soft there, and log q and log p are the categorical's, linear in z,
    so that the estimated KL is the discrete one but for the bias of E[z]. Importance weights, validation and encoding run
    in evaluation mode, with the discrete guide of the same parameters. Jang, Gu & Poole 2017,
    https://arxiv.org/abs/1611.01144; Maddison, Mnih & Teh 2017, https://arxiv.org/abs/1611.00712.

    Args:
        temperature: of the relaxation; lower is closer to discrete, with noisier gradients.
        straight_through: hand the decoder the one-hot z, and the gradient the soft one.
    """

    formula = "q(z | x) = prod_d Categorical(p_d(x)), z_d one-hot, relaxed in training"
    support = constraints.independent(constraints.one_hot, 1)

    def __init__(
        self,
        feature_shape: Shape,
        latent_shape: Shape,
        *,
        temperature: Annotated[float, Field(gt=0)] = 0.67,
        straight_through: bool = False,
    ) -> None:
        super().__init__(feature_shape, latent_shape)
        if len(latent_shape) != 2:
            raise UserError(
                f"the relaxed-categorical posterior draws latents (latent_dim, classes), not {tuple(latent_shape)}: "
                "choose a prior of such latents, as categorical"
            )
        self.temperature, self.straight_through = temperature, straight_through
        self.head = Head(feature_shape, latent_shape)

    def forward(self, features: Tensor) -> Distribution:
        """The product, relaxed in training mode, with batch shape the leading axes of ``features``."""
        (logits,) = self.head(features)
        if self.training:
            return Relaxed(logits, self.temperature, self.straight_through).to_event(1)
        return OneHot(logits=logits, validate_args=False).to_event(1)


class Relaxed(OneHot):
    """A one-hot categorical whose draws are the Gumbel-softmax's, differentiable in the logits.

    Args:
        logits: ``(*batch_shape, K)``.
        temperature: of the draws.
        straight_through: make them one-hot, keeping the gradient.
    """

    has_rsample = True

    def __init__(self, logits: Tensor, temperature: float, straight_through: bool) -> None:
        self.temperature, self.straight_through = temperature, straight_through
        super().__init__(logits=logits, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Relaxed:
        """The same for every element of a batch."""
        logits = self.logits.expand(torch.Size(batch_shape) + self.event_shape)
        return Relaxed(logits, self.temperature, self.straight_through)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Soft draws on the simplex, ``(*sample_shape, *batch_shape, K)``."""
        soft = (self.perturbed(sample_shape) / self.temperature).softmax(-1)
        return one_hot(soft) + soft - soft.detach() if self.straight_through else soft

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """The same without a gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape)
