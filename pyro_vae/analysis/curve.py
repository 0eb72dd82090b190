"""A picture of the importance-weighted bound against the number of samples: has it levelled off, and at what?

It is handed what :func:`pyro_vae.bound_curve` found, and estimates by other methods to hold it against::

    bound_against_samples(pv.bound_curve(run.program, x), levels={"AIS": pv.annealed_log_likelihood(run.program, x)})
"""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator

from pyro_vae.analysis.drawing import drawn, finish, legend_beside, new_axes
from pyro_vae.errors import UserError
from pyro_vae.evaluation.compare import corrected
from pyro_vae.evaluation.curve import BoundCurve
from pyro_vae.evaluation.result import LogLikelihood

LEVEL = 1.959964  # standard errors on either side of a 95 % band
INCHES = (8.0, 4.5)
LINES = ("--", ":", "-.")
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")


@drawn
def bound_against_samples(
    curves: BoundCurve | Mapping[str, BoundCurve],
    ax: Axes | None = None,
    *,
    levels: Mapping[str, LogLikelihood] | None = None,
) -> Axes:
    """Draw the mean bound L_K against K, with a band of 95 % over redrawn samples, the images fixed.

    L_1 is the ELBO; a bound that still rises at its last K is not log p(x). Where weights have no variance to speak of
    (Pareto k above the threshold), the band is too narrow, and a curve may seem level far below log p(x).

    Args:
        curves: of :func:`pyro_vae.bound_curve`; several by name, on the same images.
        ax: where to draw; a new figure where None.
        levels: estimates of log p(x) of the same images by name, bias-corrected, each a horizontal line with its 95 % band.

    Returns:
        The axes, in nats per image, higher being better; K on a logarithmic axis.

    Raises:
        UserError: nothing to draw, or curves and levels of different numbers of images.

    Example:
        >>> import torch
        >>> from pyro_vae.evaluation.curve import curve
        >>> bound_against_samples(curve(torch.randn(100, 3))).get_xscale()
        'log'
    """
    named = {"importance weighting": curves} if isinstance(curves, BoundCurve) else dict(curves)
    levels = dict(levels or {})
    if not named:
        raise UserError("there is no curve to draw: expected one of pv.bound_curve at least")
    counts = {name: found.bound.shape[1] for name, found in named.items()}
    counts |= {name: len(level) for name, level in levels.items()}
    if len(set(counts.values())) > 1:
        raise UserError(f"expected curves and levels of the same images, got {counts}: evaluate them on one x")
    ax = new_axes(INCHES) if ax is None else ax
    for i, (name, found) in enumerate(named.items()):
        k, mean, half = found.num_samples.numpy(), found.mean.numpy(), LEVEL * found.mean_se.numpy()
        colour = COLOURS[i % len(COLOURS)]
        ax.fill_between(k, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
        ax.plot(k, mean, ".-", color=colour, label=name)
    for i, (name, level) in enumerate(levels.items()):
        height, error = float(corrected(level).mean()), LEVEL * level.nll_mc_se
        ax.axhspan(height - error, height + error, color="0.3", alpha=0.15, linewidth=0)
        ax.axhline(height, color="0.3", linestyle=LINES[i % len(LINES)], linewidth=1.2, label=name)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(10))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    legend_beside(ax)
    return finish(ax, "The bound $L_K$ against $K$ ($L_1$ is the ELBO)", "samples per image, $K$", "nats per image")
