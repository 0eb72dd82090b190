"""Base noise that fills space evenly: randomised quasi-Monte Carlo.

The guide's normal and uniform draws come from a scrambled Sobol sequence (Owen 1998, Scrambling Sobol' and Niederreiter-Xing
points, https://doi.org/10.1006/jcom.1998.0487; for variational bounds, Buchholz, Wenzel & Mandt 2018, Quasi-Monte Carlo
variational inference, https://arxiv.org/abs/1807.01604), shifted at random for every image (Cranley & Patterson 1976,
https://doi.org/10.1137/0713071). Every draw has the law of an independent one; the draws of one randomisation depend on each
other, and the error is found from :data:`RANDOMISATIONS` of them. The gain is large for a few latents, and gone for twenty.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae.errors import UserError
from pyro_vae.seeding import derive_seed, generator

NOISES = ("random", "sobol")
RANDOMISATIONS = 16  # of the sequence, for one image
SMALLEST = 2.0**-40  # and 1 less it: uniform numbers end here, normal ones at 7.1

_ATEN = torch.ops.aten
_NORMAL = {_ATEN.normal_.default, _ATEN.normal_functional.default, _ATEN.randn.default, _ATEN.randn_like.default}
_UNIFORM = {_ATEN.uniform_.default, _ATEN.uniform.default, _ATEN.rand.default, _ATEN.rand_like.default}


def length_of(num_samples: int) -> int:
    """Points of one randomisation, of ``num_samples`` draws in all."""
    return math.ceil(num_samples / RANDOMISATIONS)


class SobolNoise(TorchDispatchMode):
    """While entered, normal and uniform draws ``(number, batch, ...)`` are an image's points from ``first`` on.

    Point i belongs to randomisation i // length. A point's coordinates go to the draws of one pass in the order in which they
    are made, so that latents drawn one after the other fill their joint space evenly. Which points a pass holds changes nothing
    about them. Draws of other kinds or shapes are left as they are.

    Args:
        seed: of the evaluation.
        image: the first image of the block, by its place among all.
        first: the first point.
        number: points of the pass.
        length: points of one randomisation.
    """

    def __init__(self, seed: int, image: int, first: int, number: int, length: int) -> None:
        super().__init__()
        self.seed, self.image, self.first, self.number, self.length = seed, image, first, number, length
        self.used = 0  # coordinates

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Random operations in place of which points are given; every other as it is."""
        kwargs = kwargs or {}
        if func not in _NORMAL | _UNIFORM:
            return func(*args, **kwargs)
        drawn: Tensor = func(*args, **kwargs)  # its shape, dtype and device, and where it is to lie
        if drawn.dim() < 2 or drawn.shape[0] != self.number:
            return drawn
        points = self._points(drawn.shape[1], math.prod(drawn.shape[2:])).reshape(drawn.shape)
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        if func in _NORMAL:
            points = torch.special.ndtri(points) * named.get("std", 1.0) + named.get("mean", 0.0)
        else:
            low, high = named.get("from", 0.0), named.get("to", 1.0)
            below_one = 1 - torch.finfo(drawn.dtype).eps  # as torch's own: the upper end is never drawn
            points = low + (high - low) * points.clamp(max=below_one)
        return drawn.copy_(points.to(drawn.dtype))

    def _points(self, batch: int, size: int) -> Tensor:
        """Numbers in (0, 1), ``(number, batch, size)``, in float64 on the CPU."""
        begin, self.used = self.used, self.used + size
        if self.used > SobolEngine.MAXDIM:
            raise UserError(
                f"Sobol noise has {SobolEngine.MAXDIM:,} dimensions, and a draw of all latents {self.used:,}"
            )
        parts = []
        at = self.first
        while at < self.first + self.number:
            nth, place = divmod(at, self.length)
            count = min(self.length - place, self.first + self.number - at)
            engine = SobolEngine(
                self.used, scramble=True, seed=derive_seed("sobol: scrambling", self.seed, self.image, nth)
            )
            net = engine.fast_forward(place).draw(count, dtype=torch.float64)[:, begin:]
            shifts = generator("sobol: shift", self.seed, self.image, nth, begin)
            shift = torch.rand(batch, size, dtype=torch.float64, generator=shifts)
            parts.append((net.unsqueeze(1) + shift) % 1)
            at += count
        return torch.cat(parts).clamp(SMALLEST, 1 - SMALLEST)
