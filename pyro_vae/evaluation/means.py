"""The guide's means of all latents side by side, one row per datum: what embeddings, probes and active units are made of."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyro_vae.programs.columns import given_columns
from pyro_vae.programs.door import door
from pyro_vae.programs.latents import encoded_sites
from pyro_vae.programs.trace import Program
from pyro_vae.programs.walk import Walk, at_once


@door(scored=False, records=True)
def guide_means(program: Program, x: Tensor, y: Tensor | None = None) -> tuple[tuple[str, ...], Tensor]:
    """The names of the units of the latents, and their means under q(z | x).

    Args:
        program: any Program.
        x: data ``(N, *event)``, or a record, whose columns are no units, unless all of one is missing.
        y: what a conditional program is conditioned on, ``(N, ...)``.

    Returns:
        D names, ``z[0]``, ``z[1]``, ..., and means ``(N, D)``, float64, on the CPU.

    Example:
        >>> import pyro_vae as pv
        >>> names, means = guide_means(pv.build("ppca", "linear", (3,), latent_dim=2), torch.zeros(5, 3))
        >>> names, means.shape
        (('z[0]', 'z[1]'), torch.Size([5, 2]))
    """
    walk, known = Walk(program, x, y, rows=at_once("latent means")), given_columns(program, x)
    for block in walk:
        with block:
            sites = encoded_sites(program, block.x, block.y)
            walk.keep({name: value for name, value in sites.items() if name not in known})
    parts = walk.gathered()
    return unit_names(parts[0]), torch.cat([flat(part) for part in parts])


def flat(sites: dict[str, Tensor]) -> Tensor:
    """Latents ``(N, *latent)`` by site side by side, ``(N, D)``, float64, on the CPU."""
    return torch.cat([value.detach().reshape(len(value), -1).cpu().double() for value in sites.values()], 1)


def unit_names(sites: dict[str, Tensor]) -> tuple[str, ...]:
    """The names of all units of latents ``(N, *latent)`` by site, as in ArviZ's summaries.

    >>> unit_names({"z": torch.zeros(5, 2), "s": torch.zeros(5)})
    ('z[0]', 'z[1]', 's')
    """
    return tuple(
        f"{name}[{', '.join(map(str, index))}]" if index else name
        for name, value in sites.items()
        for index in np.ndindex(*value.shape[1:])
    )
