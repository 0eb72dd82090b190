"""Does a model read the data that it is to explain?

A model is p(z) p(x | z): of x it may take the shape, device and dtype. One that reads the values (a decoder fed with x, a prior
made by an encoder) scores x absurdly well, and draws from another model than was trained. Whether it does is seen by running it
on other data with the same latents: the densities of its sites must not change.
"""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.errors import ProgramError
from pyro_vae.programs.trace import (
    OBSERVED,
    SAMPLE_PLATE,
    AtValues,
    Program,
    Traced,
    arguments,
    is_factor,
    is_random,
    site_log_prob,
)
from pyro_vae.seeding import derive_seed, seeded

RULE = "the model may use x for its shape, device and dtype alone"


def check_reading(program: Program, x: Tensor, y: Tensor | None, latents: dict[str, Tensor]) -> None:
    """:class:`ProgramError` where a site of the model depends on the values of x; to be called inside of ``isolated``.

    Exempt are ``pyro.factor``, by which a likelihood may be written, and latents that no other site depends on: reverse models
    r(a | z, x) of a guide's auxiliary sites integrate to 1 whatever x is.

    Args:
        program: the Program.
        x: a few rows of data; missing entries (NaN) stay missing.
        y: what a conditional program is conditioned on.
        latents: values of every latent site, ``(num_samples, batch, *latent)``.
    """
    reading = set()
    for value in (0.0, 1.0):  # two, one of which is not the mean, or whatever is read, of the first
        try:
            first, second = (_run(program, v, y, latents) for v in (x, torch.where(x.isnan(), x, value)))
        except (
            RuntimeError,
            ValueError,
            IndexError,
        ):  # other data that this program cannot be run on: nothing can be said
            continue
        reading |= _changed(first, second)
    if OBSERVED in reading:
        raise ProgramError(
            f"model: the distribution of {OBSERVED!r} reads x itself, and {RULE}: let it depend on latents, and on y; one over "
            "earlier elements of x belongs inside a distribution's log_prob, as in the likelihood autoregressive-bernoulli"
        )
    if not reading:
        return
    for name in reading:
        latents = {**latents, name: first.nodes[name]["fn"].sample().expand_as(latents[name])}  # its draws may be one
    moved = _changed(first, _run(program, x, y, latents)) - reading
    if moved:
        name = sorted(reading)[0]
        raise ProgramError(
            f"model: the density of the latent {name!r} reads x, and {sorted(moved)[0]!r} depends on it: {RULE}, but for latents "
            "that no other site depends on; what the prior is to know belongs into y"
        )


def _run(program: Program, x: Tensor, y: Tensor | None, latents: dict[str, Tensor]) -> Traced:
    draws = len(next(iter(latents.values()))) if latents else 2
    with (
        seeded(derive_seed("does the model read x"), x.device),
        pyro.plate(SAMPLE_PLATE, draws, dim=-2),
        AtValues(latents),
    ):
        return poutine.trace(program.model).get_trace(*arguments(x, y))


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
