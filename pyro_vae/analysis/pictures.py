"""Pictures of a program: samples, reconstructions, interpolations, the manifold, and how it was trained.

Each function takes ``ax=None``, draws on matplotlib axes and returns them; pyplot is never touched. Images are drawn as
images, data of shape (2,) as points, other vectors as curves::

    from pyro_vae.analysis import pictures

    pictures.save(pictures.samples(run.program, 64), "samples.png")
"""

from __future__ import annotations

from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pyro_vae.analysis.below import followed
from pyro_vae.analysis.drawing import (
    LONG,
    SQUARE,
    curves,
    drawn,
    finish,
    image_grid,
    is_image,
    legend_beside,
    name_elements,
    new_axes,
    points,
    require_drawable,
    save,
)
from pyro_vae.analysis.interpolation import find_path
from pyro_vae.analysis.manifold import latent_grid, prior_sites
from pyro_vae.errors import UserError
from pyro_vae.programs import latents
from pyro_vae.programs.columns import layout_of, taken
from pyro_vae.programs.trace import Program

__all__ = [
    "image_grid",
    "interpolations",
    "manifold",
    "reconstructions",
    "sample_count",
    "samples",
    "save",
    "training_curves",
]

LONGEST_ROW = 10  # images beside each other above their reconstructions


@drawn
def samples(
    program: Program,
    num: int | None = None,
    seed: int = 0,
    mean: bool = True,
    y: Tensor | None = None,
    ax: Axes | None = None,
    *,
    drawn: Tensor | None = None,
    **options: Any,
) -> Axes:
    """Draw what the model makes: z from p(z), then the mean of p(x | z), or a draw from it.

    Args:
        program: any Program that says its ``event_shape``.
        num: how many; 64 images, 2,000 points or 10 curves where None.
        seed: of the draws.
        mean: the mean of p(x | z), or a draw.
        y: what a conditional program is conditioned on, ``(num, ...)``.
        ax: where to draw; a new figure where None.
        drawn: what was drawn already, of a program with columns (:func:`pyro_vae.sample_columns`).
        options: more for :func:`pyro_vae.sample`: ``temperature``, ``shared``.

    Returns:
        The axes.
    """
    shape, x = _event_shape(program), drawn
    if x is None:
        x = latents.sample(program, sample_count(shape) if num is None else num, y, mean=mean, seed=seed, **options)
    of_means = mean and getattr(program, "latents", True)
    title = "the mean of $p(x \\mid z)$, $z \\sim p(z)$" if of_means else "$x \\sim p(x)$"
    return _draw(x, shape, ax, f"Samples: {title}")


