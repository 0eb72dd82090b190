"""p(z) = prod_d Categorical(z_d; p_d), z_d one-hot."""

from __future__ import annotations

from typing import Annotated, Any

import pyro.distributions as dist
import torch
from pydantic import Field
from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_vae.one_hot import linear_form
from pyro_vae.priors.base import Distribution, GuideDensity, Prior, Shape
from pyro_vae.registry import register


@register("priors", "categorical")
class Categorical(Prior):
    """``latent_dim`` categorical latents of ``classes`` values each, one-hot: events ``(latent_dim, classes)``.

    They start uniform. Jang, Gu & Poole 2017, https://arxiv.org/abs/1611.01144.

    Args:
        classes: values of each latent.
        learned: whether the probabilities are trained.
    """

    formula = "p(z) = prod_d Categorical(p_d), z_d one-hot"
    support = constraints.independent(constraints.one_hot, 1)

    @classmethod
    def latent_shape_of(cls, latent_dim: int, **options: Any) -> Shape:
        """``(latent_dim, classes)``."""
        return (latent_dim, options.get("classes", 10))

    def __init__(
        self, latent_shape: Shape, *, classes: Annotated[int, Field(ge=2, le=10_000)] = 10, learned: bool = True
    ) -> None:
        super().__init__(latent_shape)
        self.logits = nn.Parameter(torch.zeros(latent_shape), requires_grad=learned)

    def forward(self, like: Tensor, guide: GuideDensity | None = None) -> Distribution:
        """The product, with batch shape ``()``."""
        return OneHot(logits=self.logits, validate_args=False).to_event(1)


class OneHot(dist.OneHotCategorical):
    """The one-hot categorical, scored by sum_k z_k log p_k: what a relaxed z of a guide in training can be put into."""

    def log_prob(self, value: Tensor) -> Tensor:
        """The linear form, the log-probability where ``value`` is one-hot."""
        return linear_form(value, self.logits)

    def expand(self, batch_shape: Any, _instance: Any = None) -> OneHot:
        """The same probabilities for every element of a batch."""
        new = self._get_checked_instance(OneHot, _instance)
        return super().expand(torch.Size(batch_shape), _instance=new)
