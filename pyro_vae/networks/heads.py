"""The linear map from features to the parameters of a distribution."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyro_vae.networks.base import Shape, linear


class Head(nn.Module):
    """Features ``(*leading, *feature_shape)`` to ``num_params`` tensors ``(*leading, *event_shape)``.

    A dense layer on a vector of features; on a map of features ``(F, H, W)`` over an event ``(C, H, W)`` of the
    same height and width, a 3x3 convolution. Weights are Glorot-uniform, biases zero; :meth:`set_bias` starts one
    of the parameters at a constant per event element (the logit of the training mean, say).
    """

    def __init__(self, feature_shape: Shape, event_shape: Shape, num_params: int = 1) -> None:
        super().__init__()
        self.feature_shape, self.event_shape = tuple(feature_shape), tuple(event_shape)
        self.num_params = num_params
        self.convolutional = (
            len(feature_shape) == 3 and len(event_shape) == 3 and feature_shape[1:] == self.event_shape[1:]
        )
        if self.convolutional:
            self.map: nn.Linear | nn.Conv2d = nn.Conv2d(feature_shape[0], num_params * event_shape[0], 3, padding=1)
            nn.init.xavier_uniform_(self.map.weight)
            nn.init.zeros_(self.map.bias)  # type: ignore[arg-type]
        else:
            self.map = linear(math.prod(feature_shape), num_params * math.prod(event_shape))

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """``num_params`` tensors ``(*leading, *event_shape)``."""
        leading = features.shape[: features.dim() - len(self.feature_shape)]
        if self.convolutional:
            y = self.map(features.reshape(-1, *self.feature_shape))
        else:
            y = self.map(features.reshape(*leading, -1))
        y = y.to(self.map.weight.dtype)  # parameters of densities keep their digits where products are in bfloat16
        return tuple(
            p.reshape(*leading, *self.event_shape) for p in y.chunk(self.num_params, 1 if self.convolutional else -1)
        )

    @torch.no_grad()
    def set_bias(self, value: Tensor | float, param: int = 0) -> None:
        """Start parameter number ``param`` at ``value`` ``(*event_shape)`` (averaged per channel in a convolution)."""
        value = torch.as_tensor(value, dtype=self.map.weight.dtype).expand(self.event_shape)
        value = value.mean((1, 2)) if self.convolutional else value.reshape(-1)
        self.map.bias.view(self.num_params, -1)[param].copy_(value)  # type: ignore[union-attr]

    @torch.no_grad()
    def scale_weight(self, factor: float) -> None:
        """Shrink the map towards its bias, for a start that hardly depends on the features."""
        self.map.weight.mul_(factor)


def positive(raw: Tensor, floor: float = 1e-6) -> Tensor:
    """softplus(raw) + floor: a scale or rate that can neither reach zero nor overflow as exp(raw) does."""
    return nn.functional.softplus(raw) + floor


def positive_inverse(value: float, floor: float = 1e-6) -> float:
    """The ``raw`` for which :func:`positive` is ``value``, without cancellation for small and large values."""
    value = value - floor
    return value + math.log(-math.expm1(-value))
