"""How several runs were trained, on the same axes; and the two parts of the ELBO of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pyro_vae.analysis.drawing import drawn, finish, new_figure, plain
from pyro_vae.errors import UserError

INCHES = (6.2, 3.8)
FIRST = 20  # the first twentieth of the epochs lies far below the rest and would flatten it


@drawn
def overlaid_curves(runs: Mapping[str, Any]) -> Figure:
    """Draw the validation ELBO of several runs against the epoch, or minus the training loss of those that have none.

    Args:
        runs: :class:`pyro_vae.training.run.Run` objects, or their lists of metrics, by name.

    Returns:
        The figure, in nats per datum, higher being better.

    Example:
        >>> metrics = [{"epoch": 1, "train_loss": 3.0}, {"epoch": 2, "train_loss": 2.0}]
        >>> len(overlaid_curves({"a": metrics}).axes[0].get_lines())
        1
    """
    if not runs:
        raise UserError("there are no runs to draw: expected one at least")
    figure = new_figure(INCHES)
    ax = figure.add_subplot()
    shown = []
    for index, (name, run) in enumerate(runs.items()):
        metrics = list(getattr(run, "metrics", run))
        key = "validation_loss" if any("validation_loss" in m for m in metrics) else "train_loss"
        found = [(m["epoch"], -m[key]) for m in metrics if key in m]
        label = plain(name) + ("" if key == "validation_loss" else ": minus the training loss")
        ax.plot(*zip(*found, strict=True), color=f"C{index % 10}", linewidth=1.2, label=label)
        shown += [value for _, value in found[len(found) // FIRST :]]
    margin = 0.05 * (max(shown) - min(shown)) or 1.0
    ax.set_ylim(min(shown) - margin, max(shown) + margin)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False, loc="lower right", fontsize=8)
    finish(ax, "Validation ELBO", "epoch", "nats per datum")
    return figure


@drawn
def elbo_parts(run: Any) -> Figure:
    """Draw distortion (minus the reconstruction term) and rate (the KL) on validation data against the epoch.

    Args:
        run: a :class:`pyro_vae.training.run.Run`, or its list of metrics.

    Raises:
        UserError: a run without validation data.
    """
    metrics = [m for m in getattr(run, "metrics", run) if {"validation_reconstruction", "validation_kl"} <= set(m)]
    if not metrics:
        raise UserError("the run has no validation figures: train with --validation")
    figure = new_figure(INCHES)
    ax = figure.add_subplot()
    epochs = [m["epoch"] for m in metrics]
    ax.plot(
        epochs,
        [-m["validation_reconstruction"] for m in metrics],
        color="tab:blue",
        label="distortion, -E log p(x | z)",
    )
    ax.plot(epochs, [m["validation_kl"] for m in metrics], color="tab:orange", label="rate, KL(q || p)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylim(bottom=0 if min(-m["validation_reconstruction"] for m in metrics) > 0 else None)
    ax.legend(frameon=False)
    finish(ax, "The two parts of minus the validation ELBO", "epoch", "nats per datum")
    return figure
