"""Flows: stacks of invertible layers on a vector, conditioned on features or on nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions import Transform

from pyro_vae.networks.bijections import Bijection
from pyro_vae.networks.masked import MaskedNet


class Flow(nn.Module):
    """y = T_L(... T_1(x)), each T_l a bijection of every coordinate with parameters that the ones before it give.

    Each layer turns the order of the coordinates round.

    Args:
        dim: D, the length of the vectors.
        bijection: the map of one coordinate.
        kind: ``"autoregressive"`` (inverting takes D passes) or ``"coupling"`` (two, whatever D).
        layers: the number L of layers.
        hidden: widths of the hidden layers of each conditioner.
        context_dim: entries of the context; 0 for none.
    """

    def __init__(
        self,
        dim: int,
        bijection: Bijection,
        kind: Literal["autoregressive", "coupling"],
        layers: int,
        hidden: Sequence[int],
        context_dim: int = 0,
    ) -> None:
        super().__init__()
        self.bijection = bijection
        self.nets = nn.ModuleList()
        for layer in range(layers):
            degrees = list(range(dim)) if kind == "autoregressive" else [2 * i // dim for i in range(dim)]
            if layer % 4 >= 2 and kind == "coupling":
                degrees = [i % 2 for i in range(dim)]
            degrees = degrees[::-1] if layer % 2 else degrees
            degrees = [d - min(degrees) for d in degrees]
            self.nets.append(MaskedNet(degrees, bijection.num_params, hidden, context_dim))

    def transforms(self, context: Tensor | None = None) -> list[Transform]:
        """The layers for a context ``(*leading, context_dim)``, made anew: each remembers what it last mapped."""
        return [Layer(net, self.bijection, net.project(context)) for net in self.nets]  # type: ignore[operator, arg-type]


class Layer(Transform):
    """y_i = g(x_i; theta_i(x_<i)): one pass forward, ``net.passes`` passes back.

    Beside Pyro's ``ConditionalAffineAutoregressive`` it inverts in float64, without a loop over indices held on the
    device, and with the features' share of the conditioner computed once.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, net: MaskedNet, bijection: Bijection, projected: Tensor | float) -> None:
        super().__init__(cache_size=1)
        self.net, self.bijection, self.projected = net, bijection, projected
        self._log_det: Tensor | None = None

    def _call(self, x: Tensor) -> Tensor:
        y, log_slope = self.bijection.forward(x, self.net(x, self.projected))
        self._log_det = log_slope.sum(-1)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        x = y.new_zeros(y.shape[-1:])  # without the leading axes of y: the first pass depends on the context alone
        for degree in range(self.net.passes):
            # only what is final enters the next pass: a wild guess for the rest could overflow
            solved, log_slope = self.bijection.inverse(y, self.net(x, self.projected))
            x = solved if degree == self.net.passes - 1 else torch.where(self.net.degrees <= degree, solved, 0.0)
        self._log_det = log_slope.sum(-1)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log|det dy/dx| ``(*leading,)``; free for the pair that was mapped last."""
        cached_x, cached_y = self._cached_x_y
        if self._log_det is not None and x is cached_x and y is cached_y:
            return self._log_det
        return self.bijection.forward(x, self.net(x, self.projected))[1].sum(-1)
