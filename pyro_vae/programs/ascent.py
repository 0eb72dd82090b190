"""Gradient ascent of a few numbers per datum, on the ELBO of that datum: what refinement and inference gaps have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def ascend(elbo: Callable[[], Tensor], parameters: Sequence[Tensor], steps: int, lr: float) -> None:
    """Adam (Kingma & Ba 2015, https://arxiv.org/abs/1412.6980) uphill, the rate falling to zero along a line.

    The memory of squared gradients is 100 steps, not 1,000: an ascent that starts far away starts with gradients a thousand
    times those near its end, and would creep for as long as it remembers them.

    Args:
        elbo: the sum over data of what is to grow, drawn anew at each call; each datum's parameters see only its own.
        parameters: leaf tensors ``(batch, ...)`` that require gradients; changed in place.
        steps: how many.
        lr: the rate at the start.
    """
    first, second = [torch.zeros_like(p) for p in parameters], [torch.zeros_like(p) for p in parameters]
    for t in range(1, steps + 1):
        with torch.enable_grad():
            grads = torch.autograd.grad(elbo(), list(parameters))
        rate = lr * (1 - (t - 1) / steps)
        with torch.no_grad():
            for parameter, grad, m, v in zip(parameters, grads, first, second, strict=True):
                grad = torch.nan_to_num(grad, 0.0, 0.0, 0.0)
                m.mul_(0.9).add_(0.1 * grad)
                v.mul_(0.99).add_(0.01 * grad.square())
                parameter.add_(rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8))
