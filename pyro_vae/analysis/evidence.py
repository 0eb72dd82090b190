"""Pictures of the evidence for a likelihood: the weights' diagnostics, predictive checks, and NLLs with their errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from pyro_vae.analysis.drawing import drawn, finish, new_figure, plain
from pyro_vae.errors import UserError
from pyro_vae.evaluation.compare import Comparison
from pyro_vae.evaluation.result import LogLikelihood

KHAT_RANGE = (-1.0, 2.0)  # k outside of it is drawn at its ends: equal weights have k = -inf
ABREAST = 4  # panels of test quantities
BAND = 1.959964  # standard errors


@drawn
def weight_diagnostics(result: LogLikelihood) -> Figure:
    """Draw how Pareto k and the effective sample size are distributed over the images.

    Vehtari et al. 2024, Pareto smoothed importance sampling, https://arxiv.org/abs/1507.02646.

    Args:
        result: what :func:`pyro_vae.log_likelihood` found.

    Raises:
        UserError: too few samples for Pareto k.
    """
    khat = result.khat[~result.khat.isnan()].numpy()
    if not len(khat):
        if result.num_samples >= 25:
            raise UserError("Pareto k is not known: it cannot judge the weights of discrete latents")
        raise UserError(f"K = {result.num_samples} draws are too few for Pareto k: draw 25 at least")
    figure = new_figure((8.5, 3.4))
    left, right = figure.subplots(1, 2)
    left.hist(khat.clip(*KHAT_RANGE), bins=30, range=KHAT_RANGE, color="tab:blue")
    low, high = float(result.khat_thresholds.min()), float(result.khat_thresholds.max())
    below = f"good below {low:.2f}" if low == high else f"good below {low:.2f} to {high:.2f},\nby an image's draws"
    left.axvspan(low, high, color="tab:red", alpha=0.2, linewidth=0)
    left.axvline(low, color="tab:red", linestyle="--", label=below)
    left.legend(frameon=False, fontsize=9)
    finish(left, None, "Pareto k", "images")
    if result.draws is None:
        right.hist(result.ess.numpy(), bins=30, range=(0, result.num_samples), color="tab:blue")
        finish(right, None, f"effective sample size, of {result.num_samples}", "images")
    else:
        right.hist(result.ess_share.numpy(), bins=30, range=(0, 1), color="tab:blue")
        finish(right, None, "effective sample size, as a share of an image's draws", "images")
    return figure


@drawn
def predictive_intervals(check: xr.Dataset) -> Figure:
    """Draw each test quantity of the data against what the model replicates of it, mean +- 2 standard deviations.

    Gelman, Meng & Stern 1996, https://www3.stat.sinica.edu.tw/statistica/oldpdf/A6n41.pdf.

    Args:
        check: what :func:`pyro_vae.analysis.diagnostics.predictive_check` found.
    """
    names = [str(n) for n in check["quantity"].values]
    width = min(ABREAST, len(names))
    height = -(-len(names) // width)
    figure = new_figure((3.2 * width, 3.4 * height))
    panels = list(figure.subplots(height, width, squeeze=False).flat)
    for ax in panels[len(names) :]:
        ax.set_visible(False)
    for ax, name in zip(panels, names, strict=False):
        part = check.sel(quantity=name)
        observed = part["observed"].values
        ax.errorbar(observed, part["mean"].values, 2 * part["sd"].values, fmt=".", markersize=4, linewidth=0.6)
        ends = [float(observed.min()), float(observed.max())]
        ax.plot(ends, ends, color="0.3", linewidth=1.0, zorder=3)
        finish(ax, plain(name), "T(x) of the data", "T(x) replicated")
    return figure


@drawn
def differences(comparisons: Sequence[Comparison]) -> Figure:
    """Draw what each program has over the one that it is compared with: 95 % intervals, and a dot for each seed.

    Args:
        comparisons: with one baseline, the second of their names.
    """
    figure = new_figure((6.2, 1.1 + 0.35 * len(comparisons)))
    ax = figure.add_subplot()
    at = np.arange(len(comparisons))[::-1]
    for place, one in zip(at, comparisons, strict=True):
        low, high = np.nan_to_num(one.interval, nan=one.mean)
        ax.plot([low, high], [place, place], color="tab:blue", linewidth=1.5)
        ax.plot([one.mean], [place], "o", color="tab:blue", markersize=6)
        if one.by_seed is not None and len(one.by_seed) > 1:
            ax.plot(one.by_seed.numpy(), [place - 0.22] * len(one.by_seed), ".", color="0.5", markersize=5)
    ax.axvline(0.0, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
    ax.set_yticks(at, [plain(one.names[0]) for one in comparisons])
    ax.set_ylim(-0.6, len(comparisons) - 0.4)
    against = plain(comparisons[0].names[1])
    finish(ax, None, f"log p(x) less that of {against}\n(nats per datum, higher is better)", "")
    return figure


@drawn
def nll_intervals(results: Mapping[str, LogLikelihood]) -> Figure:
    """Draw the NLL of several programs, +- 1.96 errors: over images and samples (thin), and over samples alone (thick).

    Args:
        results: by name, on the same images.
    """
    figure = new_figure((6.2, 0.9 + 0.45 * len(results)))
    ax = figure.add_subplot()
    at = np.arange(len(results))[::-1]
    nll = np.array([r.nll for r in results.values()])
    for size, errors in (
        (1.0, [r.nll_data_se for r in results.values()]),
        (4.0, [r.nll_mc_se for r in results.values()]),
    ):
        half = BAND * np.nan_to_num(errors, posinf=0.0)
        ax.errorbar(nll, at, xerr=half, fmt="o", color="tab:blue", markersize=5, elinewidth=size)
    ax.set_yticks(at, [plain(name) for name in results])
    ax.margins(y=0.3)
    finish(ax, None, "NLL (nats per image), lower is better", "")
    return figure
