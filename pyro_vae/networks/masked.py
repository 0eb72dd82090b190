"""A dense network whose outputs see only the inputs before them: the conditioner of every flow here."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pyro_vae.networks.base import linear


class MaskedNet(nn.Module):
    """Parameters theta_i(x_j : degree_j < degree_i; c) of every input i, in one pass.

    Units carry degrees: a hidden unit of degree m sees the inputs of lower degree, an output of degree d the hidden units
    of degree d or lower. Degrees 0, ..., D - 1 make an autoregressive network; degrees 0 and 1 a coupling layer, whose
    first half conditions the second. The context enters the first layer as a term of its own, so that it is computed
    once per image and broadcasts over samples.

    Germain et al. 2015, MADE, https://arxiv.org/abs/1502.03509.

    Args:
        degrees: one number from 0 to passes - 1 for each of the D inputs.
        num_params: parameters per input.
        hidden: widths of the hidden layers.
        context_dim: entries of the context; 0 for none.
    """

    degrees: Tensor

    def __init__(self, degrees: Sequence[int], num_params: int, hidden: Sequence[int], context_dim: int = 0) -> None:
        super().__init__()
        self.passes = max(degrees) + 1
        self.register_buffer("degrees", torch.tensor(list(degrees)), persistent=False)
        # without a context, hidden units of degree 0 would be constants
        low = 0 if context_dim else min(1, self.passes - 1)
        widths = [len(degrees), *hidden, len(degrees) * num_params]
        order = [self.degrees + 1]  # an input of degree d is seen by hidden units of degree d + 1 and higher
        order += [low + torch.arange(h) % (self.passes - low) for h in hidden]
        order += [self.degrees.repeat_interleave(num_params)]
        self.layers = nn.ModuleList(linear(i, o) for i, o in pairwise(widths))
        for n, (below, above) in enumerate(pairwise(order)):
            self.register_buffer(f"mask_{n}", (above[:, None] >= below).float(), persistent=False)
        self.context = nn.Linear(context_dim, hidden[0], bias=False) if context_dim else None
        with torch.no_grad():
            self.layers[-1].weight.mul_(0.1)  # type: ignore[operator]  # a flow starts near the identity

    def project(self, context: Tensor | None) -> Tensor | float:
        """What the context ``(*leading, context_dim)`` adds to the first hidden layer, ``(*leading, hidden[0])``."""
        return 0.0 if self.context is None or context is None else self.context(context)

    def forward(self, x: Tensor, projected: Tensor | float = 0.0) -> Tensor:
        """Parameters ``(*leading, D, num_params)`` of ``x`` ``(*leading, D)``."""
        h = x
        for n, layer in enumerate(self.layers):
            if n:
                h = nn.functional.silu(h)
            h = nn.functional.linear(h, layer.weight * getattr(self, f"mask_{n}"), layer.bias)  # type: ignore[arg-type]
            if n == 0:
                h = h + projected
        return h.reshape(*h.shape[:-1], len(self.degrees), -1)
