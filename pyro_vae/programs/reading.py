"""Does a model read the data that it is to explain?

A model is p(z) p(x | z): of x it may take the shape, device and dtype. One that reads the values (a decoder fed with x, a prior
made by an encoder) scores x absurdly well, and draws from another model than was trained. Whether it does is seen by running it
on other data with the same latents: the densities of its sites must not change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_vae.programs.rows import DependenceError
from pyro_vae.programs.trace import Traced, is_factor, is_random, observations, site_log_prob
from pyro_vae.programs.values import blank

RULE = "the model may use x for its shape, device and dtype alone"


def check_reading(
    first: Traced,
    again: Callable[[Tensor, dict[str, Tensor]], Traced],
    x: Tensor,
    latents: dict[str, Tensor],
    kept: Tensor | None = None,
) -> None:
    """:class:`DependenceError` where a site of the model depends on the values of x; to be called inside of ``isolated``.

    Exempt are ``pyro.factor``, by which a likelihood may be written, and latents that no other site depends on: reverse models
    r(a | z, x) of a guide's auxiliary sites integrate to 1 whatever x is.

    Args:
        first: the model's run on x, with these latents.
        again: runs it on other data, and with other latents, with the same random numbers at every call.
        x: a few rows of data; missing entries (NaN) stay missing.
        latents: values of every latent site, ``(num_samples, batch, *latent)``.
        kept: the numbers of a row ``(*event)`` that a model may read: covariates of a record.
    """
    reading: set[str] = set()
    stays = x.isnan() if kept is None else x.isnan() | kept
    for other in (blank(x, kept), torch.where(stays, x, 0.0), torch.where(stays, x, 1.0)):
        try:
            second = again(other, latents)
            reading = _changed(first, second)
            if reading:  # by other random numbers than the first run had, perhaps
                first = again(x, latents)
                reading = _changed(first, second)
            break
        except (RuntimeError, ValueError, IndexError):  # data that this program cannot be run on: nothing can be said
            continue
    for seen in reading.intersection(observations(first)):
        raise DependenceError(
            f"model: the distribution of {seen!r} reads x itself, and {RULE}: let it depend on latents, and on y; what it is "
            "to know of a row (a size factor) comes in as an argument of its own, pv.adopt(program) and inputs={'size': size}; "
            "one over earlier elements of x belongs inside a distribution's log_prob, as in the likelihood "
            "autoregressive-bernoulli"
        )
    if not reading:
        return
    for name in reading:
        latents = {**latents, name: first.nodes[name]["fn"].sample().expand_as(latents[name])}  # its draws may be one
    moved = _changed(first, again(x, latents)) - reading
    if moved:
        name = sorted(reading)[0]
        raise DependenceError(
            f"model: the density of the latent {name!r} reads x, and {sorted(moved)[0]!r} depends on it: {RULE}, but for latents "
            "that no other site depends on; what the prior is to know belongs into y"
        )


def _changed(first: Traced, second: Traced) -> set[str]:
    """The sites whose density at the first trace's values is another in the second trace."""
    found = set()
    for name, site in first.nodes.items():
        if not is_random(site) or is_factor(site):
            continue
        other: Any = second.nodes.get(name)
        if other is None or not is_random(other):
            found.add(name)
            continue
        before, after = (site_log_prob(s, site["value"]) for s in (site, other))
        if before.shape != after.shape or not torch.allclose(before, after, rtol=1e-4, atol=1e-4, equal_nan=True):
            found.add(name)
    return found
