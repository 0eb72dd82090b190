"""Dense networks: linear, multilayer perceptron, gated multilayer perceptron."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from pyro_vae.networks.base import Activation, Network, Shape, activation, linear, normalised
from pyro_vae.registry import register

Widths = Annotated[Sequence[Annotated[int, Field(ge=1, le=1_000_000)]], Field(min_length=1, max_length=64)]


class _Dense(Network):
    """Flattens the input and applies layers in turn."""

    def __init__(self, in_shape: Shape, layers: list[nn.Module], out: int) -> None:
        super().__init__(in_shape, (out,))
        self.layers = nn.Sequential(*layers)

    def features(self, x: Tensor) -> Tensor:
        """Features ``(n, out)`` of ``x`` ``(n, *in_shape)``."""
        return self.layers(x.flatten(1))


@register("encoders", "linear")
@register("decoders", "linear")
class Linear(_Dense):
    """No hidden layer: the features are the flattened input, and the head on them is the linear map.

    With a normal likelihood of shared scale, p(x | z) = N(W z + b, s^2 I): probabilistic PCA (Tipping & Bishop
    1999, https://doi.org/10.1111/1467-9868.00196).
    """

    def __init__(self, in_shape: Shape, data_shape: Shape | None = None) -> None:
        super().__init__(in_shape, [], math.prod(in_shape))


@register("encoders", "mlp")
@register("decoders", "mlp")
class MLP(_Dense):
    """h_i = activation(W_i h_(i-1) + b_i), one layer per entry of ``hidden``; ``weight_norm`` for weights g v / |v|."""

    def __init__(
        self,
        in_shape: Shape,
        data_shape: Shape | None = None,
        *,
        hidden: Widths = (500, 500),
        activation: Activation = "silu",
        weight_norm: bool = False,
    ) -> None:
        widths = [math.prod(in_shape), *hidden]
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip(widths, hidden, strict=False):
            layers += [linear(fan_in, fan_out), _activation(activation)]
        super().__init__(in_shape, layers, hidden[-1])
        normalised(self, weight_norm)


class _Gate(nn.Module):
    """(A x + a) * sigmoid(B x + b)."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.value, self.gate = linear(fan_in, fan_out), linear(fan_in, fan_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.value(x) * self.gate(x).sigmoid()


@register("encoders", "gated-mlp")
@register("decoders", "gated-mlp")
class GatedMLP(_Dense):
    """h_i = (A_i h + a_i) * sigmoid(B_i h + b_i): the gated dense layers of Tomczak & Welling 2018.

    https://arxiv.org/abs/1705.07120
    """

    def __init__(self, in_shape: Shape, data_shape: Shape | None = None, *, hidden: Widths = (300, 300)) -> None:
        widths = [math.prod(in_shape), *hidden]
        layers: list[nn.Module] = [_Gate(i, o) for i, o in zip(widths, hidden, strict=False)]
        super().__init__(in_shape, layers, hidden[-1])


_activation = activation
