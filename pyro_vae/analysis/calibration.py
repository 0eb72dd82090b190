"""Simulation-based calibration of a guide over the model's own draws.

    z* ~ p(z),  x ~ p(x | z*),  z_1 ... z_L ~ q(z | x):   the rank of z* among the z_l is uniform on 0 ... L if q(z |
    x) = p(z | x)

Talts, Betancourt, Simpson, Vehtari & Gelman 2018, https://arxiv.org/abs/1804.06788. Each latent is ranked, and log
p(x | z) as well, which a guide that ignores x does not pass (Modrák et al. 2023, https://arxiv.org/abs/2211.02383).
Uniformity is tested by the largest excursion of the ECDF of the ranks (Säilynoja, Bürkner & Vehtari 2022,
https://arxiv.org/abs/2103.10522).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import scipy.stats
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pyro_vae.analysis.drawing import drawn
from pyro_vae.analysis.scoring import Arrays, draw_from_guide, score
from pyro_vae.errors import UserError
from pyro_vae.programs.door import door
from pyro_vae.programs.latents import decode, sample_latents
from pyro_vae.programs.trace import OBSERVED, Program
from pyro_vae.programs.walk import Walk, at_once, spans
from pyro_vae.seeding import derive_seed

SIMULATIONS = 10_000  # of uniform ranks, from which the test's p-values and the bands are taken
DATA_QUANTITY = "log_likelihood"


@dataclass(frozen=True, eq=False)
class Calibration:
    """Ranks and what they say.

    Attributes:
        ranks: ``(simulation, quantity)``, whole numbers from 0 to ``num_draws``.
        num_draws: L.
        p_value: of uniformity, per quantity, by the ECDF's largest excursion.
        chi2_p_value: of uniformity, by the chi-square statistic of the rank histogram.
        seed: of the draws.
    """

    ranks: xr.DataArray
    num_draws: int
    p_value: xr.DataArray
    chi2_p_value: xr.DataArray
    seed: int

    @property
    def family_p_value(self) -> float:
        """The smallest p-value of all quantities, times their number (Bonferroni), at most 1."""
        return min(1.0, float(self.p_value.min()) * self.p_value.size)

    def passes(self, level: float = 0.01) -> bool:
        """Whether calibration is not rejected: an exact guide fails with a probability of at most ``level``."""
        return self.family_p_value > level

    @property
    def tree(self) -> xr.DataTree:
        """The normalised ranks in the group ``prior_sbc``, as ``arviz_plots.plot_ecdf_pit`` takes them."""
        random = np.random.default_rng(derive_seed("calibration: jitter", self.seed))
        pit = (self.ranks + random.uniform(size=self.ranks.shape)) / (self.num_draws + 1)
        pit = pit.rename(simulation="draw").expand_dims("chain").assign_coords(chain=[0])
        return xr.DataTree.from_dict({"prior_sbc": pit.to_dataset(dim="quantity")})

    @drawn
    def plot_ecdf(self, level: float = 0.01, *, columns: int = 4) -> Figure:
        """Draw the ECDF of the ranks minus the uniform one, with the band that an exact guide leaves with probability ``level``.

        The band is simultaneous over ranks, for one quantity at a time.
        """
        counts = self.counts()
        z = np.arange(1, self.num_draws + 1) / (self.num_draws + 1)
        low, high = band(len(self.ranks), self.num_draws, level)

        def draw(ax: Axes, index: int) -> None:
            ax.fill_between(z, low - z, high - z, step="mid", color="0.88", linewidth=0)
            ax.step(z, counts[:, index] / len(self.ranks) - z, where="mid", color="tab:blue", linewidth=1.2)

        return self._panels(draw, columns, "rank / L", "ECDF difference")

    @drawn
    def plot_ranks(self, level: float = 0.01, *, bins: int | None = None, columns: int = 4) -> Figure:
        """Draw the histogram of the ranks, with the band that one bar leaves with probability ``level`` under an exact guide."""
        bins = _num_bins(self.num_draws, len(self.ranks)) if bins is None else bins
        edges = np.linspace(-0.5, self.num_draws + 0.5, bins + 1)
        low, high = scipy.stats.binom.ppf([level / 2, 1 - level / 2], len(self.ranks), 1 / bins)

        def draw(ax: Axes, index: int) -> None:
            ax.axhspan(low, high, color="0.88", linewidth=0)
            ax.hist(self.ranks.values[:, index], bins=list(edges), color="tab:blue", alpha=0.8)

        return self._panels(draw, columns, "rank", "simulations")

    def counts(self) -> np.ndarray:
        """How many ranks lie below r, for r = 1 ... L: ``(num_draws, quantity)``."""
        return _cumulative(self.ranks.values, self.num_draws)

    def _panels(self, draw: Callable[[Axes, int], None], columns: int, xlabel: str, ylabel: str) -> Figure:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        names = [str(n) for n in self.ranks["quantity"].values]
        columns = min(columns, len(names))
        rows = -(-len(names) // columns)
        figure = Figure(figsize=(2.8 * columns, 2.2 * rows), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for index, ax in enumerate(axes.flat):
            ax.set_visible(index < len(names))
            if index < len(names):
                draw(ax, index)
                ax.set_title(f"{names[index]}: p = {float(self.p_value[index]):.2g}", fontsize=9)
                ax.spines[["top", "right"]].set_visible(False)
        figure.supxlabel(xlabel, fontsize=10)
        figure.supylabel(ylabel, fontsize=10)
        return figure

    def __str__(self) -> str:
        worst = str(self.p_value["quantity"].values[int(self.p_value.values.argmin())])
        return (
            f"{len(self.ranks)} simulations, {self.num_draws} draws each, {self.p_value.size} quantities: family-wise p = "
            f"{self.family_p_value:.2g} (smallest at {worst})"
        )

    def __repr__(self) -> str:
        return f"<Calibration: {self}>"


@door(data=False, joint="simulation-based calibration")
def sbc(
    program: Program,
    num_simulations: int = 500,
    num_draws: int = 99,
    y: Tensor | None = None,
    *,
    seed: int = 0,
    event_shape: Any = None,
    progress: Callable[[int], None] | None = None,
) -> Calibration:
    """Rank the model's own latents among the guide's draws.

    Args:
        program: any Program.
        num_simulations: data that are simulated.
        num_draws: L, draws from the guide for each.
        y: what a conditional program is conditioned on, ``(num_simulations, ...)``.
        seed: of everything drawn.
        event_shape: of one datum, where the program does not say it as ``program.event_shape``.
        progress: called with the number of simulations after every block.

    Returns:
        The ranks, with tests of their uniformity. Power grows with ``num_simulations``; 500 find a scale that is
        wrong by a factor of 0.7 almost surely.

    Raises:
        UserError: too few simulations; a model with a ``pyro.factor``, whose draws of p(z) p(x | z) are none of the joint
            density: an exact guide would be rejected.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.build("ppca", "linear", (3,), latent_dim=2)
        >>> sbc(vae, 50).ranks.sizes["quantity"]
        3
    """
    if num_simulations < 10 or num_draws < 1:
        raise UserError(f"expected at least 10 simulations of at least 1 draw, got {num_simulations} of {num_draws}")
    truth = sample_latents(
        program, num_simulations, y, event_shape=event_shape, seed=derive_seed("calibration: latents", seed)
    )
    x = decode(program, truth, y, mean=False, event_shape=event_shape, seed=derive_seed("calibration: data", seed))
    found = _ranked(program, x, y, truth, num_draws, seed, progress)
    names = [
        f"{n}[{', '.join(map(str, i))}]" if v.ndim > 1 else n
        for n, v in _events(truth)
        for i in np.ndindex(*v.shape[1:])
    ]
    labels = {"quantity": [*names, DATA_QUANTITY]}
    array = xr.DataArray(found, dims=("simulation", "quantity"), coords=labels, name="rank")
    p_value = xr.DataArray(_ecdf_p_values(found, num_draws), dims="quantity", coords=labels)
    chi2 = xr.DataArray(_chi2_p_values(found, num_draws), dims="quantity", coords=labels)
    return Calibration(array, num_draws, p_value, chi2, seed)


@door(scored=False)
def _ranked(
    program: Program,
    x: Tensor,
    y: Tensor | None,
    truth: dict[str, Tensor],
    num_draws: int,
    seed: int,
    progress: Callable[[int], None] | None,
) -> np.ndarray:
    """The ranks of simulated latents ``(N, *latent)`` by site among the guide's draws, ``(N, quantities)``."""
    walk = Walk(program, x, y, rows=at_once("calibration", num_draws), progress=progress)
    for block in walk:
        with block:
            guide_seed = derive_seed("calibration: guide", seed, block.first)
            drawn = draw_from_guide(program, block.x, block.y, num_draws, guide_seed)
            true = {n: v[block.rows].unsqueeze(0).cpu().numpy() for n, v in truth.items()}
            ours, theirs = (
                found["posterior"] | {DATA_QUANTITY: found["log_likelihood"][OBSERVED]}
                for found in (score(program, block.x, block.y, true), drawn)
            )
            walk.keep(_ranks(ours, theirs, derive_seed("calibration: ties", seed, block.first)))
    return np.concatenate(walk.gathered())


