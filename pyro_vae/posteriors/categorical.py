"""q(z | x) = prod_d Categorical(z_d; p_d(x)), z_d one-hot, with the score-function gradient."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_vae.errors import UserError
from pyro_vae.networks.heads import Head
from pyro_vae.one_hot import linear_form
from pyro_vae.posteriors.base import Distribution, Posterior, Shape
from pyro_vae.registry import register


@register("posteriors", "categorical")
class Categorical(Posterior):
    """One-hot latents, not reparameterized: the gradient is E[(log p(x, z) - log q(z | x)) grad log q(z | x)].

    Unbiased, and of high variance: Mnih & Gregor 2014, NVIL, https://arxiv.org/abs/1402.0030.
    """

    formula = "q(z | x) = prod_d Categorical(p_d(x)), z_d one-hot"
    support = constraints.independent(constraints.one_hot, 1)
    reparameterized = False

    def __init__(self, feature_shape: Shape, latent_shape: Shape) -> None:
        super().__init__(feature_shape, latent_shape)
        if len(latent_shape) != 2:
            raise UserError(
                f"the categorical posterior draws latents (latent_dim, classes), not {tuple(latent_shape)}: "
                "choose a prior of such latents, as categorical"
            )
        self.head = Head(feature_shape, latent_shape)

    def forward(self, features: Tensor) -> Distribution:
        """The product, with batch shape the leading axes of ``features``."""
        (logits,) = self.head(features)
        return OneHot(logits=logits, validate_args=False).to_event(1)


class OneHot(dist.OneHotCategorical):
    """The one-hot categorical, drawn by the Gumbel trick and scored by sum_k z_k log p_k.

    torch's own scores by the largest entry, which has no gradient, and draws through checks on the host.
    """

    def expand(self, batch_shape: Any, _instance: Any = None) -> OneHot:
        """The same probabilities for every element of a batch."""
        new = self._get_checked_instance(OneHot, _instance)
        return super().expand(torch.Size(batch_shape), _instance=new)

    def perturbed(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Log-probabilities plus Gumbel noise, ``(*sample_shape, *batch_shape, K)``: their largest entry is a draw."""
        u = torch.rand(self._extended_shape(sample_shape), dtype=self.logits.dtype, device=self.logits.device)
        eps = torch.finfo(u.dtype).eps
        return self.logits - (-u.clamp(eps, 1 - eps).log()).log()

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """One-hot draws."""
        with torch.no_grad():
            return one_hot(self.perturbed(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """The linear form, the log-probability where ``value`` is one-hot."""
        return linear_form(value, self.logits)


def one_hot(scores: Tensor) -> Tensor:
    """1 at the largest entry of the last axis, 0 elsewhere."""
    index = scores.argmax(-1, keepdim=True)
    return (index == torch.arange(scores.shape[-1], device=scores.device)).to(scores.dtype)
