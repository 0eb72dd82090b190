"""The moving average of a program's weights, which is what is evaluated and kept, with buffers that go with it.

Running statistics (BatchNorm's, say) belong to the weights that they were found with, and those are the newest. So after an
epoch the averaged weights get their own, from a few thousand of its rows in training mode (Izmailov et al. 2018, Averaging
weights leads to wider optima, https://arxiv.org/abs/1803.05407, section 3.2): BatchNorm's from nothing, other buffers that
training moves (codebooks, vectors of a spectral norm) from their own moving average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pyro_vae.programs.trace import draw_terms
from pyro_vae.seeding import derive_seed, seeded

if TYPE_CHECKING:
    from pyro_vae.training.loop import Trainer

STATISTICS_ROWS = 4096  # of an epoch, from which the averaged weights get running statistics
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def pass_over(trainer: Trainer, order: Tensor) -> None:
    """A pass over some of an epoch's rows, from which running statistics are found."""
    rows = order[:STATISTICS_ROWS].split(min(trainer.settings.batch_size, len(order)))
    with seeded(derive_seed("running statistics", trainer.settings.seed, trainer.epoch), trainer.device):
        for some in [r for r in rows if len(r) == len(rows[0])]:
            draw_terms(trainer.program, *trainer.source.batch(some), num_samples=1)


class Average:
    """The exponential moving average of parameters that are or were trained, and of floating buffers that training moves.

    Args:
        program: the module.
        moving: the names of the buffers that a pass in training mode changes.
    """

    def __init__(self, program: nn.Module, moving: Sequence[str] = ()) -> None:
        self.program = program
        ours = {id(b) for m in program.modules() if isinstance(m, NORMS) for b in m.buffers(recurse=False)}
        buffers = dict(program.named_buffers())
        self.moving = [n for n in moving if id(buffers[n]) not in ours and buffers[n].is_floating_point()]
        self.values: dict[str, Tensor] = {}  # of parameters, then of moving buffers
        self._settled: dict[str, Tensor] = {}  # the averaged weights' own buffers
        self._sources: dict[str, Tensor] = {}
        self.renew()

    def renew(self) -> None:
        """Take in parameters that are trained from now on, from what they are; let go of those that are gone."""
        sources: dict[str, Tensor] = {
            n: p for n, p in self.program.named_parameters() if p.requires_grad or n in self._sources
        }
        buffers = dict(self.program.named_buffers())
        values = {
            n: self.values[n] if self._sources.get(n) is p and n in self.values else p.detach().clone()
            for n, p in sources.items()
        }
        for name in self.moving:
            if name in buffers:
                held = self.values.get(name)
                same = held is not None and held.shape == buffers[name].shape
                values[name] = held if same and held is not None else buffers[name].detach().clone()
        self._sources, self.values = sources, values

    def follow(self, share: float) -> None:
        """Move a share of the way to the newest."""
        newest = [p.detach() for p in self._sources.values()]
        newest += [self.program.get_buffer(name) for name in self.moving if name in self.values]
        torch._foreach_lerp_(list(self.values.values()), newest, share)

    def fill(self, values: dict[str, Tensor]) -> None:
        """Take averages from elsewhere, in place; those of parameters that are frozen now are followed on."""
        named = dict(self.program.named_parameters())
        for name, value in values.items():
            if name in self.values:
                self.values[name].copy_(value)
            elif name in named:
                self._sources[name], self.values[name] = named[name], value.to(named[name].device, copy=True)
        order = [*self._sources, *self.moving]
        self.values = {name: self.values[name] for name in order if name in self.values}

    def settle(self, passes: Callable[[], None]) -> None:
        """Find the buffers of the averaged weights, by passes over data in training mode; the program stays as it is."""
        norms = [
            m for m in self.program.modules() if isinstance(m, NORMS) and m.training and m.running_mean is not None
        ]
        named = dict(self.program.named_buffers())
        own = {id(b) for m in norms for b in m.buffers(recurse=False)}
        names = [n for n, b in named.items() if id(b) in own or n in self.moving]
        self._settled = {}
        if not names:
            return
        momenta = [m.momentum for m in norms]
        with torch.no_grad(), self.swapped():
            kept = {name: buffer.clone() for name, buffer in named.items()}
            try:
                for m in norms:
                    m.reset_running_stats()
                    m.momentum = None  # every batch counts alike
                passes()
                found = {n: b.clone() for n, b in self.program.named_buffers() if n in names}
            finally:
                for m, momentum in zip(norms, momenta, strict=True):
                    m.momentum = momentum
                for name, buffer in named.items():
                    self._put(name, buffer).copy_(kept[name])
        self._settled = found

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The program with the average in the place of the newest; the newest comes back on leaving."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, p in self._sources.items():
            p.data, self.values[name].data = self.values[name].data, p.data
        for name, other in ({n: self.values[n] for n in self.moving if n in self.values} | self._settled).items():
            buffer = self.program.get_buffer(name)
            buffer.data, other.data = other.data, buffer.data

    def _put(self, name: str, buffer: Tensor) -> Tensor:
        """Put a buffer's own tensor back where a pass has put another."""
        if self.program.get_buffer(name) is not buffer:
            owner, _, leaf = name.rpartition(".")
            setattr(self.program.get_submodule(owner), leaf, buffer)
        return buffer