def _events(truth: dict[str, Tensor]) -> list[tuple[str, np.ndarray]]:
    return [(n, v.cpu().numpy()) for n, v in truth.items()]


def _ranks(true: Arrays, values: Arrays, seed: int) -> np.ndarray:
    """How many of the draws ``(L, batch, ...)`` lie below the truth ``(1, batch, ...)``; ties are broken at random."""
    random = np.random.default_rng(seed)
    columns = []
    for name, draws in values.items():
        at = true[name]
        below, equal = (draws < at).sum(0), (draws == at).sum(0)
        columns.append((below + random.integers(0, equal + 1)).reshape(draws.shape[1], -1))
    return np.concatenate(columns, 1)


def _cumulative(ranks: np.ndarray, num_draws: int) -> np.ndarray:
    """How many of the ranks ``(N, ...)`` lie below r, for r = 1 ... L: ``(L, ...)``."""
    flat = ranks.reshape(len(ranks), -1)
    counts = np.stack([np.bincount(column, minlength=num_draws + 1) for column in flat.T], 1)
    cumulative: np.ndarray = counts.cumsum(0)[:-1].reshape(num_draws, *ranks.shape[1:])
    return cumulative


def _tails(num_simulations: int, num_draws: int) -> np.ndarray:
    """Twice the smaller tail probability of every count at every r, ``(num_draws, num_simulations + 1)``."""
    z = np.arange(1, num_draws + 1)[:, None] / (num_draws + 1)
    counts = np.arange(num_simulations + 1)[None]
    below = scipy.stats.binom.cdf(counts, num_simulations, z)
    above = scipy.stats.binom.sf(counts - 1, num_simulations, z)
    tails: np.ndarray = 2 * np.minimum(below, above)
    return tails


