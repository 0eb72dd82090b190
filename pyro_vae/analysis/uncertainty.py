"""Reconstructions with what the posterior leaves open about them, pixel by pixel.

    sd_q(E[x_d | z]),   z ~ q(z | x)

The spread over z of the decoder's mean: what is not known of the noiseless datum, given this one and the model. It is no
larger than the guide is wide: a guide that is too narrow shows too little.
Kendall & Gal 2017, What uncertainties do we need, https://arxiv.org/abs/1703.04977 (epistemic against aleatoric).
"""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from pyro_vae.analysis.drawing import (
    drawn,
    finish,
    image_grid,
    is_image,
    legend_beside,
    name_elements,
    new_figure,
    require_drawable,
)
from pyro_vae.analysis.scoring import host
from pyro_vae.errors import UserError
from pyro_vae.programs.door import door
from pyro_vae.programs.latents import reconstruct
from pyro_vae.programs.trace import Program, y_to_program

MAP = "magma"
CURVES = 3  # vectors that are drawn, one panel each


@door(scored=False)
@drawn
def reconstruction_uncertainty(
    program: Program, x: Tensor, y: Tensor | None = None, *, num_samples: int = 100, seed: int = 0
) -> Figure:
    """Draw data, the mean of their reconstructions over q(z | x), and the standard deviation of these.

    Args:
        program: any Program.
        x: data ``(n, *event)``, up to ten images; of vectors the first three are drawn.
        y: what a conditional program is conditioned on, ``(n, ...)``.
        num_samples: draws of z per datum.
        seed: of the draws.

    Returns:
        The figure: three rows of images with a scale for the last (mean over channels), or vectors with a band of +- 2
        standard deviations, or points with crosses of that size; in the units of x.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.build("ppca", "linear", (5,), latent_dim=2)
        >>> len(reconstruction_uncertainty(vae, torch.randn(3, 5)).axes)
        3
    """
    shape = tuple(x.shape[1:])
    require_drawable(shape)
    if len(x) < 1 or num_samples < 2:
        raise UserError(f"expected a datum and two draws at least, got {len(x)} and num_samples = {num_samples}")
    y = y_to_program(program, y)
    draws = reconstruct(program, x, y, num_samples=num_samples, seed=seed).cpu().double()
    mean, sd, data = draws.mean(0).numpy(), draws.std(0).numpy(), host(x)
    if is_image(shape):
        return _images(data, mean, sd)
    return _points(data, mean, sd) if shape == (2,) else _curves(data, mean, sd)


def _images(data: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> Figure:
    sd = sd.mean(1) if sd.ndim == 4 else sd
    scale = Normalize(0.0, float(sd.max()) or 1.0)
    coloured = np.moveaxis(colormaps[MAP](scale(sd))[..., :3], -1, 1)
    width = min(8.5, 2.5 + 0.9 * len(data))
    figure = new_figure((width, 0.5 + 3 * (width - 1.2) / len(data) * data.shape[-2] / data.shape[-1]))
    rows = figure.subplots(3, 1)
    for ax, name, images in zip(rows, ("data", "mean", "sd"), (data, mean, coloured), strict=True):
        image_grid(images, len(images), ax)
        ax.text(-0.01, 0.5, name, transform=ax.transAxes, ha="right", va="center", fontsize=9)
    figure.colorbar(ScalarMappable(scale, MAP), ax=list(rows), shrink=0.8, label="posterior sd of the mean")
    return figure


def _points(data: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> Figure:
    figure = new_figure((7.2, 5.4))
    ax = figure.add_subplot()
    ax.scatter(data[:, 0], data[:, 1], s=10, color="0.6", linewidths=0, label="data")
    ax.errorbar(
        mean[:, 0], mean[:, 1], xerr=2 * sd[:, 0], yerr=2 * sd[:, 1], fmt=".", linewidth=0.8, label="mean ± 2 sd"
    )
    legend_beside(ax)
    finish(ax, None, "$x_1$", "$x_2$")
    return figure


def _curves(data: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> Figure:
    count = min(CURVES, len(data))
    figure = new_figure((8.5, 0.4 + 2.0 * count))
    at, along = np.arange(data.shape[1]), ""
    data, mean, sd = (a.reshape(*a.shape[:2], -1) for a in (data, mean, sd))  # of series, with their channels
    for row, ax in enumerate(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]):
        for m, s, d in zip(mean[row].T, sd[row].T, data[row].T, strict=True):
            first = ax.get_legend_handles_labels()[1] == []
            ax.fill_between(at, m - 2 * s, m + 2 * s, color="tab:blue", alpha=0.25, linewidth=0)
            ax.plot(at, m, color="tab:blue", linewidth=1.2, label="mean ± 2 sd" if first else None)
            ax.plot(at, d, ".", color="0.3", markersize=4, label="data" if first else None)
        along = name_elements(ax)
        ax.spines[["top", "right"]].set_visible(False)
    legend_beside(figure.axes[0])
    figure.supxlabel(along, fontsize=10)
    figure.supylabel("value", fontsize=10)
    return figure
