"""Weights of draws from the guide, block by block, by a compiled graph where that pays."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from pyro_vae.capture import Captured, CaptureWarning, Uncapturable, capture
from pyro_vae.errors import warn
from pyro_vae.evaluation.methods import ImportanceSampling
from pyro_vae.evaluation.quasi import SobolNoise, length_of
from pyro_vae.evaluation.weights import Weighed, weigh
from pyro_vae.programs.functional import OfProgram
from pyro_vae.programs.strata import InStrata
from pyro_vae.programs.trace import Program
from pyro_vae.programs.walk import Block, spans
from pyro_vae.seeding import derive_seed, digest, seeded


class Draws:
    """Weights of draws from the guide, by one compiled graph of ``samples`` draws where that is wanted and can be.

    Attributes:
        seed: of the draws.
        strata: components of mixtures that draws are stratified by, 1 for none.
        length: draws in a row that depend on each other, of a randomisation of Sobol noise or of one of each stratum.
    """

    def __init__(
        self, program: Program, how: ImportanceSampling, samples: int, *, compiled: bool = False, strata: int = 1
    ) -> None:
        self.sobol = how.noise == "sobol"
        self.strata = 1 if self.sobol else strata
        self.length = length_of(how.num_samples) if self.sobol else self.strata
        self.samples = self.whole(samples)
        self.program, self.precision, self.wanted = program, how.precision, compiled
        self.seed, self.streams = how.seed, how.streams
        self.bound = OfProgram(program, weigh)
        self.graph: Captured | None = None
        self.leaves: list[Tensor] = []  # the program's tensors

    def __call__(
        self,
        block: Block,
        num_samples: int,
        at_once: int,
        *,
        seeds: Callable[[int], int] | None = None,
        rows: Tensor | None = None,
    ) -> list[Weighed]:
        """What :func:`weigh` returns of ``num_samples`` draws of a block, or of some of its ``rows``, in parts.

        Args:
            block: rows of data, which is entered.
            num_samples: draws of each row.
            at_once: of which in one pass.
            seeds: of a part, by its first draw.
            rows: their places in the block; None for all.
        """
        x, y, place = block.x, block.y, self.place(block)
        if rows is not None and len(rows) < len(block):
            x, y = x[rows], None if y is None else y[rows]
        found = []
        for part in spans(num_samples, self.whole(at_once)):
            first, number = part.start, part.stop - part.start
            seed = derive_seed("importance weights", self.seed, place, first) if seeds is None else seeds(first)
            even = SobolNoise(self.seed, place, first, number, self.length) if self.sobol else nullcontext()
            with seeded(seed, x.device), even, InStrata() if self.strata > 1 else nullcontext():
                found.append(self._pass(x, y, number))
        return found

    def whole(self, samples: int) -> int:
        """So many draws of one pass, as hold every stratum equally often."""
        return max(samples - samples % self.strata, self.strata)

    def place(self, block: Block) -> int:
        """What a block's noise is seeded by: where its first row stands, or what the one row that it has holds."""
        return block.first if self.streams == "place" else digest(block.x, block.y)

    def _pass(self, x: Tensor, y: Tensor | None, num_samples: int) -> Weighed:
        """One pass, compiled where it can be; a last one of another shape is not worth a graph of its own."""
        if self.wanted and self.graph is None:
            self._compile(x, y)
        if self.graph is not None and (changed := self._stale()) is not None:
            self.graph = None
            warn(f"evaluating goes on uncompiled: {changed} while the program was evaluated", CaptureWarning)
        args = [*self.leaves, x] if y is None else [*self.leaves, x, y]
        if self.graph is not None and num_samples == self.samples and self.graph.fits(args):
            with torch.no_grad():
                log_weight, log_likelihood, kl, size = self.graph.flat(args)
            return log_weight, log_likelihood, kl, size
        return weigh(self.program, x, y, num_samples, self.precision)

    def _stale(self) -> str | None:
        """What has changed since the graph was recorded (``progress`` may have changed it), as a clause; None where nothing."""
        if self.graph is None or (changed := self.graph.stale()) is not None:
            return None if self.graph is None else changed
        now = list(self.bound.tensors().values())
        same = len(now) == len(self.leaves) and all(
            a.data_ptr() == b.data_ptr() and a.shape == b.shape for a, b in zip(now, self.leaves, strict=True)
        )
        return None if same else "a parameter or buffer was replaced"

    def _compile(self, x: Tensor, y: Tensor | None) -> None:
        self.wanted = False

        def function(tensors: dict[str, Tensor], x: Tensor, y: list[Tensor]) -> Weighed:
            return self.bound.at(tensors, x, y[0] if y else None, self.samples, self.precision)

        tensors = self.bound.tensors()
        self.leaves = list(tensors.values())
        try:
            self.graph = capture(function, (tensors, x, [] if y is None else [y]), self.bound.program)
        except Uncapturable as error:
            warn(f"evaluating uncompiled: {error}", CaptureWarning)