@cache
def _null(num_simulations: int, num_draws: int) -> np.ndarray:
    """The smallest tail probability over r of uniform ranks, simulated and sorted."""
    random = np.random.default_rng(derive_seed("calibration: uniform ranks", num_simulations, num_draws))
    tails, found = _tails(num_simulations, num_draws), np.empty(SIMULATIONS)
    for span in spans(SIMULATIONS, at_once("uniform ranks", num_simulations)):
        ranks = random.integers(0, num_draws + 1, (num_simulations, span.stop - span.start))
        found[span] = _smallest(tails, _cumulative(ranks, num_draws))
    return np.sort(found)


def _smallest(tails: np.ndarray, counts: np.ndarray) -> np.ndarray:
    smallest: np.ndarray = np.take_along_axis(tails, counts, 1).min(0)
    return smallest


def _ecdf_p_values(ranks: np.ndarray, num_draws: int) -> np.ndarray:
    """Exact Monte Carlo p-values (1 + #{null <= observed}) / (1 + #null) per column."""
    observed = _smallest(_tails(len(ranks), num_draws), _cumulative(ranks, num_draws))
    null = _null(len(ranks), num_draws)
    p_values: np.ndarray = (1 + np.searchsorted(null, observed, side="right")) / (1 + len(null))
    return p_values


def band(num_simulations: int, num_draws: int, level: float) -> tuple[np.ndarray, np.ndarray]:
    """The ECDFs at r = 1 ... L that uniform ranks leave anywhere with probability ``level``."""
    pointwise = float(np.quantile(_null(num_simulations, num_draws), level))
    z = np.arange(1, num_draws + 1) / (num_draws + 1)
    low, high = (scipy.stats.binom.ppf(q, num_simulations, z) for q in (pointwise / 2, 1 - pointwise / 2))
    return low / num_simulations, high / num_simulations


def _num_bins(num_draws: int, num_simulations: int) -> int:
    """The most bins, of equally many ranks each, that expect 15 simulations or more; at most 25."""
    fitting = [b for b in range(1, 26) if (num_draws + 1) % b == 0 and num_simulations / b >= 15]
    return max(fitting, default=1)


def _chi2_p_values(ranks: np.ndarray, num_draws: int) -> np.ndarray:
    bins = _num_bins(num_draws, len(ranks))
    which = ranks * bins // (num_draws + 1)
    counts = np.stack([np.bincount(column, minlength=bins) for column in which.T], 1)
    p_values: np.ndarray = np.atleast_1d(scipy.stats.chisquare(counts, axis=0).pvalue)
    return p_values
