"""Invertible maps of one number, given its parameters: what the layers of a flow apply to each coordinate."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn


class Bijection(Protocol):
    """x -> y with ``num_params`` unconstrained parameters per number; zero parameters give the identity."""

    num_params: int

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """y and log|dy/dx|, both ``(*leading,)``, of ``x`` ``(*leading,)`` and ``params`` ``(*leading, num_params)``."""

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """x and log|dy/dx| at x."""


class Affine:
    """y = exp(s) x + t with s = limit * tanh(raw / limit), so that no layer can overflow on its own.

    Args:
        limit: the bound of the log-scale.
    """

    num_params = 2

    def __init__(self, limit: float = 3.0) -> None:
        self.limit = limit

    def _parts(self, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = params.unbind(-1)
        return shift, self.limit * (raw / self.limit).tanh()

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Y and the log-scale."""
        shift, log_scale = self._parts(params)
        return log_scale.exp() * x + shift, log_scale

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """X and the log-scale."""
        shift, log_scale = self._parts(params)
        return (-log_scale).exp() * (y - shift), log_scale


class Spline:
    """A monotone rational-quadratic spline on [-bound, bound], the identity outside.

    Durkan et al. 2019, Neural Spline Flows, https://arxiv.org/abs/1906.04032, equations 4 to 8. Written here because
    Pyro's splines index with boolean masks and assert on values, which makes the host wait for the device.

    Args:
        bins: the number of bins.
        bound: half the width of the box.
    """

    MIN_BIN = 1e-3  # the least share of the box that a bin can have, in width and height
    MIN_SLOPE = 1e-3

    def __init__(self, bins: int = 8, bound: float = 5.0) -> None:
        self.bins, self.bound, self.num_params = bins, bound, 3 * bins - 1

    def _knots(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Left ends and lengths of the bins."""
        share = self.MIN_BIN + (1 - self.MIN_BIN * self.bins) * raw.softmax(-1)
        right = 2 * self.bound * share.cumsum(-1) - self.bound
        left = nn.functional.pad(right[..., :-1], (1, 0), value=-self.bound)
        return left, nn.functional.pad(right[..., :-1], (0, 1), value=self.bound) - left

    def _bin(self, value: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, ...]:
        """Left end, width, bottom, height and both slopes of the bin that holds ``value``."""
        widths, heights, slopes = params.split([self.bins, self.bins, self.bins - 1], -1)
        (left, width), (bottom, height) = self._knots(widths), self._knots(heights)
        one = math.log(math.expm1(1 - self.MIN_SLOPE))  # a raw slope of 0 is a slope of 1
        slope = nn.functional.pad(self.MIN_SLOPE + nn.functional.softplus(slopes + one), (1, 1), value=1.0)
        ends = bottom if inverse else left
        index = (value.unsqueeze(-1) >= ends[..., 1:]).sum(-1, keepdim=True)
        pick = lambda t: t.expand(*index.shape[:-1], -1).gather(-1, index).squeeze(-1)  # noqa: E731
        return pick(left), pick(width), pick(bottom), pick(height), pick(slope), pick(slope[..., 1:])

    def _log_slope(self, t: Tensor, s: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """log dy/dx at the fraction t of a bin of mean slope s."""
        between = t * (1 - t)
        top = high * t.square() + 2 * s * between + low * (1 - t).square()
        return 2 * s.log() + top.log() - 2 * (s + (high + low - 2 * s) * between).log()

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Y and log dy/dx."""
        inside = x.abs() < self.bound
        left, width, bottom, height, low, high = self._bin(x.clamp(-self.bound, self.bound), params, inverse=False)
        t, s = ((x.clamp(-self.bound, self.bound) - left) / width).clamp(0, 1), height / width
        between = t * (1 - t)
        y = bottom + height * (s * t.square() + low * between) / (s + (high + low - 2 * s) * between)
        return torch.where(inside, y, x), torch.where(inside, self._log_slope(t, s, low, high), 0.0)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """X and log dy/dx."""
        inside = y.abs() < self.bound
        clamped = y.clamp(-self.bound, self.bound)
        left, width, bottom, height, low, high = self._bin(clamped, params, inverse=True)
        s, rise = height / width, clamped - bottom
        bend = rise * (high + low - 2 * s)
        a, b, c = bend + height * (s - low), height * low - bend, -s * rise
        root = (b.square() - 4 * a * c).clamp(min=torch.finfo(y.dtype).tiny).sqrt()
        t = (2 * c / (-b - root)).clamp(0, 1)
        return torch.where(inside, left + t * width, y), torch.where(inside, self._log_slope(t, s, low, high), 0.0)
