"""What a program is made of: its sites with their shapes, and its parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_vae.programs import latents
from pyro_vae.programs.door import admitted, door
from pyro_vae.programs.trace import Program, innermost, is_random

ROWS = 3  # of the data that the sites are looked at with; the check draws two samples, so the axes can be told apart


@dataclass(frozen=True)
class Site:
    """A ``pyro.sample`` statement.

    Attributes:
        part: ``model`` or ``guide``.
        name: of the site.
        distribution: the class of its distribution, without the wrappers that only arrange axes.
        batch_shape: its axes by name: ``num_samples``, ``batch``, or 1 where it does not vary along one.
        event_shape: the axes of one value.
        role: ``observed``, ``latent`` or ``auxiliary``.
    """

    part: str
    name: str
    distribution: str
    batch_shape: tuple[str, ...]
    event_shape: tuple[int, ...]
    role: str


@dataclass(frozen=True)
class Parameter:
    """A parameter of the module: its name, shape, number of elements, and whether it is trained."""

    name: str
    shape: tuple[int, ...]
    count: int
    trained: bool


def sites(program: Program, y: Tensor | None = None) -> list[Site]:
    """The sites of the model and of the guide, in the order of execution, the library's plate of samples around them.

    Args:
        program: any Program that says its ``event_shape``; it is held to the contract of a Program.
        y: what a conditional program is conditioned on, three rows.
    """
    return _sites(program, latents.sample(program, ROWS, y), y)


@door(scored=False)
def _sites(program: Program, x: Tensor, y: Tensor | None) -> list[Site]:
    """The sites, with data that the model makes."""
    traces, found = admitted(), []
    for part, traced in (("model", traces.model), ("guide", traces.guide)):
        for name, site in traced.nodes.items():
            if is_random(site):
                role = "auxiliary" if site["infer"].get("is_auxiliary") else "latent"
                found.append(_site(part, name, site["fn"], "observed" if site["is_observed"] else role))
    return found


def parameters(program: Any) -> list[Parameter]:
    """The parameters of a module, in its own order."""
    return [Parameter(n, tuple(p.shape), p.numel(), p.requires_grad) for n, p in program.named_parameters()]


def _site(part: str, name: str, fn: Any, role: str) -> Site:
    axes = ("num_samples", "batch")[-len(fn.batch_shape) :] if fn.batch_shape else ()
    batch = tuple(axis if size > 1 else "1" for axis, size in zip(axes, fn.batch_shape, strict=True))
    return Site(part, name, distribution_name(fn), batch, tuple(fn.event_shape), role)


def distribution_name(fn: Any) -> str:
    """The class of a distribution, without the wrappers that only arrange axes.

    >>> import pyro.distributions as dist
    >>> distribution_name(dist.Normal(0.0, 1.0).expand([3, 2]).to_event(1))
    'Normal'
    """
    return type(innermost(fn)).__name__


def total(found: list[Parameter]) -> int:
    """How many numbers are trained."""
    return sum(p.count for p in found if p.trained)