@drawn
def reconstructions(
    program: Program, x: Tensor, y: Tensor | None = None, *, ax: Axes | None = None, ncols: int | None = None
) -> Axes:
    """Draw data above their reconstructions, the mean of p(x | z) at the guide's mean of z.

    Args:
        program: any Program.
        x: data ``(n, *event)``, as a program sees them; of a record its first column that is no single number is drawn.
        y: what a conditional program is conditioned on, ``(n, ...)``.
        ax: where to draw; a new figure where None.
        ncols: images per row, 10 at most where None.

    Returns:
        The axes; points are joined to theirs by a line.
    """
    x = taken(program, x)
    means = None
    if (layout := layout_of(program, x)) is not None:
        made = latents.reconstruct(program, x, y)
        name = next((c.name for c in layout.columns if c.name in made and c.shape), layout.columns[0].name)
        x, means = layout.unpacked(x)[name], made[name]
    shape = tuple(x.shape[1:])
    require_drawable(shape)
    _require_rows(x)
    means = (latents.reconstruct(program, x, y) if means is None else means).cpu()
    title = "Data (above) and reconstructions (below)"
    if not is_image(shape):
        sets = {"data": x, "reconstructions": means}
        title = "Data and reconstructions"
        return points(sets, ax, title=title, joined=True) if shape == (2,) else curves(sets, ax, title=title)
    ncols = min(len(x), LONGEST_ROW) if ncols is None else ncols
    blank = torch.full((-len(x) % ncols, *shape), torch.nan)
    both = [torch.cat([t.cpu().to(blank), blank]) for t in (x, means)]
    rows = torch.stack([t.reshape(-1, ncols, *shape) for t in both], 1).flatten(0, 2)
    return image_grid(rows, ncols, ax, title=title, wide_rows=range(2, len(rows) // ncols, 2))


@drawn
def interpolations(
    program: Program,
    x: Tensor | tuple[Tensor, Tensor],
    steps: int = 10,
    y: Tensor | None = None,
    ax: Axes | None = None,
    *,
    path: str = "straight",
) -> Axes:
    """Draw the way from one datum to another in latent space: p(x | z)'s mean at (1 - t) z_a + t z_b, or on the great circle.

    z_a and z_b are the guide's means; where a program has several latents, all of them move together. The two ways are
    told apart in :mod:`pyro_vae.analysis.interpolation`.

    Args:
        program: any Program with continuous latents.
        x: pairs of data, ``(from, to)`` with ``(n, *event)`` each, or one tensor ``(2 n, *event)`` whose first half is
            where to start and second half where to end.
        steps: pictures on the way, its two ends included.
        y: what a conditional program is conditioned on along each way, ``(n, ...)``.
        ax: where to draw; a new figure where None.
        path: ``"straight"`` or ``"slerp"``.

    Returns:
        The axes: a row for each pair, between the data themselves in the outermost columns; for points, a path.
    """
    between, way = find_path(path)
    if steps < 2:
        raise UserError(f"interpolations: expected at least 2 steps, got {steps}")
    half = len(x) // 2
    start, end = (x[:half], x[half:]) if isinstance(x, Tensor) else x
    if start.shape != end.shape or len(start) < 1:
        raise UserError(
            f"interpolations: expected pairs of data, got {tuple(start.shape)} to start from and {tuple(end.shape)} to go to"
        )
    shape = tuple(start.shape[1:])
    require_drawable(shape)
    for name, fn in prior_sites(program, None if y is None else y[:1], shape).items():
        if fn.support.is_discrete:
            raise UserError(f"interpolations need continuous latents, and this program's {name!r} is discrete")
    n, t = len(start), torch.linspace(0, 1, steps)
    z_start, z_end = (_by_name(latents.encode(program, ends, y)) for ends in (start, end))
    passed = {name: between(z_start[name], z_end[name], t).flatten(0, 1) for name in z_start}
    z: Any = passed if len(passed) > 1 else next(iter(passed.values()))
    along = None if y is None else y.repeat_interleave(steps, 0)
    means = latents.decode(program, z, along, event_shape=shape).cpu().reshape(n, steps, *shape)
    title = f"Interpolations, {way} in latent space"
    if is_image(shape):
        rows = torch.cat([start.to(means)[:, None], means, end.to(means)[:, None]], 1)
        title = f"{title}, between the data on the left and right"
        return image_grid(rows.flatten(0, 1), steps + 2, ax, title=title, wide_columns=(1, steps + 1))
    if shape == (2,):
        ax = points({"the data": torch.cat([start, end])}, ax, title=title, size=20)
        for line in means.numpy():
            ax.plot(line[:, 0], line[:, 1], ".-", color="0.5", markersize=3, linewidth=0.8, zorder=1)
        return ax
    ax = new_axes(LONG) if ax is None else ax
    for part, vector in zip(t.tolist(), means[0].numpy(), strict=True):
        ax.plot(vector, color=colormaps["viridis"](0.9 * part), linewidth=1.2)[0].set_label(f"t = {part:.2f}")
    legend_beside(ax)
    return finish(ax, f"{title} (the first pair)", name_elements(ax), "value")


@drawn
def manifold(program: Program, num: int = 20, y: Tensor | None = None, ax: Axes | None = None) -> Axes:
    """Draw a two-dimensional latent space: p(x | z)'s mean at a grid of quantiles of the prior.

    z_1 grows to the right and z_2 upwards; every picture stands for the same share of the prior's mass, see
    :mod:`pyro_vae.analysis.manifold`.

    Args:
        program: any Program whose latent, or the uppermost of whose layers, is continuous and of two dimensions; layers below
            are at their means given it.
        num: pictures per axis.
        y: what a conditional program is conditioned on, one row ``(1, ...)``.
        ax: where to draw; a new figure where None.

    Returns:
        The axes.

    Raises:
        UserError: a latent space that is not two-dimensional; the message names its dimension.
    """
    shape = _event_shape(program)
    z = latent_grid(program, num, y).flip(0)
    along = None if y is None else y[:1].expand(num * num, *y.shape[1:])
    first = {next(iter(prior_sites(program, None if y is None else y[:1]))): z.flatten(0, 1)}
    x = latents.decode(program, followed(program, first, along, event_shape=shape), along).cpu()
    title = "Manifold: $z_1$ to the right, $z_2$ upwards, by quantiles of $p(z)$"
    if shape != (2,):
        return _draw(x, shape, ax, title, num)
    if ax is None:
        ax = new_axes(SQUARE)
    lines = x.reshape(num, num, 2).numpy()
    for row, column in zip(lines, lines.swapaxes(0, 1), strict=True):
        ax.plot(row[:, 0], row[:, 1], color="tab:blue", linewidth=0.7)
        ax.plot(column[:, 0], column[:, 1], color="tab:orange", linewidth=0.7)
    ax.plot([], [], color="tab:blue", label="along $z_1$")
    ax.plot([], [], color="tab:orange", label="along $z_2$")
    legend_beside(ax)
    ax.set_aspect("equal", adjustable="datalim")
    return finish(ax, "Manifold: the mean of $p(x \\mid z)$ at quantiles of $p(z)$", "$x_1$", "$x_2$")


@drawn
def training_curves(run: Any, ax: Axes | None = None) -> Axes:
    """Draw minus the training loss, and the validation ELBO where there is one, against the epoch.

    Args:
        run: a :class:`pyro_vae.training.run.Run`, or its list of metrics.
        ax: where to draw; a new figure where None.

    Returns:
        The axes, in nats per datum, higher being better; a dot marks the weights that were kept.
    """
    metrics = list(getattr(run, "metrics", run))
    if not metrics:
        raise UserError("the run has no metrics to draw: train it for an epoch at least")
    ax = new_axes((7.0, 4.5)) if ax is None else ax
    marker = "." if len(metrics) < 20 else None
    trained = [(m["epoch"], -m["train_loss"]) for m in metrics]
    ax.plot(*zip(*trained, strict=True), marker=marker, label="training: minus the loss", color="0.5")
    validated = [(m["epoch"], -m["validation_loss"]) for m in metrics if "validation_loss" in m]
    if validated:
        ax.plot(*zip(*validated, strict=True), marker=marker, label="validation ELBO", color="tab:blue")
        last = metrics[-1].get("kept_epoch", max(validated, key=lambda pair: pair[1])[0])
        best = next(pair for pair in validated if pair[0] == last)
        ax.plot(*best, "o", color="tab:blue", label=f"kept: {best[1]:.2f} in epoch {best[0]}")
    ax.legend(frameon=False, loc="lower right")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    first = len(metrics) // 20 + 1 if len(metrics) > 5 else 0
    # the first epochs lie far below the rest and would flatten it
    shown = [-m[key] for m in metrics[first:] for key in ("train_loss", "validation_loss") if key in m]
    margin = 0.05 * (max(shown) - min(shown)) or 1.0
    ax.set_ylim(min(shown) - margin, max(shown) + margin)
    return finish(ax, None, "epoch", "nats per datum")


def sample_count(shape: tuple[int, ...]) -> int:
    """How many samples make a good picture of data of this shape."""
    return 64 if is_image(shape) else 2000 if shape == (2,) else 10


def _draw(x: Tensor, shape: tuple[int, ...], ax: Axes | None, title: str, ncols: int | None = None) -> Axes:
    """Images, points or curves, by the shape of a datum."""
    if is_image(shape):
        return image_grid(x, ncols, ax, title=title)
    return points({"": x}, ax, title=title) if shape == (2,) else curves({"": x}, ax, title=title)


def _event_shape(program: Any) -> tuple[int, ...]:
    """The shape of a datum, which has to be one that can be drawn."""
    shape = getattr(program, "event_shape", None)
    if shape is None:
        raise UserError(f"{type(program).__name__} does not say the shape of a datum: set program.event_shape")
    require_drawable(tuple(shape))
    return tuple(shape)


def _require_rows(x: Tensor) -> None:
    if len(x) < 1:
        raise UserError("there are no data to draw: expected at least one row")


def _by_name(z: latents.Latents) -> dict[str, Tensor]:
    return z if isinstance(z, dict) else {"z": z}
