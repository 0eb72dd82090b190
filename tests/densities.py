"""Numerical truth about densities: integrals on a grid, and draws held against them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.seeding import seeded

DRAWS = 20_000
Z_LIMIT = 4.5  # |z| of a comparison: a false alarm in 150,000 comparisons, and every seed is fixed


def line(points: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Midpoints u / (1 - u^2) over the whole real line, and the lengths they stand for: heavy tails are seen too."""
    u = (torch.arange(points, dtype=torch.float64) + 0.5) / points * 2 - 1
    return scale * u / (1 - u**2), scale * (1 + u**2) / (1 - u**2) ** 2 * 2 / points


def plane(points: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Points ``(points^2, 2)`` of the plane and the areas they stand for."""
    x, w = line(points, scale)
    return torch.cartesian_prod(x, x), torch.cartesian_prod(w, w).prod(-1)


def sphere(points: int) -> tuple[Tensor, Tensor]:
    """Points ``(n, 3)`` of the unit sphere and the areas they stand for: a band of cosine, turned."""
    cosine = (torch.arange(points, dtype=torch.float64) + 0.5) / points * 2 - 1
    turn = (torch.arange(2 * points, dtype=torch.float64) + 0.5) / points * math.pi
    c, t = torch.cartesian_prod(cosine, turn).unbind(-1)
    s = (1 - c**2).sqrt()
    return torch.stack([c, s * t.cos(), s * t.sin()], -1), torch.full_like(c, 2 / points * math.pi / points)


def bits(dim: int) -> Tensor:
    """Every vector of zeros and ones ``(2^dim, dim)``."""
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=dim)), dtype=torch.float64)


def one_hots(dim: int, classes: int) -> Tensor:
    """Every row of ``dim`` one-hot vectors ``(classes^dim, dim, classes)``."""
    return torch.eye(classes, dtype=torch.float64)[torch.tensor(list(itertools.product(range(classes), repeat=dim)))]


def moments(z: Tensor) -> Tensor:
    """Bounded functions of draws ``(n, ...)``, the same for every family: ``(n, 5)``."""
    a, b = z.flatten(1)[:, 0], z.flatten(1)[:, -1]
    return torch.stack([a.tanh(), b.tanh(), (a * b).tanh(), (2 * a - 1).sin(), (a.abs() < 0.7).to(a.dtype)], -1)


def discrepancy(distribution: Any, points: Tensor, weights: Tensor, seed: int = 0) -> tuple[float, float]:
    """The integral of a density of batch shape ``()``, and the largest |z| by which draws differ from it.

    Points ``(n, *event)`` with weights ``(n,)`` stand for the space; five bounded moments of the draws are compared
    with their integrals.
    """
    mass = distribution.log_prob(points).detach().exp() * weights
    with seeded(seed):
        drawn = moments(distribution.sample((DRAWS,)).detach().double())
    expected = (mass.unsqueeze(-1) * moments(points)).sum(0)
    error = drawn.std(0) / DRAWS**0.5 + 1e-9
    return float(mass.sum()), float(((drawn.mean(0) - expected) / error).abs().max())


def shaken(module: nn.Module, size: float = 0.3, seed: int = 1) -> nn.Module:
    """The module in float64 with noise on every parameter, away from the symmetries of its start."""
    with seeded(seed), torch.no_grad():
        for p in module.double().parameters():
            p.add_(size * torch.randn_like(p))
    return module


def gradients(module: nn.Module, loss: Tensor) -> list[str]:
    """The names of parameters that got no gradient, a zero one, or one that is not finite."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return [
        n
        for (n, _), g in zip(named, grads, strict=True)
        if g is None or not bool(torch.isfinite(g).all()) or not bool(g.any())
    ]
