"""Every value of discrete sites, where these are few enough to be summed over."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from pyro_vae.programs.trace import innermost

MOST_STATES = 1024  # states of the latents that are summed over: each costs a pass of the decoder per image


def is_enumerable(fn: Any) -> bool:
    """Whether a distribution has a finite number of values, of which it can give a list."""
    return not fn.has_rsample and bool(getattr(innermost(fn), "has_enumerate_support", False))


def number_of_states(fn: Any) -> tuple[int, int]:
    """The values of one element of a discrete site, and the number of elements: K and D of K^D states."""
    base = innermost(fn)
    axes = fn.event_shape[: len(fn.event_shape) - len(base.event_shape)]
    return len(base.enumerate_support(expand=False)), axes.numel()


def states(fn: Any) -> Tensor:
    """Every value of a discrete site ``(states, *event_shape)``: the product over the axes that were made into an event."""
    base = innermost(fn)
    each = base.enumerate_support(expand=False)
    each = each.reshape(len(each), *base.event_shape)
    count, elements = number_of_states(fn)
    index = torch.tensor(list(itertools.product(range(count), repeat=elements)), device=each.device)
    return each[index].reshape(len(index), *fn.event_shape)


def for_rows(program: Any, values: Tensor, rows: int) -> Tensor:
    """States ``(states, *event)`` as values of rows ``(states, rows, *event)``, or of one where the model says it will do."""
    return values[:, None].expand(
        -1, 1 if getattr(program.model, "one_row_will_do", False) else rows, *values.shape[1:]
    )


def joint_states(sites: dict[str, dict[str, Any]]) -> dict[str, Tensor] | None:
    """Every joint value of several discrete sites of a trace, ``(states, *event_shape)`` by name.

    None where a site is continuous or has no list of values, or there are more than 1,024 joint values.
    """
    if not sites or not all(is_enumerable(site["fn"]) for site in sites.values()):
        return None
    try:
        counts = [number_of_states(site["fn"]) for site in sites.values()]
        total = math.prod(count**elements for count, elements in counts)
        if total > MOST_STATES:
            return None
        own = [states(site["fn"]) for site in sites.values()]
    except NotImplementedError:  # a binomial of several total counts
        return None
    index = torch.cartesian_prod(*(torch.arange(len(s)) for s in own)).reshape(total, len(own))
    return {name: s[column.to(s.device)] for name, s, column in zip(sites, own, index.unbind(1), strict=True)}
