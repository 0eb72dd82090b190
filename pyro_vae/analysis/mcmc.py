"""Markov chains on the latents, the decoder fixed: the posterior p(z | x) itself, to hold a guide against.

Every chain of every image moves at once, on the real line (see :mod:`pyro_vae.evaluation.unconstrained`): one
gradient is one pass of the decoder over all of them. Step size and scales are per image.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pyro_vae.analysis.adaptation import DualAveraging, first_step, scales, windows
from pyro_vae.analysis.hmc import HMC
from pyro_vae.analysis.nuts import NUTS, Adapt, Report
from pyro_vae.analysis.scoring import concatenated
from pyro_vae.analysis.target import Record, Target
from pyro_vae.errors import UserError
from pyro_vae.evaluation.blind import discrete_sites
from pyro_vae.evaluation.methods import rows_of_chains
from pyro_vae.evaluation.unconstrained import Unconstrained
from pyro_vae.programs.door import admitted, door
from pyro_vae.programs.trace import Program, Traces, device_of
from pyro_vae.programs.walk import Block, Walk
from pyro_vae.seeding import derive_seed, generator, seeded

GUIDE_DRAWS = 64  # from which the guide's mean and scale are taken
OVERDISPERSED = 2.0  # the spread of the starting points, in units of the guide's
KERNELS = ("nuts", "hmc")


class Kernel(Protocol):
    """A sampler that stands somewhere and can be run on."""

    target: Target
    position: Tensor

    def run(self, num_draws: int, step: Tensor, adapt: Adapt | None = None, report: Report | None = None) -> Record:
        """Draws of every chain, in units of u."""


@dataclass(frozen=True)
class Chains:
    """What the chains return, on the host.

    Attributes:
        latents: by site, ``(num_chains, num_samples, N, *latent)``.
        statistics: ``lp`` (log p(x, u)), ``acceptance_rate``, ``step_size``, ``energy``, ``diverging``,
            ``tree_depth`` (of NUTS), ``n_steps``, and of latents whose support has an edge ``at_edge``, each
            ``(num_chains, num_samples, N)``.
        num_gradients: of the log-density of one chain, warm-up included.
        chunk_size: images times chains in one batch.
    """

    latents: dict[str, np.ndarray]
    statistics: dict[str, np.ndarray]
    num_gradients: int
    chunk_size: int


@door(gradients=True, records=True)
def sample_chains(
    program: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    kernel: str = "nuts",
    num_samples: int = 1000,
    num_chains: int = 4,
    num_warmup: int = 400,
    seed: int = 0,
    target_accept: float = 0.8,
    max_tree_depth: int = 8,
    chunk_size: int | None = None,
    progress: Report | None = None,
) -> Chains:
    """Draw from p(z | x) of every row of x by NUTS or HMC.

    The chains start overdispersed: at draws from the guide, twice as far from its mean, and every other one at the prior. The
    work is cut into fixed blocks of images, each seeded from (seed, first image). Dropout is off.

    Args:
        program: any Program with continuous latents, on its device.
        x: data ``(N, *event)`` as the program sees it.
        y: what a conditional program is conditioned on, ``(N, ...)``.
        kernel: ``"nuts"``, or ``"hmc"`` with trajectories of a quarter of a period.
        num_samples: draws kept, per chain and image.
        num_chains: independent chains per image.
        num_warmup: draws per chain before those, from which step size and scales are learned.
        seed: of everything drawn.
        target_accept: mean acceptance that the step size is adapted to.
        max_tree_depth: doublings of a NUTS trajectory at most.
        chunk_size: images times chains in one batch; by default as many as fit the cache (CPU) or fill a GPU. Where memory
            runs out, half as many images are taken from there on, and a warning says so.
        progress: called with images' worth of work done, a fraction at a time; adds up to about N.

    Raises:
        UserError: discrete latents, x outside the support, numbers that are too small.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.build("ppca", "linear", (3,), latent_dim=2)
        >>> chains = sample_chains(vae, torch.zeros(5, 3), num_samples=10, num_warmup=10)
        >>> chains.latents["z"].shape
        (4, 10, 5, 2)
    """
    if kernel not in KERNELS:
        raise UserError(f"expected the kernel {' or '.join(map(repr, KERNELS))}, got {kernel!r}")
    for name, value, least in (("num_samples", num_samples, 1), ("num_chains", num_chains, 1), ("num_warmup", num_warmup, 0),
                               ("max_tree_depth", max_tree_depth, 1)):  # fmt: skip
        if value < least:
            raise UserError(f"expected {name} of at least {least}, got {value}")
    if not 0 < target_accept < 1:
        raise UserError(f"expected target_accept between 0 and 1, got {target_accept}")
    rows = rows_of_chains(x, device_of(program), num_chains, chunk_size)
    walk = Walk(program, x, y, rows=rows, draws=num_chains, whole=True, progress=progress)
    for block in walk:
        with block:
            walk.keep(_moved(block, kernel, max_tree_depth, num_samples, num_warmup, target_accept, seed))
    blocks = walk.gathered()
    latents, statistics = (concatenated([block[i] for block in blocks], 2) for i in (0, 1))
    return Chains(latents, statistics, sum(block[2] for block in blocks), walk.rows * num_chains)


def _moved(
    block: Block, kernel: str, max_tree_depth: int, num_samples: int, num_warmup: int, target_accept: float, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], int]:
    """Latents and statistics of the chains of a block, and how many gradients they took."""
    num_chains, traces = block.walk.draws, admitted()
    require_continuous(traces)
    density = Unconstrained(traces, block.x, block.y)
    start, scale = starting_points(density, num_chains, derive_seed("chains: start", seed, block.first))
    target = Target(density, num_chains, scale)
    random = generator("chains", seed, block.first, device=block.x.device)
    nuts = kernel == "nuts"
    chosen: Kernel = NUTS(target, start / scale, max_tree_depth, random) if nuts else HMC(target, start / scale, random)
    record = _sample(chosen, num_samples, num_warmup, target_accept, block.report)
    if not nuts:
        del record.statistics["tree_depth"]
    latents, edge = _constrained(density, record.draws, block.walk.rows * num_chains)
    return latents, record.as_dict() | edge, target.gradients[0]


def require_continuous(traces: Traces) -> None:
    """:class:`UserError` for discrete latents, by name."""
    for name in discrete_sites(traces):
        raise UserError(
            f"the latent {name!r} is discrete, and NUTS and HMC move latents along gradients: use source='guide' or 'psis' "
            "(--mcmc none)"
        )


def starting_points(density: Unconstrained, num_chains: int, seed: int) -> tuple[Tensor, Tensor]:
    """Starts `(num_chains, batch, D)`, and the guide's scale `(batch, D)`.

    The first, third, ... is twice as far from the mean of the guide as its draws; the others are draws of the prior, where it has
    any: R-hat sees a mode that the guide does not. A start where the density vanishes is drawn halfway to the mean until it
    does not.
    """
    with seeded(seed, density.x.device):
        draws = density.draw(max(GUIDE_DRAWS, num_chains), guide=True)
    mean, scale = draws.mean(0), draws.std(0)
    scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, torch.ones_like(scale))
    u = mean + OVERDISPERSED * (draws[:num_chains] - mean)
    with seeded(derive_seed("chains: start at the prior", seed), density.x.device), suppress(NotImplementedError):
        u[1::2] = density.draw(num_chains)[1::2]
    for _ in range(20):
        good = torch.isfinite(density.densities(u).log_joint)
        if bool(good.all()):
            break
        u = torch.where(good.unsqueeze(-1), u, 0.5 * (u + mean))
    else:
        row = int((~good).any(0).nonzero()[0])
        raise UserError(f"the model gives no finite log-density near the guide's latents of row {row}: train longer")
    return u, scale


def _sample(kernel: Kernel, num_samples: int, num_warmup: int, target_accept: float, report: Report) -> Record:
    """Warm up in windows, then draw."""
    total = num_warmup + num_samples
    batch, dim = kernel.target.scale.shape
    step = torch.full((batch,), first_step(dim), dtype=kernel.target.scale.dtype, device=kernel.target.scale.device)
    first, middle, last = windows(num_warmup)
    for index, size in enumerate([first, *middle, last]):
        if size == 0:
            continue
        averaging = DualAveraging(step, target_accept)
        record = kernel.run(size, step, averaging, _part(report, size / total))
        step = averaging.step
        if 0 < index <= len(middle):
            before = kernel.target.scale
            scale = scales(record.draws, before)
            kernel.position = kernel.position * (before / scale)
            kernel.target = kernel.target.in_units_of(scale)
            # the step, in the new units, along the direction that was the narrowest
            step = step.clamp(max=first_step(dim))
    return kernel.run(num_samples, step, None, _part(report, num_samples / total))


def _part(report: Report, size: float) -> Report:
    """A report that counts its share as ``size``."""
    return lambda share: report(share * size)


def _constrained(
    density: Unconstrained, draws: Tensor, rows: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The latents by site, ``(chains, draws, batch, *latent)``, of u ``(draws, chains, batch, D)``; and which are at an edge."""
    u = draws.transpose(0, 1).flatten(0, 1)
    parts = u.split(max(1, rows // density.batch))
    shape = (draws.shape[1], draws.shape[0])

    def joined(found: list[Tensor]) -> np.ndarray:
        array: np.ndarray = torch.cat(found).unflatten(0, shape).cpu().numpy()
        return array

    values = [density.constrain(part) for part in parts]
    edge = {"at_edge": joined([density.at_edge(part) for part in parts])} if density.has_edge else {}
    return {n: joined([v[n] for v in values]) for n in density.sites}, edge
