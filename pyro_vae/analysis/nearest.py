"""Samples beside the training data they are nearest to: has the model learned a density, or its training set by heart?

Nearest by Euclidean distance between data, which is blind to a shift by a pixel: a sample far from every training datum may
still be a copy. Theis, van den Oord & Bethge 2016, A note on the evaluation of generative models,
https://arxiv.org/abs/1511.01844, section 3.2.
"""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from pyro_vae.analysis.drawing import (
    curves,
    drawn,
    image_grid,
    is_image,
    new_axes,
    new_figure,
    points,
    require_drawable,
)
from pyro_vae.analysis.scoring import host
from pyro_vae.errors import UserError
from pyro_vae.programs.given import require_rows

COLUMNS = 10


def nearest_neighbours(x: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of x the nearest row of the training data, and the Euclidean distance to it, ``(n,)`` each.

    Args:
        x: ``(n, *event)``.
        train: ``(N, *event)``.

    Example:
        >>> nearest_neighbours(torch.tensor([[0.0], [2.0]]), torch.tensor([[2.5], [0.5]]))[0].tolist()
        [1, 0]
    """
    for data in (x, train):
        require_rows(data)
    if x.shape[1:] != train.shape[1:] or len(x) < 1 or len(train) < 1:
        raise UserError(f"expected data of one shape, got {tuple(x.shape)} and training data {tuple(train.shape)}")
    if bool(train.isnan().any()) or bool(x.isnan().any()):
        raise UserError("the data have missing entries, with which no distance is defined")
    search = NearestNeighbors(n_neighbors=1).fit(host(train.flatten(1)))
    distance, index = search.kneighbors(host(x.flatten(1)))
    return torch.from_numpy(index[:, 0]), torch.from_numpy(distance[:, 0])


@drawn
def nearest_training(x: Tensor, train: Tensor) -> Figure:
    """Draw samples above the training data nearest to them.

    Args:
        x: samples ``(n, *event)``, as :func:`pyro_vae.sample` draws them.
        train: training data ``(N, *event)``, as the program sees them.

    Returns:
        The figure: pairs of rows of images; points joined to theirs; vectors as solid and broken curves.

    Example:
        >>> len(nearest_training(torch.rand(4, 1, 5, 5), torch.rand(9, 1, 5, 5)).axes)
        1
    """
    for data in (x, train):
        require_rows(data)
    shape = tuple(x.shape[1:])
    require_drawable(shape)
    near = train[nearest_neighbours(x, train)[0]]
    sets = {name: torch.from_numpy(host(t)) for name, t in (("samples", x), ("nearest training data", near))}
    if not is_image(shape):
        figure = new_figure((8.5, 4.5))
        ax = figure.add_subplot()
        if shape == (2,):
            points(sets, ax, joined=True)
        else:
            curves(sets, ax)
        return figure
    columns = min(COLUMNS, len(x))
    kept = len(x) - len(x) % columns
    rows = torch.stack([t[:kept].float().reshape(-1, columns, *shape) for t in sets.values()], 1).flatten(0, 2)
    ax = new_axes((8.5, 0.85 * len(rows) / columns * max(1.0, shape[-2] / shape[-1])))
    image_grid(rows, columns, ax, wide_rows=range(2, len(rows) // columns, 2))
    return ax.figure  # type: ignore[return-value]
