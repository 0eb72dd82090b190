"""The No-U-Turn sampler on every chain of every image at once, without any chain waiting for another.

    u = s * v,   H(v, r) = -log p(x, u) + |r|^2 / 2

A trajectory doubles, forwards or backwards at random, until it turns back on itself or its energy error explodes; the
next draw is chosen among its points by their weights exp(H(start) - H), later halves being preferred. One *tick* is
one leapfrog step of every chain: a chain whose trajectory is complete records its draw and begins the next in the
following tick, so that the batched gradient is never spent on chains that wait for the longest tree.

Hoffman & Gelman 2014, https://arxiv.org/abs/1111.4246; multinomial and with the generalised criterion, Betancourt 2017,
https://arxiv.org/abs/1701.02434; iterative, Phan, Pradhan & Jankowiak 2019, https://arxiv.org/abs/1912.11554, and Lao
& Dillon 2020, https://arxiv.org/abs/2002.01184.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pyro_vae.analysis.target import Record, Target

MAX_ENERGY_ERROR = 1000.0  # nats; beyond, a trajectory is called divergent, as in Stan
CHECK_EVERY = 32  # ticks between two looks at which chains are done
SMALLEST_PART = 0.6  # of the images that are still under way: below, the finished ones are left out of the batch

Adapt = Callable[[Tensor, Tensor], Tensor]
Report = Callable[[float], None]


@dataclass
class _Lanes:
    """Where every chain of every image stands: ``(chains, batch)`` per chain, with D behind it for vectors.

    ``start`` is the last draw, ``proposal`` the next one as it stands, ``inner`` the proposal of the half under way:
    each holds v and the gradient, ``(2, chains, batch, D)``. ``ends`` are the two ends of the trajectory, ``(2, 3,
    chains, batch, D)``, each v, r and the gradient; ``point`` is where the half under way has come to. ``turns``
    keeps (r, sum of r) where a subtree began, ``(slots, 2, chains, batch, D)``.
    """

    start: Tensor
    start_density: Tensor
    proposal: Tensor
    proposal_density: Tensor
    proposal_energy: Tensor
    inner: Tensor
    inner_density: Tensor
    inner_energy: Tensor
    ends: Tensor
    point: Tensor
    turns: Tensor
    sum: Tensor
    inner_sum: Tensor
    log_weight: Tensor
    inner_log_weight: Tensor
    energy: Tensor
    step: Tensor
    forward: Tensor
    depth: Tensor
    leaf: Tensor
    count: Tensor
    accepted: Tensor
    steps: Tensor

    def of(self, keep: Tensor) -> _Lanes:
        """The same for some of the images."""
        flat: tuple[str, ...] = (
            "start_density",
            "count",
            "step",
            "forward",
            "depth",
            "leaf",
            "accepted",
            "steps",
            "energy",
        )
        flat += tuple(f.name for f in fields(self) if f.name.endswith(("_density", "_energy", "log_weight")))
        return _Lanes(
            **{f.name: getattr(self, f.name).index_select(-1 if f.name in flat else -2, keep) for f in fields(self)}
        )


class NUTS:
    """Chains ``(chains, batch, D)`` that move by NUTS.

    Args:
        target: the density, in the units of v.
        position: where the chains start, ``(chains, batch, D)``, in units of v.
        max_depth: doublings of a trajectory at most; it then has 2^max_depth - 1 steps.
        generator: of all random numbers, on the device.
    """

    def __init__(self, target: Target, position: Tensor, max_depth: int, generator: torch.Generator) -> None:
        self.target, self.position, self.max_depth, self.generator = target, position, max_depth, generator
        leaves = torch.arange(2 ** max(0, max_depth - 1), device=position.device)
        bits = (leaves.unsqueeze(-1) >> torch.arange(max(1, max_depth), device=position.device)) & 1
        last = bits[:, 1:].sum(-1)
        # A leaf completes as many subtrees as its number ends in ones; they began at the leaves in the slots first to last.
        self._last, self._first = last, last - bits.cumprod(-1).sum(-1) + 1
        self._slots = max(1, max_depth - 1)

    def run(self, num_draws: int, step: Tensor, adapt: Adapt | None = None, report: Report | None = None) -> Record:
        """``num_draws`` draws of every chain.

        Args:
            num_draws: per chain.
            step: the leapfrog step per image ``(batch,)``, in units of v.
            adapt: called with (mean acceptance of the trajectories that ended, which chains those are), ``(chains,
                batch)`` each, for the step sizes ``(batch,)`` of the trajectories that begin; None keeps them.
            report: called with the share of all draws that was made since the last call.

        Returns:
            The draws, in units of u, with their statistics.
        """
        target, chains = self.target, self.position.shape[0]
        total = Record.empty(num_draws, self.position)
        record, where = total, torch.arange(self.position.shape[1], device=self.position.device)
        density, gradient = target(self.position)
        s = self._begin(torch.stack([self.position, gradient]), density, step)
        tick, reported = 0, 0.0
        while True:
            s, step = self._tick(s, target, record, num_draws, step, adapt)
            tick += 1
            if tick % CHECK_EVERY:
                continue
            busy = (s.count < num_draws).any(0)
            if report is not None:
                left = float((num_draws - s.count).clamp(min=0).sum()) / (num_draws * chains * len(total))
                report(1 - left - reported)
                reported = 1 - left
            if not bool(busy.any()):
                break
            if adapt is None and float(busy.double().mean()) <= SMALLEST_PART:
                total.take(record, where)
                keep = busy.nonzero().squeeze(-1)
                where, target, record = where[keep], target.of(keep), record.of(keep)
                s, step = s.of(keep), step[keep]
        total.take(record, where)
        self.position = total.last()
        return total.in_units_of(self.target.scale)

    def _begin(self, start: Tensor, density: Tensor, step: Tensor) -> _Lanes:
        """Trajectories of no steps yet, at ``start`` ``(2, chains, batch, D)``, v and gradient."""
        chains, batch, dim = start.shape[1:]
        zero = start.new_zeros(chains, batch)
        whole = torch.zeros(chains, batch, dtype=torch.int64, device=start.device)
        s = _Lanes(
            start=start, start_density=density, proposal=start, proposal_density=density, proposal_energy=zero,
            inner=start, inner_density=density, inner_energy=zero, ends=start.new_zeros(2, 3, chains, batch, dim),
            point=start.new_zeros(3, chains, batch, dim),
            turns=start.new_zeros(self._slots + 1, 2, chains, batch, dim), sum=torch.zeros_like(start[0]),
            inner_sum=torch.zeros_like(start[0]), log_weight=zero, inner_log_weight=zero, energy=zero, step=zero,
            forward=zero, depth=whole, leaf=whole, count=whole, accepted=zero, steps=zero,
        )  # fmt: skip
        return self._restart(s, torch.ones_like(zero, dtype=torch.bool), step)

    def _restart(self, s: _Lanes, over: Tensor, step: Tensor) -> _Lanes:
        """New trajectories from the last draw, with fresh momenta, where ``over``."""
        wide = over.unsqueeze(-1)
        r = self._normal(s.sum)
        begun = torch.stack([s.start[0], r, s.start[1]])
        s.ends = torch.where(wide, begun, s.ends)
        s.proposal = torch.where(wide, s.start, s.proposal)
        s.proposal_density = torch.where(over, s.start_density, s.proposal_density)
        energy = 0.5 * r.square().sum(-1) - s.start_density
        s.energy = torch.where(over, energy, s.energy)
        s.proposal_energy = torch.where(over, energy, s.proposal_energy)
        s.sum = torch.where(wide, r, s.sum)
        s.step = torch.where(over, step, s.step)
        for name in ("log_weight", "depth", "accepted", "steps"):
            setattr(s, name, getattr(s, name).masked_fill(over, 0))
        return self._turn(s, over)

    def _turn(self, s: _Lanes, new: Tensor) -> _Lanes:
        """A new half, from one of the two ends at random, where ``new``."""
        forward = torch.where(self._uniform(s.energy) < 0.5, 1.0, -1.0).to(s.energy)
        s.forward = torch.where(new, forward, s.forward)
        wide = new.unsqueeze(-1)
        s.point = torch.where(wide, torch.where((s.forward > 0).unsqueeze(-1), s.ends[1], s.ends[0]), s.point)
        s.inner_log_weight = s.inner_log_weight.masked_fill(new, -torch.inf)
        s.inner_sum = s.inner_sum.masked_fill(wide, 0)
        s.leaf = s.leaf.masked_fill(new, 0)
        return s

    def _tick(
        self, s: _Lanes, target: Target, record: Record, quota: int, step: Tensor, adapt: Adapt | None
    ) -> tuple[_Lanes, Tensor]:
        """One leapfrog step of every chain, and what follows from it."""
        v, r, gradient = s.point
        signed = (s.step * s.forward).unsqueeze(-1)
        r = r + 0.5 * signed * gradient
        v = v + signed * r
        density, gradient = target(v)
        r = r + 0.5 * signed * gradient
        s.point = torch.stack([v, r, gradient])
        energy = 0.5 * r.square().sum(-1) - density
        log_weight = (s.energy - energy).nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
        divergent = log_weight < -MAX_ENERGY_ERROR
        s.accepted = s.accepted + log_weight.clamp(max=0).exp()
        s.steps = s.steps + 1
        # the proposal of this half: each of its points by its weight
        s.inner_log_weight = torch.logaddexp(s.inner_log_weight, log_weight)
        take = self._uniform(energy).log() < log_weight - s.inner_log_weight
        s.inner = torch.where(take.unsqueeze(-1), torch.stack([v, gradient]), s.inner)
        s.inner_density = torch.where(take, density, s.inner_density)
        s.inner_energy = torch.where(take, energy, s.inner_energy)
        s.inner_sum = s.inner_sum + r
        stop = divergent | self._turned_inside(s, r)
        s.leaf = s.leaf + 1
        # a half that is complete joins the trajectory
        joined = (s.leaf == 2**s.depth) & ~stop
        accept = joined & (self._uniform(energy).log() < s.inner_log_weight - s.log_weight)
        s.proposal = torch.where(accept.unsqueeze(-1), s.inner, s.proposal)
        s.proposal_density = torch.where(accept, s.inner_density, s.proposal_density)
        s.proposal_energy = torch.where(accept, s.inner_energy, s.proposal_energy)
        s.log_weight = torch.where(joined, torch.logaddexp(s.log_weight, s.inner_log_weight), s.log_weight)
        s.sum = torch.where(joined.unsqueeze(-1), s.sum + s.inner_sum, s.sum)
        side = torch.stack([joined & (s.forward < 0), joined & (s.forward > 0)])[:, None, ..., None]
        s.ends = torch.where(side, s.point, s.ends)
        s.depth = s.depth + joined
        over = stop | (joined & (_turning(s.ends[0, 1], s.ends[1, 1], s.sum) | (s.depth == self.max_depth)))
        # a trajectory that is over leaves a draw
        done = over & (s.count < quota)
        acceptance = s.accepted / s.steps
        record.write(
            torch.where(done, s.count, quota), s.proposal[0], s.proposal_density, acceptance_rate=acceptance,
            step_size=s.step, diverging=divergent, energy=s.proposal_energy, tree_depth=s.depth, n_steps=s.steps,
        )  # fmt: skip
        s.start = torch.where(done.unsqueeze(-1), s.proposal, s.start)
        s.start_density = torch.where(done, s.proposal_density, s.start_density)
        s.count = s.count + done
        if adapt is not None:
            step = adapt(acceptance, done)
        return self._turn(self._restart(s, over, step), joined & ~over), step

    def _turned_inside(self, s: _Lanes, r: Tensor) -> Tensor:
        """Whether one of the subtrees that this leaf completes has turned; keeps what later leaves will ask for."""
        last, first = self._last[s.leaf], self._first[s.leaf]
        slot = torch.where(s.leaf % 2 == 0, last, self._slots)
        kept = torch.stack([r, s.inner_sum])
        s.turns.scatter_(0, slot[None, None, ..., None].expand(1, *kept.shape), kept.unsqueeze(0))
        begin, before = s.turns[:-1].unbind(1)
        turned = _turning(begin, r, s.inner_sum - before + begin)
        slots = torch.arange(self._slots, device=r.device)[:, None, None]
        return (turned & (slots >= first) & (slots <= last)).any(0)

    def _uniform(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=self.generator, dtype=like.dtype, device=like.device)

    def _normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype, device=like.device)


def _turning(left: Tensor, right: Tensor, total: Tensor) -> Tensor:
    """Whether a trajectory with momenta ``left`` and ``right`` at its ends and ``total`` over all of it has turned.

    The ends count half, as in a trapezoid rule: with the whole sum, a regular lattice of steps would turn a step late.
    """
    middle = total - 0.5 * (left + right)
    return ((left * middle).sum(-1) <= 0) | ((right * middle).sum(-1) <= 0)
