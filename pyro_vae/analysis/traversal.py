"""Latent traversals: what one unit of the latents does to the data while the others stay where they are.

    x_t = E p(x | z_1, ..., z_d = t, ..., z_D),   z = E q(z | x) elsewhere

Of a hierarchy the layers below follow: they move by what their mean under the model moves, without which an upper layer, that
reaches x through them alone, would do nothing.

Higgins et al. 2017, beta-VAE, https://openreview.net/forum?id=Sy2fzU9gl.
"""

from __future__ import annotations

from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from pyro_vae.analysis.below import followed
from pyro_vae.analysis.drawing import (
    drawn,
    finish,
    image_grid,
    is_image,
    legend_beside,
    name_elements,
    new_figure,
    plain,
    require_drawable,
)
from pyro_vae.analysis.manifold import prior_sites
from pyro_vae.errors import UserError
from pyro_vae.evaluation.means import flat, unit_names
from pyro_vae.programs.door import door
from pyro_vae.programs.latents import decode, encoded_sites, sample_latents
from pyro_vae.programs.trace import Program, y_to_program

PRIOR_DRAWS = 1000  # from which a unit's range is taken
NAMED = 10  # columns of a table that find room below a panel
COLUMNS = 3  # of panels, for vectors


@door(scored=False, latents="a traversal")
@drawn
def traversals(
    program: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    num_units: int = 8,
    steps: int = 9,
    width: float = 2.0,
    seed: int = 0,
) -> Figure:
    """Draw what each of the most active units does, one row, panel or line per unit.

    Units are those whose guide mean varies most over x; each goes through the prior's mean +- ``width`` standard
    deviations, a binary one through 0 and 1, the others staying at the guide's mean (rounded where binary) of the first row of
    x, but for real latents that the model draws after it, and given it.

    Args:
        program: any Program whose latents are real or binary.
        x: data ``(N, *event)``, two at least; the first row is where the traversals start.
        y: what a conditional program is conditioned on, ``(N, ...)``.
        num_units: how many units at most.
        steps: pictures per unit.
        width: of the range, in standard deviations of the prior.
        seed: of the prior's draws.

    Returns:
        The figure: images in rows, curves in panels, points as paths in one panel.

    Raises:
        UserError: latents that cannot be moved one by one (one-hot, on a sphere), data that have no picture.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.build("mlp", "diagonal", (1, 8, 8), latent_dim=3, decoder="mlp:hidden=[8]", encoder="mlp:hidden=[8]")
        >>> len(traversals(vae, torch.rand(20, 1, 8, 8).round()).axes)
        3
    """
    shape = tuple(x.shape[1:])
    require_drawable(shape)
    if len(x) < 2 or steps < 2 or num_units < 1:
        raise UserError(
            f"traversals: expected two data, two steps and one unit at least; got {len(x)}, {steps} and {num_units}"
        )
    y = y_to_program(program, y)
    fns = prior_sites(program, None if y is None else y[:1], shape)
    means = encoded_sites(program, x, y)
    sites = {name: means[name] for name in fns}
    along = None if y is None else y[:1]
    draws = sample_latents(
        program, PRIOR_DRAWS, None if along is None else along.expand(PRIOR_DRAWS, *along.shape[1:]),
        event_shape=shape, seed=seed,
    )  # fmt: skip
    start = {n: v[:1].round() if _is_binary(fns[n]) else v[:1] for n, v in sites.items()}
    prior = flat({n: draws[n] for n in fns})
    centre, spread = prior.mean(0), width * prior.std(0)
    binary = torch.cat([torch.full((v[0].numel(),), _is_binary(fns[n])) for n, v in sites.items()])
    chosen = flat(sites).var(0).argsort(descending=True)[:num_units].tolist()
    names = unit_names(sites)
    found = {}
    for unit in chosen:
        values = torch.linspace(-1, 1, steps).double() * spread[unit] + centre[unit]
        values = torch.tensor([0.0, 1.0]).double() if binary[unit] else values
        z = _moved(start, unit, values)
        _require_support(fns, z)
        rows_y = None if along is None else along.expand(len(values), *along.shape[1:])
        if below := _drawn_after(sites, unit):
            all_start = {n: v.expand(len(values), *v.shape[1:]) for n, v in start.items()}
            z = followed(
                program, {n: v for n, v in z.items() if n not in below}, rows_y, start=all_start, event_shape=shape
            )
        decoded = decode(program, z if len(z) > 1 else next(iter(z.values())), rows_y, event_shape=shape)
        found[names[unit]] = (values, decoded.cpu())
    return _draw(found, shape)


