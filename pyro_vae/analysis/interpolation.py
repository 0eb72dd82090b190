r"""The ways between two points of a latent space.

    straight  z_t = (1 - t) z_a + t z_b
    slerp     z_t = [sin((1 - t) w) z_a + sin(t w) z_b] / sin w,   cos w = z_a . z_b / (|z_a| |z_b|)

Draws of N(0, I) in many dimensions lie near the sphere of radius sqrt(D), and the straight way between two of them cuts
through its empty inside; the great circle stays near it. Shoemake 1985, Animating rotation with quaternion curves,
https://doi.org/10.1145/325165.325242; for latent spaces White 2016, https://arxiv.org/abs/1609.04468.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_vae.errors import UserError, nearest

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def straight(start: Tensor, end: Tensor, t: Tensor) -> Tensor:
    """(1 - t) start + t end, ``(n, steps, *latent)`` for ends ``(n, *latent)`` and t ``(steps,)``."""
    t = t.to(start).reshape(1, -1, *(1 for _ in start.shape[1:]))
    return (1 - t) * start[:, None] + t * end[:, None]


def slerp(start: Tensor, end: Tensor, t: Tensor) -> Tensor:
    """Along the great circle from start to end, ``(n, steps, *latent)``; straight where the ends are (nearly) parallel.

    Example:
        >>> way = slerp(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([0.5]))
        >>> round(float(way.norm()), 4)
        1.0
    """
    a, b = start.flatten(1), end.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1).clamp(-1, 1)
    angle = cosine.acos()[:, None]
    sine = angle.sin()
    t = t.to(start)[None]
    weights = [((1 - t) * angle).sin() / sine, (t * angle).sin() / sine]
    shape = (len(a), t.shape[1], *(1 for _ in start.shape[1:]))
    curved = weights[0].reshape(shape) * start[:, None] + weights[1].reshape(shape) * end[:, None]
    nearly = (
        4 * torch.finfo(sine.dtype).eps ** 0.5
    )  # an angle that rounding of the cosine makes of none; no way differs by it
    parallel = (sine < nearly).reshape(len(a), 1, *(1 for _ in start.shape[1:]))
    return torch.where(parallel, straight(start, end, t[0]), curved)


PATHS: dict[str, tuple[Way, str]] = {"straight": (straight, "straight"), "slerp": (slerp, "along great circles")}


def find_path(name: str) -> tuple[Way, str]:
    """A way by its name, and how a title says it."""
    if name not in PATHS:
        raise UserError(f"unknown path {name!r}: {nearest(name, PATHS)}")
    return PATHS[name]
