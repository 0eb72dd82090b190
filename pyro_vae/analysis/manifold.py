"""The quantiles of a two-dimensional prior: where to look at a latent space so that all of it is seen.

    F_1(z_1) = u_1,    F_{2|1}(z_2 | z_1) = u_2,    u on a regular grid of the unit square.

This is the inverse of the Rosenblatt transform, which carries the prior to the uniform distribution: each z of the grid
stands for the same share of the prior's mass.
Rosenblatt 1952, Remarks on a multivariate transformation, https://doi.org/10.1214/aoms/1177729394.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.analysis.below import followed
from pyro_vae.errors import UserError
from pyro_vae.precision import wide
from pyro_vae.programs.contract import require_program
from pyro_vae.programs.latents import event_shape_of, prior_trace
from pyro_vae.programs.trace import Program, device_of, dtype_of, evaluating, innermost, isolated, latent_sites
from pyro_vae.programs.walk import at_once
from pyro_vae.seeding import derive_seed, seeded

DRAWS = 20_000  # from the prior, to find its range and where its mass is
POINTS = 384  # edges of cells along each axis that are evenly spaced, and as many at quantiles of the draws


def latent_grid(
    program: Program, num: int = 20, y: Tensor | None = None, *, event_shape: Any = None, seed: int = 0
) -> Tensor:
    """The quantiles ((j + 1/2) / num, (i + 1/2) / num) of the prior of a program's first latent, of two dimensions.

    In closed form where the coordinates are independent and their quantile functions known (the standard normal).
    Otherwise the density is summed by the midpoint rule over a grid whose range and refinement come from draws of the
    prior; a quantile is then good to about the width of a cell, a few thousandths of the range.

    Args:
        program: any Program whose latent, or the uppermost of whose layers, is continuous and of two dimensions.
        num: quantiles per axis.
        y: what a conditional program is conditioned on, one row ``(1, ...)``.
        event_shape: of one datum, where the program does not say it as ``program.event_shape``.
        seed: of the draws that find the range; torch's generators are put back.

    Returns:
        z ``(num, num, *latent)``: z_1 grows along the second axis, z_2 along the first.

    Raises:
        UserError: another number of latents or dimensions, a discrete latent, or a prior without a density on the plane.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.build("mlp", "diagonal", (1, 8, 8), latent_dim=2)
        >>> (100 * latent_grid(vae, 2)).round().int().tolist()
        [[[-67, -67], [67, -67]], [[-67, 67], [67, 67]]]
    """
    if num < 1:
        raise UserError(f"manifold: expected num of at least 1, got {num}")
    fn = _prior(program, y, event_shape)
    u = (np.arange(num) + 0.5) / num
    with evaluating(program), isolated(), seeded(derive_seed("manifold", seed), device_of(program)):
        like = torch.empty((), dtype=dtype_of(program), device=device_of(program))
        z = _closed_form(fn, u, like)
        if z is None:
            z = _numerical(fn, u, like)
    return torch.as_tensor(z).to(like).reshape(num, num, *fn.event_shape)


def prior_sites(program: Program, y: Tensor | None = None, event_shape: Any = None) -> dict[str, Any]:
    """The distribution of every latent site of the model by name, with batch shape ``(1,)`` or ``()``.

    Args:
        program: any Program.
        y: what a conditional program is conditioned on, one row ``(1, ...)``.
        event_shape: of one datum, where the program does not say it as ``program.event_shape``.
    """
    require_program(program)
    shape = event_shape_of(program, event_shape)
    with evaluating(program), isolated(), seeded(derive_seed("site names"), device_of(program)):
        traced = prior_trace(program, 1, y, shape)
    return {name: site["fn"] for name, site in latent_sites(traced).items()}


def _prior(program: Program, y: Tensor | None, event_shape: Any) -> Any:
    """p(z) of the first latent; :class:`UserError` unless it is continuous, of two dimensions."""
    sites = prior_sites(program, y, event_shape)
    found = " and ".join(f"{name!r} of dimension {fn.event_shape.numel()}" for name, fn in sites.items())
    fn = next(iter(sites.values()), None)
    if fn is None or fn.event_shape.numel() != 2 or not _is_top(program, sites, y, event_shape):
        raise UserError(
            f"a manifold needs one latent, or a top layer of all, of dimension 2, and this program has {found or 'none'}: train "
            "one with --set latent_dim=2, or look at samples and interpolations"
        )
    if fn.support.is_discrete:
        raise UserError(f"a manifold needs a continuous latent, and this program's {found} is discrete")
    return fn


def _is_top(program: Program, sites: dict[str, Any], y: Tensor | None, event_shape: Any) -> bool:
    """Whether all other latents are given the first: their means differ at two draws of it."""
    (name, fn), *others = sites.items()
    if not others:
        return True
    with seeded(derive_seed("manifold: top"), device_of(program)):
        drawn = {name: fn.sample((2,)).reshape(2, *fn.event_shape)}
    along = None if y is None else y[:1].expand(2, *y.shape[1:])
    z = followed(program, drawn, along, event_shape=event_shape_of(program, event_shape))
    return all(not torch.equal(z[n][:1], z[n][-1:]) for n, _ in others)


def _closed_form(fn: Any, u: np.ndarray, like: Tensor) -> np.ndarray | None:
    """Quantiles ``(num, num, 2)`` where the coordinates are independent and know their own; else None."""
    base = innermost(fn)
    if base.event_shape:
        return None
    try:
        z = base.icdf(torch.as_tensor(u).to(like).reshape(-1, *(1 for _ in base.batch_shape)))
    except (NotImplementedError, AttributeError):
        return None
    z = z.expand(len(u), *fn.batch_shape, *fn.event_shape).reshape(len(u), 2).cpu().double().numpy()
    return np.stack(np.meshgrid(z[:, 0], z[:, 1]), -1)


def _numerical(fn: Any, u: np.ndarray, like: Tensor) -> np.ndarray:
    """Quantiles ``(num, num, 2)`` by the midpoint rule, which asks for no density at the edge of a support."""
    draws = fn.sample((DRAWS,)).reshape(DRAWS, 2).cpu().double().numpy()
    first, second = _refined(draws[:, 0]), _refined(draws[:, 1])
    joint = _log_density(fn, _middles(first), _middles(second), like)
    mass = np.diff(first) @ np.exp(np.minimum(joint, 700.0)) @ np.diff(second)
    if not 0.5 < mass < 2.0:
        raise UserError(
            f"the prior has no density on the plane that can be summed (its mass comes to {mass:.3g}, not 1): a manifold "
            "needs one, and a point mass, a curve or a sphere has none"
        )
    z1 = _quantiles(np.exp(joint - joint.max()) @ np.diff(second), first, u)
    given = _log_density(fn, z1, _middles(second), like)
    peak = np.maximum(given.max(axis=1, keepdims=True), -1e300)  # finite even where a whole row is -inf
    z2 = [_quantiles(density, second, u) for density in np.exp(given - peak)]
    return np.stack([np.broadcast_to(z1, (len(u), len(u))), np.stack(z2, 1)], -1)


def _refined(draws: np.ndarray) -> np.ndarray:
    """Edges of cells over the range of the draws and a tenth beyond it, the cells smaller where the draws are."""
    low, high = draws.min(), draws.max()
    if not np.isfinite([low, high]).all():
        raise UserError("the prior's draws are not finite: it has no quantiles to look at")
    margin = 0.1 * (high - low) + 1e-9
    even = np.linspace(low - margin, high + margin, POINTS)
    return np.unique(np.concatenate([even, np.quantile(draws, np.linspace(0, 1, POINTS))]))


def _log_density(fn: Any, first: np.ndarray, second: np.ndarray, like: Tensor) -> np.ndarray:
    """Log p(z) in float64 at every pair of coordinates ``(len(first), len(second))``; -inf outside the support."""
    pairs = np.stack(np.meshgrid(first, second, indexing="ij"), -1).reshape(-1, 1, *fn.event_shape)
    parts = []
    for z in torch.as_tensor(pairs).to(like).split(at_once("manifold")):
        log_prob = wide(fn.log_prob(z))
        parts.append(torch.where(fn.support.check(z) & (log_prob < torch.inf), log_prob, -torch.inf).cpu())
    return torch.cat(parts).reshape(len(first), len(second)).numpy()


def _quantiles(density: np.ndarray, edges: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Where the mass of a density, given at the middles of cells, has reached the share u of the whole."""
    cumulative = np.concatenate([[0.0], np.cumsum(density * np.diff(edges))])
    return np.interp(u, cumulative / cumulative[-1], edges) if cumulative[-1] > 0 else np.full(u.shape, edges.mean())


def _middles(edges: np.ndarray) -> np.ndarray:
    return 0.5 * (edges[1:] + edges[:-1])
