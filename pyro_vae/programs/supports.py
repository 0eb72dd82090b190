"""Where a distribution can be, and whether one can be wherever another can.

A guide that cannot be where the model can draws no latents there, and no weight, however many are drawn, tells of it.

Elementwise supports (real, positive, intervals, booleans, integers, through ``Independent``, stacked constraints and monotone
transforms) are compared as boxes of bounds; other sets by their kind. What neither tells is seen on data that the model draws
(:mod:`pyro_vae.evaluation.proof`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import transforms

from pyro_vae.errors import UserError
from pyro_vae.programs.trace import innermost
from pyro_vae.seeding import derive_seed, seeded

TOLERANCE = 1e-5  # of bounds, relative: a sigmoid ends a rounding before 1


@dataclass(frozen=True)
class Box:
    """Numbers between two bounds, which broadcast over a distribution's batch and event axes."""

    lower: Tensor
    upper: Tensor
    discrete: bool

    def holds(self, other: Box) -> Tensor:
        """Where the other lies in it, up to rounding."""
        low = self.lower <= other.lower + _slack(other.lower)
        high = self.upper >= other.upper - _slack(other.upper)
        return low & high

    def __str__(self) -> str:
        low, high = float(self.lower.min()), float(self.upper.max())
        if math.isinf(low) and math.isinf(high):
            return "all integers" if self.discrete else "all real numbers"
        if math.isinf(high):
            return f"the {'integers' if self.discrete else 'numbers'} above {low:.4g}"
        if math.isinf(low):
            return f"the {'integers' if self.discrete else 'numbers'} below {high:.4g}"
        return f"the integers {low:.4g} to {high:.4g}" if self.discrete else f"({low:.4g}, {high:.4g})"


def require_support(name: str, fn: Any) -> Any:
    """The support of a latent's distribution; :class:`UserError` where its class states none."""
    try:
        return _of_components(fn.support)
    except NotImplementedError:
        raise UserError(
            f"the latent {name!r} has a distribution ({type(innermost(fn)).__name__}) that states no support, and this moves "
            "latents on the real line: give its class one (support = constraints.real_vector, say), or use importance weighting"
        ) from None


def _of_components(support: Any) -> Any:
    """That of a mixture's components, which are of one kind: torch has a name of its own for it, and no bijection."""
    if isinstance(support, constraints.independent):
        return constraints.independent(_of_components(support.base_constraint), support.reinterpreted_batch_ndims)
    base = getattr(support, "base_constraint", support) if "MixtureSameFamily" in type(support).__name__ else support
    return support if any(isinstance(bound, Tensor) and bound.dim() for bound in vars(base).values()) else base


def is_discrete(fn: Any) -> bool:
    """Whether a distribution draws numbers of a list; by its draws, where its class states no support."""
    try:
        return bool(fn.support.is_discrete)
    except NotImplementedError:
        with seeded(derive_seed("is a distribution discrete")):
            return not fn().is_floating_point()


def narrower(fn: Any, other: Any) -> Tensor | None:
    """Where ``fn`` leaves out some of where ``other`` can be, by batch and event; None where structure does not tell."""
    ours, theirs = support_of(fn), support_of(other)
    if ours is None or theirs is None:
        return None
    if isinstance(ours, Box) and isinstance(theirs, Box):
        return torch.ones((), dtype=torch.bool) if ours.discrete and not theirs.discrete else ~ours.holds(theirs)
    return torch.tensor(
        ours != theirs and not isinstance(ours, Box)
    )  # a simplex among vectors is a part of none of them


def describe(fn: Any) -> str:
    """The support of a distribution in words."""
    found = support_of(fn)
    return str(found) if found is not None else f"a part of {fn.support}"


def support_of(fn: Any) -> Box | str | None:
    """The box that a distribution lives in, else the name of a set without bounds (a simplex, a sphere), else None."""
    base = innermost(fn)
    try:
        return _transformed(base) if hasattr(base, "transforms") else _of_constraint(base.support)
    except (NotImplementedError, RuntimeError):
        return None


def _transformed(fn: Any) -> Box | str | None:
    found = support_of(fn.base_dist)
    for transform in fn.transforms:
        found = _image(found, transform)
    return found


def _image(found: Box | str | None, transform: Any) -> Box | str | None:
    """Where a transform takes a set; None where that is not known."""
    if isinstance(transform, transforms.ComposeTransform):
        for part in transform.parts:
            found = _image(found, part)
        return found
    if isinstance(transform, transforms.IndependentTransform):
        return _image(found, transform.base_transform)
    if not isinstance(found, Box):
        return None
    if bool(torch.isneginf(found.lower).all()) and bool(torch.isposinf(found.upper).all()) and not found.discrete:
        affine = isinstance(transform, transforms.AffineTransform)
        return found if affine else _of_constraint(transform.codomain)
    if not transform.bijective or transform.domain.event_dim > 0:
        return None
    ends = transform(found.lower), transform(found.upper)
    if any(bool(torch.isnan(end).any()) for end in ends):
        return None
    return Box(torch.minimum(*ends), torch.maximum(*ends), found.discrete)


def _of_constraint(constraint: Any) -> Box | str | None:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    if isinstance(constraint, (constraints.stack, constraints.cat)):
        return _joined(constraint)
    discrete = bool(constraint.is_discrete)
    bounds: tuple[Any, Any] | None = None
    if isinstance(constraint, type(constraints.boolean)):
        bounds = 0.0, 1.0
    elif isinstance(constraint, (type(constraints.real), type(constraints.integer))):
        bounds = -math.inf, math.inf
    elif hasattr(constraint, "lower_bound") or (hasattr(constraint, "upper_bound") and constraint.event_dim == 0):
        bounds = getattr(constraint, "lower_bound", -math.inf), getattr(constraint, "upper_bound", math.inf)
    if bounds is None:
        name = type(constraint).__name__
        return None if "Mixture" in name or "Dependent" in name else name.strip("_").lower()
    lower, upper = (torch.as_tensor(b, dtype=torch.float64).detach().cpu() for b in bounds)
    return Box(lower, upper, discrete)


def _joined(constraint: Any) -> Box | None:
    """Constraints side by side along the last axis, where all are numbers between bounds."""
    parts = [_of_constraint(part) for part in constraint.cseq]
    boxes = [part for part in parts if isinstance(part, Box) and part.lower.dim() == part.upper.dim() == 0]
    if len(boxes) < len(parts) or constraint.dim != -1:
        return None
    lengths = getattr(constraint, "lengths", [1] * len(boxes))
    lower, upper = (
        torch.stack([getattr(box, end) for box, n in zip(boxes, lengths, strict=True) for _ in range(n)])
        for end in ("lower", "upper")
    )
    return Box(lower, upper, boxes[0].discrete)


def _slack(bound: Tensor) -> Tensor:
    return TOLERANCE * (1 + torch.where(torch.isinf(bound), torch.zeros_like(bound), bound.abs()))
