"""The guide's means of many data in two dimensions, coloured by their labels.

Principal components (Pearson 1901, https://doi.org/10.1080/14786440109462720) keep distances as far as a plane can; t-SNE
(van der Maaten & Hinton 2008, https://www.jmlr.org/papers/v9/vandermaaten08a.html) keeps neighbours, and neither distances nor
densities: gaps and sizes of its clusters mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor

from pyro_vae.analysis.drawing import drawn, finish, legend_beside, new_figure, plain
from pyro_vae.errors import UserError, nearest
from pyro_vae.evaluation.means import guide_means
from pyro_vae.programs.door import door
from pyro_vae.programs.trace import Program

METHODS = ("pca", "tsne")
MANY_CLASSES = 10  # beyond which labels are a scale of colours, not a legend
PERPLEXITY = 30.0


@door(scored=False, latents="an embedding", records=True)
@drawn
def embedding(
    program: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    label_names: Sequence[str] | None = None,
    method: str = "pca",
    seed: int = 0,
) -> Figure:
    """Draw the guide's means of the data in the plane, coloured by label.

    A latent space of two units is drawn as it is.

    Args:
        program: any Program.
        x: data ``(N, *event)``.
        y: what a conditional program is conditioned on, ``(N, ...)``.
        labels: class numbers ``(N,)`` for the colours.
        label_names: their names, in the order of the numbers.
        method: ``"pca"``, or ``"tsne"`` by scikit-learn, for up to some thousand data.
        seed: of t-SNE.

    Raises:
        UserError: an unknown method, latents of one unit, fewer than three data, labels of another number.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.build("ppca", "linear", (3,), latent_dim=2)
        >>> embedding(vae, torch.randn(50, 3), labels=torch.arange(50) % 2).axes[0].get_xlabel()
        'z[0]'
    """
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}: {nearest(method, METHODS)}")
    if labels is not None and len(labels) != len(x):
        raise UserError(f"expected one label for each of {len(x)} data, got {len(labels)}")
    names, means = guide_means(program, x, y)
    if len(names) < 2 or len(x) < 3:
        raise UserError(f"an embedding needs two units and three data at least, got {len(names)} and {len(x)}")
    points, axis_names = _plane(means.numpy(), names, method, seed)
    figure = new_figure((6.2, 4.8))
    ax = figure.add_subplot()
    _scatter(ax, points, None if labels is None else np.asarray(labels.cpu()), label_names)
    ax.set_aspect("equal", adjustable="datalim")
    finish(ax, "The guide's means of z" + ("" if labels is None else ", by label"), *map(plain, axis_names))
    return figure


def _plane(means: np.ndarray, names: Sequence[str], method: str, seed: int) -> tuple[np.ndarray, tuple[str, str]]:
    """Points ``(N, 2)`` and what their axes are."""
    if len(names) == 2:
        return means, (names[0], names[1])
    if method == "tsne":
        perplexity = min(PERPLEXITY, (len(means) - 1) / 3)
        found = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(means)
        return found, ("t-SNE 1", "t-SNE 2")
    pca = PCA(2, svd_solver="full")
    found = pca.fit_transform(means)
    with np.errstate(invalid="ignore"):  # means that are all the same have no variance to share
        shares = np.nan_to_num(pca.explained_variance_ratio_)
    return found, (f"principal component 1 ({shares[0]:.0%})", f"principal component 2 ({shares[1]:.0%})")


def _scatter(ax: Axes, points: np.ndarray, labels: np.ndarray | None, label_names: Sequence[str] | None) -> None:
    if labels is None:
        ax.scatter(points[:, 0], points[:, 1], s=_size(points), color="tab:blue", linewidths=0, alpha=0.7)
        return
    classes = np.unique(labels)
    if len(classes) > MANY_CLASSES:
        found = ax.scatter(
            points[:, 0], points[:, 1], s=_size(points), c=labels, cmap="viridis", linewidths=0, alpha=0.7
        )
        ax.figure.colorbar(found, ax=ax, label="label")
        return
    for index, label in enumerate(classes.tolist()):
        named = label_names is not None and 0 <= label < len(label_names)
        name = label_names[label] if named and label_names is not None else str(label)
        own = points[labels == label]
        ax.scatter(own[:, 0], own[:, 1], s=_size(points), color=f"C{index}", linewidths=0, alpha=0.8, label=plain(name))
    legend_beside(ax)


def _size(points: np.ndarray) -> float:
    """Larger dots for fewer points."""
    return 8.0 if len(points) > 800 else 20.0
