"""The posterior density of a block of images as a sampler sees it, and the draws that a sampler leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.evaluation.graph import captured
from pyro_vae.evaluation.unconstrained import Unconstrained


class Target:
    """log p(x, u) and its gradient at u = scale * v; call it with v ``(chains, batch, D)``, gradients off.

    Args:
        density: the program's log-densities on the block.
        num_chains: chains per image.
        scale: the units of v, ``(batch, D)``, about the posterior's standard deviations.
    """

    def __init__(self, density: Unconstrained, num_chains: int, scale: Tensor) -> None:
        self.density, self.num_chains, self.scale = density, num_chains, scale
        self.gradients = [0]  # of single chains, shared with all that is made of this target
        example = scale.expand(num_chains, *scale.shape).contiguous()
        # The encoder and whatever else depends on x alone is then evaluated once, and Pyro not at all.
        self._function = captured(lambda u: self._evaluate(u), (example,), (-0.5 * example,))

    def __call__(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """The log-density ``(chains, batch)``, and its gradient in v ``(chains, batch, D)``."""
        self.gradients[0] += v.shape[0] * v.shape[1]
        density, gradient = self._function(v * self.scale)
        return density, gradient * self.scale

    def in_units_of(self, scale: Tensor) -> Target:
        """The same density in other units."""
        other = object.__new__(Target)
        other.__dict__ = {**self.__dict__, "scale": scale}
        return other

    def of(self, keep: Tensor) -> Target:
        """The same for some of the images, by their numbers."""
        other = Target(self.density.of(keep), self.num_chains, self.scale[keep])
        other.gradients = self.gradients
        return other

    def _evaluate(self, u: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            u = u.detach().requires_grad_(True)
            density = self.density.densities(u).log_joint
            ones = torch.ones(u.shape[:2], dtype=u.dtype, device=u.device)
            (gradient,) = torch.autograd.grad(density, u, ones)
        return density.detach(), gradient


@dataclass
class Record:
    """Draws ``(num_draws + 1, chains, batch, D)`` and their statistics ``(num_draws + 1, chains, batch)``.

    What is written at row ``num_draws`` is written nowhere: chains that have nothing to record write there, and
    nothing is read to the host.
    """

    draws: Tensor
    statistics: dict[str, Tensor]

    @classmethod
    def empty(cls, num_draws: int, like: Tensor) -> Record:
        """A record of no draws, for chains like ``like`` ``(chains, batch, D)``."""
        shape = (num_draws + 1, *like.shape)
        names = ("lp", "acceptance_rate", "step_size", "energy", "diverging", "tree_depth", "n_steps")
        return cls(like.new_zeros(shape), {name: like.new_zeros(shape[:-1]) for name in names})

    def __len__(self) -> int:
        """The number of images."""
        return self.draws.shape[2]

    def write(self, row: Tensor, v: Tensor, density: Tensor, **statistics: Tensor) -> None:
        """File a draw of each chain in its ``row`` ``(chains, batch)``."""
        self.draws.scatter_(0, row[None, ..., None].expand(1, *v.shape), v.unsqueeze(0))
        for name, value in {"lp": density, **statistics}.items():
            kept = self.statistics[name]
            kept.scatter_(0, row.unsqueeze(0), value.to(kept.dtype).unsqueeze(0))

    def of(self, keep: Tensor) -> Record:
        """A copy for some of the images."""
        return Record(self.draws[:, :, keep], {name: value[:, :, keep] for name, value in self.statistics.items()})

    def take(self, other: Record, where: Tensor) -> None:
        """Copy the record of the images ``where`` from another."""
        if other is not self:
            self.draws[:, :, where] = other.draws
            for name, value in other.statistics.items():
                self.statistics[name][:, :, where] = value

    def last(self) -> Tensor:
        """The last draw of every chain, in the units they were written in."""
        return self.draws[-2].clone()

    def in_units_of(self, scale: Tensor) -> Record:
        """The draws times ``scale`` ``(batch, D)``, and without the row that is nowhere."""
        return Record(self.draws[:-1] * scale, {name: value[:-1] for name, value in self.statistics.items()})

    def as_dict(self) -> dict[str, Any]:
        """The statistics as arrays ``(chains, draws, batch)`` on the host, in ArviZ's types."""
        kinds: dict[str, Any] = {"diverging": torch.bool, "tree_depth": torch.int64, "n_steps": torch.int64}
        return {
            name: value.transpose(0, 1).to(kinds.get(name, value.dtype)).cpu().numpy()
            for name, value in self.statistics.items()
        }