def _is_binary(fn: Any) -> bool:
    """Whether every unit of a site is 0 or 1 by itself."""
    support = fn.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return type(support).__name__ == "_Boolean"


def _moved(start: dict[str, Tensor], unit: int, values: Tensor) -> dict[str, Tensor]:
    """The latents ``(len(values), *latent)`` by site, with one unit of all of them moved."""
    found = {}
    for name, value in start.items():
        rows = value.expand(len(values), *value.shape[1:]).reshape(len(values), -1).clone()
        if 0 <= unit < rows.shape[1]:
            rows[:, unit] = values.to(rows)
        unit -= rows.shape[1]
        found[name] = rows.reshape(len(values), *value.shape[1:])
    return found


def _drawn_after(sites: dict[str, Tensor], unit: int) -> list[str]:
    """The sites that come after that of a unit."""
    ends = torch.tensor([v[0].numel() for v in sites.values()]).cumsum(0)
    return list(sites)[int((ends <= unit).sum()) + 1 :]


def _require_support(fns: dict[str, Any], z: dict[str, Tensor]) -> None:
    for name, fn in fns.items():
        if not bool(fn.support.check(z[name]).all()):
            raise UserError(
                f"traversals: the units of {name!r} cannot be moved one by one, they would leave the support of its prior "
                f"({fn.support}); look at samples and interpolations"
            )


def _draw(found: dict[str, tuple[Tensor, Tensor]], shape: tuple[int, ...]) -> Figure:
    title = "Latent traversals: one unit moves, the others stay"
    if is_image(shape):
        figure = new_figure((8.0, 0.4 + 0.85 * len(found) * max(1.0, shape[-2] / shape[-1])))
        for ax, (name, (_, x)) in zip(figure.subplots(len(found), 1, squeeze=False).flat, found.items(), strict=True):
            image_grid(x, len(x), ax)
            ax.text(-0.01, 0.5, plain(name), transform=ax.transAxes, ha="right", va="center", fontsize=9)
    elif shape == (2,):
        figure = new_figure((7.2, 5.8))
        ax = figure.add_subplot()
        for name, (_, x) in found.items():
            ax.plot(*x.numpy().T, ".-", label=plain(name))
        legend_beside(ax)
        finish(ax, None, "$x_1$", "$x_2$")
    else:
        rows = -(-len(found) // COLUMNS)
        figure = new_figure((8.5, 0.4 + 2.2 * rows))
        panels = figure.subplots(rows, min(COLUMNS, len(found)), sharex=True, sharey=True, squeeze=False)
        for ax in list(panels.flat)[len(found) :]:
            ax.set_visible(False)
        for ax, (name, (_, x)) in zip(panels.flat, found.items(), strict=False):
            for part, vector in zip(torch.linspace(0, 0.9, len(x)).tolist(), x.numpy(), strict=True):
                ax.plot(vector, color=colormaps["viridis"](part), linewidth=1.0)
            ax.set_title(plain(name), fontsize=9)
            ax.spines[["top", "right"]].set_visible(False)
        along = {name_elements(ax, NAMED) for ax in panels.flat}
        figure.supxlabel(along.pop(), fontsize=10)
        figure.supylabel("mean of $p(x \\mid z)$", fontsize=10)
    figure.suptitle(title, fontsize=11)
    return figure
