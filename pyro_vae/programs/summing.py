"""Discrete latents of records summed over their states, beside draws of the other latents.

    p(x) = sum_s E_{q(z | x, s)} [ p(x, s, z) / q(z | x, s) ],       ELBO = sum_s q(s | x) E_{q(z | x, s)} [ log p - log q ]

Every state has draws of its own of what is not discrete. Where a row has the value of a site, that is its one state.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.errors import UserError
from pyro_vae.programs.columns import layout_of
from pyro_vae.programs.masks import counted
from pyro_vae.programs.states import is_enumerable, joint_states, number_of_states
from pyro_vae.programs.trace import (
    AtValues,
    Program,
    Terms,
    Traced,
    Traces,
    innermost,
    latent_sites,
    run,
    site_log_prob,
)

SAME_IN_ALL = (torch.distributions.Categorical, torch.distributions.OneHotCategorical, torch.distributions.Bernoulli)
MOST_SUMMED = 128  # states: each costs a pass of guide and model per draw


@dataclass(frozen=True)
class Summed:
    """Runs of guide and model in every state, ``num`` times: as ``states * num`` samples.

    ``log_chance`` ``(states, num, batch)`` is log q(s | x), -inf of states that are those of no row.
    """

    guide: Traced
    model: Traced
    log_chance: Tensor

    def by_state(self, values: Tensor) -> Tensor:
        """Values ``(states * num, batch)`` as ``(states, num, batch)``."""
        return values.reshape(self.log_chance.shape)

    def mean(self, values: Tensor) -> Tensor:
        """E over q(s | x) of values ``(states * num, batch)``: ``(num, batch)``."""
        chance = self.log_chance.exp()
        values = torch.where(
            chance > 0, self.by_state(values), torch.zeros_like(chance)
        )  # so that no gradient is 0 * inf
        return (chance * values).sum(0)

    def terms(self) -> Terms:
        """Of all samples, ``(states * num, batch)`` each."""
        states, num, batch = self.log_chance.shape
        return Traces(self.model, self.guide).terms(states * num, batch)

    def log_weights(self, terms: Terms) -> Tensor:
        """log p(x, s, z) / q(z | x, s), ``(states, num, batch)``; -inf of states that do not count."""
        counts = self.log_chance > -math.inf
        ratio = self.by_state(terms.log_weight) + torch.where(
            counts, self.log_chance, torch.zeros_like(self.log_chance)
        )
        return torch.where(counts, ratio, torch.full_like(ratio, -math.inf))

    def log_weight(self, terms: Terms) -> Tensor:
        """log sum_s p(x, s, z) / q(z | x, s), ``(num, batch)``."""
        return torch.logsumexp(self.log_weights(terms), 0)


def few_states(traces: Traces) -> dict[str, Tensor] | None:
    """Every joint value of the discrete latents, ``(states, *event)`` by site; None where there are none, or too many."""
    states = joint_states({n: s for n, s in latent_sites(traces.model).items() if is_enumerable(s["fn"])})
    return None if states is None or len(next(iter(states.values()))) > MOST_SUMMED else states


def states_of(program: Program, x: Tensor) -> dict[str, Tensor] | None:
    """The joint states of what is summed over, ``(states, *event)`` by site; None where nothing is: of all but records."""
    layout = layout_of(program, x)
    return None if layout is None else layout.states


def summed(program: Program, x: Tensor, y: Tensor | None, states: dict[str, Tensor], num: int) -> Summed:
    """Run a program in every state, with ``num`` draws of its other latents in each; inside of ``isolated``."""
    size, batch = len(next(iter(states.values()))), len(x)
    values = {
        n: s.to(x.device)[:, None, None].expand(size, num, batch, *s.shape[1:]).flatten(0, 1) for n, s in states.items()
    }
    guide = run(program.guide, x, y, num_samples=size * num, at=AsDrawn(values))
    model = run(program.model, x, y, num_samples=size * num, at=guide)
    _require_these(model, states)
    log_chance: Any = sum(site_log_prob(guide.nodes[n]) for n in states)
    log_chance = log_chance.expand(size * num, batch)
    counts = counting(model, values, {n: s[0] for n, s in states.items()})
    log_chance = torch.where(counts, log_chance, torch.full_like(log_chance, -math.inf))
    return Summed(guide, model, log_chance.reshape(size, num, batch))


def _require_these(model: Traced, states: dict[str, Tensor]) -> None:
    """:class:`UserError` where rows have other values of a site than those that were listed, as counts may."""
    for name in states:
        base = innermost(model.nodes[name]["fn"])
        if isinstance(base, SAME_IN_ALL):
            continue
        try:
            count, elements = number_of_states(model.nodes[name]["fn"])
        except NotImplementedError:  # rows that differ from each other
            count, elements = 0, 1
        listed = len(states[name].unique(dim=0))
        if count**elements != listed:
            raise UserError(
                f"the values that the latent {name!r} ({type(base).__name__}) can have differ from row to row, and it is summed "
                f"over {listed} of them: give each of these kinds of rows in a call of its own"
            )


def counting(model: Traced, values: dict[str, Tensor], first: dict[str, Tensor]) -> Tensor:
    """Which of the states at which sites stand ``(samples, batch)`` count: of elements that are masked, the first alone."""
    some = next(iter(values.values()))
    counts = torch.ones(some.shape[:2], dtype=torch.bool, device=some.device)
    for name, site in latent_sites(model).items():
        if name in values and (mask := counted(site)) is not None:
            other = (values[name] != first[name].to(some.device)) & ~mask.to(some.device)
            counts = counts & ~other.reshape(*other.shape[:2], -1).any(-1)
    return counts


class AsDrawn(AtValues):
    """Give the guide's sites the model's values in the guide's dtype: class numbers are integers, and bits are floats."""

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        if msg["name"] in self.values and msg["done"]:
            with contextlib.suppress(NotImplementedError):
                msg["value"] = msg["value"].to(innermost(msg["fn"]).enumerate_support(expand=False).dtype)
