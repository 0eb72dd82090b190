"""Two-dimensional toys: 10,000 points each, drawn with a fixed seed.

References: the pinwheel is of Johnson et al., *Composing graphical models with neural networks for structured
representations and fast inference*, 2016 (https://arxiv.org/abs/1603.06277); the others are used as in Grathwohl et
al., *FFJORD*, 2019 (https://arxiv.org/abs/1810.01367). All lie within about [-4, 4] x [-4, 4].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from pyro_vae.data.splits import Filed

NUM_POINTS = 10_000
TOY_SEED = 20_140

Drawn = tuple[np.ndarray, np.ndarray | None]


def load(name: str) -> Filed:
    """The toy of that name: float32 ``(10000, 2)``, with labels where the points have a natural class."""
    x, labels = DRAW[name](np.random.default_rng(TOY_SEED), NUM_POINTS)
    return Filed(
        name=name,
        x=torch.from_numpy(x.astype(np.float32)),
        levels=None,
        labels=None if labels is None else torch.from_numpy(labels.astype(np.int64)),
    )


def _pinwheel(rng: np.random.Generator, n: int) -> Drawn:
    arm = rng.integers(5, size=n)
    along = 1.0 + 0.3 * rng.standard_normal(n)
    across = 0.1 * rng.standard_normal(n)
    angle = 2 * np.pi * arm / 5 + 0.25 * np.exp(along)
    x = np.stack(
        [along * np.cos(angle) - across * np.sin(angle), along * np.sin(angle) + across * np.cos(angle)], axis=1
    )
    return 2.0 * x, arm


def _moons(rng: np.random.Generator, n: int) -> Drawn:
    moon = rng.integers(2, size=n)
    angle = np.pi * rng.random(n)
    upper = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    lower = np.stack([1 - np.cos(angle), 0.5 - np.sin(angle)], axis=1)
    x = np.where(moon[:, None] == 0, upper, lower) + 0.1 * rng.standard_normal((n, 2))
    return 2.0 * x + np.array([-1.0, -0.2]), moon


def _checkerboard(rng: np.random.Generator, n: int) -> Drawn:
    column = rng.integers(4, size=n)
    row = 2 * rng.integers(2, size=n) + column % 2
    corner = np.stack([column, row], axis=1).astype(np.float64)
    return 2.0 * (corner + rng.random((n, 2)) - 2.0), None


def _circles(rng: np.random.Generator, n: int) -> Drawn:
    circle = rng.integers(2, size=n)
    angle = 2 * np.pi * rng.random(n)
    radius = np.where(circle == 0, 1.0, 0.5)[:, None]
    x = radius * np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.08 * rng.standard_normal((n, 2))
    return 3.0 * x, circle


def _eight_gaussians(rng: np.random.Generator, n: int) -> Drawn:
    which = rng.integers(8, size=n)
    angle = 2 * np.pi * which / 8
    centre = 4.0 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return (centre + 0.5 * rng.standard_normal((n, 2))) / np.sqrt(2.0), which


def _two_spirals(rng: np.random.Generator, n: int) -> Drawn:
    spiral = rng.integers(2, size=n)
    angle = np.sqrt(rng.random(n)) * 3 * np.pi
    x = np.stack([-np.cos(angle), np.sin(angle)], axis=1) * angle[:, None] + 0.5 * rng.random((n, 2))
    x = np.where(spiral[:, None] == 0, x, -x) / 3.0
    return x + 0.1 * rng.standard_normal((n, 2)), spiral


DRAW: dict[str, Callable[[np.random.Generator, int], Drawn]] = {
    "pinwheel": _pinwheel,
    "moons": _moons,
    "checkerboard": _checkerboard,
    "circles": _circles,
    "eight-gaussians": _eight_gaussians,
    "two-spirals": _two_spirals,
}
