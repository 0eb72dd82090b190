"""What every baseline is: options, passes over the data with all state in tensors, and figures at the end."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyro_vae.data import Data
from pyro_vae.errors import UserError
from pyro_vae.evaluation.evaluate import chosen_rows

Progress = Callable[[float], None]


@dataclass(frozen=True)
class How:
    """How log p(x) of a split is computed.

    Args:
        samples: importance samples per image, where there are latents.
        chains, distributions: of annealed importance sampling, of log Z or of log p(x).
        limit: a random subset of so many images by a fixed seed, the same for every system.
        split: train, validation or test.
        seed: of everything drawn.
    """

    samples: int = 1000
    chains: int | None = None
    distributions: int | None = None
    limit: int | None = None
    split: str = "test"
    seed: int = 0

    def rows(self, data: Data) -> Tensor:
        """The images that are asked for."""
        return chosen_rows(len(data.stored(self.split)), self.limit)


class Baseline(nn.Module, ABC):
    """A system that is trained by passes over the data, and whose whole state is its ``state_dict``.

    Args:
        event_shape: of one datum.
    """

    formula: ClassVar[str]
    data: str  # "binary" or "grey"; of a class, either where its options decide
    batch_size: int

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)

    @property
    @abstractmethod
    def passes(self) -> int:
        """Over the training data, all stages together."""

    @abstractmethod
    def start(self, data: Data, generator: torch.Generator) -> None:
        """Draw the weights with which training begins."""

    @abstractmethod
    def train_pass(self, number: int, data: Data, generator: torch.Generator) -> dict[str, float]:
        """Pass ``number`` (from 0) over the training data, all of its random numbers from ``generator``; what is worth noting."""

    def finish(self, data: Data, path: Path | None, seed: int, visible: bool) -> float:
        """What follows the passes, kept in ``path`` and found there again, and its minutes; by default, nothing."""
        return 0.0

    @classmethod
    def kind_of(cls, options: dict[str, Any]) -> str:
        """``binary`` or ``grey``: the data that it takes with these options."""
        return cls.data

    def require(self, data: Data) -> None:
        """:class:`UserError` for grey levels under a system for binary images, the other way round, and no rows."""
        binary = data.observed_levels == 2
        if (self.data == "binary") != binary:
            given, way = ("grey", "static or dynamic") if self.data == "binary" else ("binary", "none")
            raise UserError(
                f"{type(self).__name__} takes {self.data} images, and {data.name} is {given}: give --binarization {way}"
            )
        if not len(data.train):
            raise UserError(f"{data.name} has no training rows")

    @abstractmethod
    def figures(self, data: Data, how: How, progress: Progress) -> dict[str, Any]:
        """``nll``, ``nll_mc_se``, ``nll_data_se``, ``num_data``, ``bits_per_dim``, ``computed`` (in words), ``warnings`` ..."""

    @abstractmethod
    def sample(self, num: int, seed: int, *, mean: bool = True) -> Tensor:
        """Draws ``(num, *event_shape)``; of the last step, which draws pixels, the mean or the pixels."""

    def batches(self, data: Data, generator: torch.Generator) -> Iterator[Tensor]:
        """Shuffled minibatches ``(batch, *event_shape)``, prepared afresh."""
        order = torch.randperm(len(data.train), generator=generator)
        for rows in order.split(self.batch_size):
            yield data.prepare(data.train[rows], generator)

    def num_batches(self, data: Data) -> int:
        """Minibatches in a pass."""
        return math.ceil(len(data.train) / self.batch_size)

    def begin_with(self, other: Baseline) -> None:
        """Take over a part that was trained before; :class:`UserError` where there is none to take."""
        raise UserError(f"a {type(self).__name__} begins with no other baseline: leave --from out")


def of_images(log_p: Tensor, mc_se: float, event_shape: tuple[int, ...]) -> dict[str, Any]:
    """The figures of exact or estimated log-probabilities ``(N,)`` of binary images, whose common Monte Carlo error is ``mc_se``.

    ``nll_data_se`` is what images and draws together leave, as everywhere in the library.
    """
    nll, spread = -float(log_p.mean()), float(log_p.std()) / math.sqrt(len(log_p)) if len(log_p) > 1 else math.nan
    return {
        "nll": nll,
        "nll_mc_se": mc_se,
        "nll_data_se": math.hypot(spread, mc_se) if math.isfinite(spread) else None,
        "num_data": len(log_p),
        "bits_per_dim": nll / (math.prod(event_shape) * math.log(2)),
    }
