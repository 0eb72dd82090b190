"""What every encoder and decoder is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

Shape = tuple[int, ...]
Activation = Literal["relu", "silu", "gelu", "tanh", "elu", "softplus", "leaky-relu"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "leaky-relu": nn.LeakyReLU,
}


def activation(name: Activation) -> nn.Module:
    """The elementwise nonlinearity called ``name``."""
    return _ACTIVATIONS[name]()


def linear(fan_in: int, fan_out: int) -> nn.Linear:
    """A dense layer with Glorot-uniform weights and zero bias (Glorot & Bengio 2010)."""
    layer = nn.Linear(fan_in, fan_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


@torch.no_grad()
def begin_alike(modules: Sequence[nn.Module], apart: float = 0.05) -> None:
    """Draw modules of one architecture towards the first of them, to ``apart`` of the way that chance had put between them.

    Guides of one mixture that begin apart have codes of their own, and the decoder learns each of them: on MNIST, after five
    epochs, four lost a nat of the ELBO to one by it; begun alike they gained 0.2, and they part where posteriors want it.
    """
    first, *others = modules
    for other in others:
        for ours, its in zip(first.parameters(), other.parameters(), strict=True):
            its.lerp_(ours, 1 - apart)


def normalised(network: nn.Module, weights: bool = True) -> None:
    """Write every weight of a network as g v / |v|, a length for each output and a direction; its values stay as they are.

    Salimans & Kingma 2016, Weight normalization, https://arxiv.org/abs/1602.07868. Nothing depends on other rows, as in batch
    normalisation, or moves without a gradient, as in spectral normalisation.
    """
    for module in [m for m in network.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))]:
        if weights:
            weight_norm(module, dim=1 if isinstance(module, nn.ConvTranspose2d) else 0)


def beside(*values: Tensor) -> Tensor:
    """Vectors ``(*leading, n_i)`` side by side, ``(*leading, sum n_i)``: leading axes broadcast."""
    leading = torch.broadcast_shapes(*(v.shape[:-1] for v in values))
    return torch.cat([v.expand(*leading, v.shape[-1]) for v in values], -1)


class Network(nn.Module, ABC):
    """A map of ``(*leading, *in_shape)`` to ``(*leading, *out_shape)``, for any leading axes.

    A subclass writes :meth:`features` for one leading axis; constructors take ``in_shape`` (and, a decoder,
    ``data_shape``: the event it is to describe) by position and a user's options by keyword.
    """

    in_shape: Shape
    out_shape: Shape

    def __init__(self, in_shape: Shape, out_shape: Shape) -> None:
        super().__init__()
        self.in_shape, self.out_shape = tuple(in_shape), tuple(out_shape)

    def forward(self, x: Tensor) -> Tensor:
        """Features ``(*leading, *out_shape)`` of ``x`` ``(*leading, *in_shape)``."""
        leading = x.shape[: x.dim() - len(self.in_shape)]
        y = self.features(x.reshape(math.prod(leading), *self.in_shape))
        return y.reshape(*leading, *self.out_shape)

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """Features ``(n, *out_shape)`` of ``x`` ``(n, *in_shape)``."""

    def extra_repr(self) -> str:
        """Shapes, for ``repr``."""
        return f"in_shape={self.in_shape}, out_shape={self.out_shape}"
