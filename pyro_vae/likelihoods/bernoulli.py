"""p(x | z) = prod_d Bernoulli(x_d; sigmoid(f_d(z)))."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_vae.likelihoods.base import Distribution, Likelihood, Shape
from pyro_vae.networks.heads import Head
from pyro_vae.precision import wide
from pyro_vae.registry import register

FACTORS = 16  # whose logarithms are taken as one, or up to 31 in a small image: each factor is at most 2
LANES = 16  # numbers that a processor takes at once; rows of products are a multiple of it


class BinaryPixels(dist.Independent):
    """Independent Bernoullis with logits l on values that are 0 or 1 and nothing between, their log-probability summed at once.

    log p(x) = sum_d log sigmoid(s_d) = sum_d min(s_d, 0) - log prod_d (1 + exp(-|s_d|)),   s = (2 x - 1) l

    Of l that all rows share (the states of a mixture) it is one product, x' l - sum_d softplus(l_d), in float64 for what cancels.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Summed over the event."""
        if self._validate_args:
            self._validate_sample(value)
        logits, x = (t.flatten(-self.reinterpreted_batch_ndims) for t in (self.base_dist.logits, value))
        if logits.dim() == 3 and x.dim() == 2 and logits.stride(1) == 0 and len(x) > 1:  # states that all rows share
            each = wide(logits[:, 0])
            shared: Tensor = each @ wide(x).T - nn.functional.softplus(each).sum(-1, keepdim=True)
            return shared.to(logits.dtype)
        total: Tensor = _SumOfLogSigmoids.apply((2 * x - 1) * logits)
        return total


class _SumOfLogSigmoids(torch.autograd.Function):
    """Over the last axis. A logarithm for many factors and not for each is as exact, and twice as fast."""

    @staticmethod
    def forward(ctx: Any, signed: Tensor) -> Tensor:
        ctx.save_for_backward(signed)
        factors = signed.abs().neg_().exp_().add_(1)
        size = signed.shape[-1]
        columns = max(1, size // (FACTORS * LANES)) * LANES
        rows = size // columns
        whole, rest = factors.split([rows * columns, size - rows * columns], -1)
        products = whole.unflatten(-1, (rows, columns)).prod(-2)
        return signed.clamp(max=0).sum(-1) - products.log_().sum(-1) - rest.log().sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (signed,) = ctx.saved_tensors
        return grad.unsqueeze(-1) * torch.sigmoid(-signed)


@register("likelihoods", "bernoulli")
class Bernoulli(Likelihood):
    """Independent pixels in {0, 1} with logits f(z); grey values are not in its support.

    Kingma & Welling 2014, https://arxiv.org/abs/1312.6114, appendix C.1. The output bias starts at the logit of the
    training mean, clipped to [0.001, 0.999], as in Burda, Grosse & Salakhutdinov 2016.
    """

    formula = "p(x | z) = prod_d Bernoulli(sigmoid f_d(z))"
    data = "binary"
    support = constraints.boolean

    def __init__(self, feature_shape: Shape, event_shape: Shape) -> None:
        super().__init__(feature_shape, event_shape)
        self.head = Head(feature_shape, event_shape)

    def forward(self, features: Tensor) -> Distribution:
        """Bernoulli on logits, event shape ``event_shape``."""
        (logits,) = self.head(features)
        pixels = dist.Bernoulli(logits=logits, validate_args=False)
        return BinaryPixels(pixels, len(self.event_shape), validate_args=False)

    def start_at(self, mean: Tensor, spread: float | None = None) -> None:
        """Output bias = logit of the mean image."""
        self.head.set_bias(mean.clamp(1e-3, 1 - 1e-3).logit())
