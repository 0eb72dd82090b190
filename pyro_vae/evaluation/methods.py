"""How log p(x) is estimated: the options of each method, listed once."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_vae.errors import UserError, nearest
from pyro_vae.evaluation.path import Start
from pyro_vae.evaluation.quasi import NOISES
from pyro_vae.programs.walk import at_once
from pyro_vae.signatures import KINDS

NAMED = {kind.__name__: held for kind, held in KINDS.items()}  # as annotations of fields are written
F = TypeVar("F", bound=Callable[..., Any])

STREAMS = ("place", "content")  # what a row's random numbers depend on
SHARPNESS = 4.0  # of the sigmoidal schedule: the logits of beta run over +-4


@dataclass(frozen=True)
class ImportanceSampling:
    """Importance sampling from the guide; the options are those of :func:`~pyro_vae.evaluation.importance.log_likelihood`.

    Example:
        >>> ImportanceSampling(num_samples=500, noise="sobol").target_se is None
        True
    """

    num_samples: int = 5000
    target_se: float | None = None
    seed: int = 0
    chunk_size: int | None = None
    compile: str = "auto"
    precision: str = "full"
    noise: str = "random"
    streams: str = "place"

    def __post_init__(self) -> None:
        _hold(self, "num_samples", "chunk_size")
        if self.target_se is not None and not self.target_se > 0:
            raise UserError(f"expected a target error (target_se, --target-error) above 0, got {self.target_se}")
        if self.noise not in NOISES:
            raise UserError(f"unknown noise {self.noise!r}: {nearest(self.noise, NOISES)}")
        if self.streams not in STREAMS:
            raise UserError(f"unknown streams {self.streams!r}: {nearest(self.streams, STREAMS)}")
        if self.noise == "sobol" and self.target_se is not None:
            raise UserError(
                "target_se needs random noise: the error of Sobol noise is known when all randomisations are drawn"
            )
        if self.compile not in ("auto", "on", "off"):
            raise UserError(f"expected compile to be auto, on or off, got {self.compile!r}")


@dataclass(frozen=True)
class Annealing:
    """Annealed importance sampling, by chains from the prior (or the guide) to the posterior.

    Args:
        num_chains: independent chains per image; 8 or more for an error that can be relied on.
        num_distributions: intermediate distributions between the two ends, each with one HMC trajectory.
        num_leapfrog: leapfrog steps per trajectory.
        start: anneal from the ``"prior"``, or from the ``"guide"``: shorter where the guide is good, and blind where it is too
            narrow.
        seed: of everything drawn; torch's generators are put back.
        target_accept: the acceptance that the preliminary run adapts the step sizes to.
        schedule: ``"sigmoidal"`` (dense at both ends; Grosse et al. 2015) or ``"linear"`` in the inverse temperature.
        chunk_size: images times chains in one batch, recorded in the result; by default so many that the observed site holds
            about half a million elements (64 million on a GPU).
    """

    num_chains: int = 16
    num_distributions: int = 1000
    num_leapfrog: int = 10
    start: Start = "prior"
    seed: int = 0
    target_accept: float = 0.65
    schedule: str = "sigmoidal"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        _hold(self, "num_chains", "num_distributions", "num_leapfrog", "chunk_size")
        if not 0 < self.target_accept < 1:
            raise UserError(f"expected target_accept between 0 and 1, got {self.target_accept}")
        if self.start not in ("prior", "guide"):
            raise UserError(f"expected start to be 'prior' or 'guide', got {self.start!r}")
        if self.schedule not in ("sigmoidal", "linear"):
            raise UserError(f"expected schedule to be 'sigmoidal' or 'linear', got {self.schedule!r}")

    @property
    def num_preliminary(self) -> int:
        """Temperatures of the preliminary run: a tenth of the run's, at least 50."""
        return max(50, self.num_distributions // 10)

    def betas(self, positions: Tensor) -> Tensor:
        """Inverse temperatures at positions in [0, 1], in float64."""
        if self.schedule == "linear":
            return positions.double()
        ends = math.tanh(SHARPNESS / 2)
        return 0.5 * (1 + torch.tanh(SHARPNESS / 2 * (2 * positions.double() - 1)) / ends)


def rows_of_chains(x: Tensor, device: torch.device, num_chains: int, chunk_size: int | None = None) -> int:
    """How many images are moved in one batch, of ``num_chains`` chains each."""
    if chunk_size is None:
        chunk_size = at_once("chains: cpu" if device.type == "cpu" else "chains", math.prod(x.shape[1:]), 64)
    return max(1, chunk_size // num_chains)


def taking(options: type) -> Callable[[F], F]:
    """Let a function that ends in ``**options`` show the fields of a dataclass as keywords of its own, with their defaults.

    >>> @taking(ImportanceSampling)
    ... def f(x: Tensor, **options: object) -> None: ...
    >>> list(inspect.signature(f).parameters)[:3]
    ['x', 'num_samples', 'target_se']
    """

    def shown(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        keyword = inspect.Parameter.KEYWORD_ONLY
        taken = [inspect.Parameter(f.name, keyword, default=f.default, annotation=f.type) for f in fields(options)]
        named = {p.name for p in own}
        ordered = sorted([*own, *(p for p in taken if p.name not in named)], key=lambda p: p.kind)
        function.__signature__ = signature.replace(parameters=ordered)  # type: ignore[attr-defined]
        return function

    return shown


def _hold(options: Any, *positive: str) -> None:
    """:class:`UserError` for an option that is not of its kind, or not positive; numbers of NumPy and torch become plain ones."""
    for field in fields(options):
        value, (kind, _, rest) = getattr(options, field.name), str(field.type).partition(" | ")
        if kind in NAMED and not (value is None and rest):
            value = NAMED[kind](f"{type(options).__name__}: expected {field.name}", value)
            object.__setattr__(options, field.name, value)
        if field.name in positive and value is not None and value < 1:
            raise UserError(f"expected {field.name} of at least 1, got {value}")
