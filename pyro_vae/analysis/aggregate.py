"""The aggregate posterior against the prior, and the rate of each unit.

    q(z) = E_x q(z | x)    against    p(z)

Where the two differ, samples of the prior fall where no datum is encoded, and the rate pays KL(q(z) || p(z)) for nothing.
Hoffman & Johnson 2016, ELBO surgery, http://approximateinference.org/accepted/HoffmanJohnson2016.pdf.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from torch import Tensor

from pyro_vae.analysis.drawing import drawn, finish, new_figure, plain
from pyro_vae.errors import UserError
from pyro_vae.evaluation.information import LatentInformation
from pyro_vae.evaluation.means import flat, unit_names
from pyro_vae.programs.door import door
from pyro_vae.programs.latents import encoded_sites, sample_latents
from pyro_vae.programs.trace import Program, y_to_program

NAMES = {"prior $p(z)$": "0.6", "aggregate posterior $q(z)$": "tab:blue"}
LABELLED_UNITS = 30  # beyond which the names of the units are left out


@door(scored=False, latents="an aggregate posterior")
@drawn
def aggregate_posterior(program: Program, x: Tensor, y: Tensor | None = None, *, seed: int = 0) -> Figure:
    """Draw one z of q(z | x) for every datum, and as many of the prior: in the plane, and unit by unit.

    Args:
        program: any Program.
        x: data ``(N, *event)``, some hundred.
        y: what a conditional program is conditioned on, ``(N, ...)``.
        seed: of the draws.

    Returns:
        The figure: on the left both sets of draws, in the first two principal components of the two together (as they are
        where there are two units, as histograms where there is one); on the right mean +- standard deviation of every unit.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.build("ppca", "linear", (3,), latent_dim=2)
        >>> len(aggregate_posterior(vae, torch.randn(50, 3)).axes)
        2
    """
    if len(x) < 3:
        raise UserError(f"an aggregate posterior needs three data at least, got {len(x)}")
    y = y_to_program(program, y)
    prior = sample_latents(program, len(x), y, event_shape=tuple(x.shape[1:]), seed=seed)
    drawn = encoded_sites(program, x, y, num_samples=1, seed=seed + 1)
    ours = {n: drawn[n].expand(1, *v.shape)[0] for n, v in prior.items()}
    sets = dict(zip(NAMES, (flat(prior).numpy(), flat(ours).numpy()), strict=True))
    figure = new_figure((9.0, 4.4))
    left, right = figure.subplots(1, 2)
    _draws(left, sets, unit_names(ours))
    _units(right, sets, unit_names(ours))
    figure.suptitle("Aggregate posterior and prior", fontsize=11)
    return figure


@drawn
def unit_rates(information: LatentInformation) -> Figure:
    """Draw the rate of each unit, largest first; units that are not active are grey.

    Where the units' KL is not known (flows), the variance of the guide's mean is drawn in its place.

    Args:
        information: what :func:`pyro_vae.latent_information` found.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.build("ppca", "linear", (3,), latent_dim=2)
        >>> unit_rates(pv.latent_information(vae, torch.randn(50, 3))).axes[0].get_ylabel()
        'KL per unit (nats)'
    """
    known = information.kl is not None
    values = information.kl if information.kl is not None else information.mean_variance
    order = values.argsort(descending=True).tolist()
    figure = new_figure((6.2, 3.6))
    ax = figure.add_subplot()
    active, collapsed = information.active.tolist(), set(information.collapsed)
    groups = (
        ("active", "tab:blue", lambda unit: active[unit]),
        ("collapsed", "0.7", lambda unit: information.names[unit] in collapsed),
        ("without a mean", "tab:green", lambda unit: bool(information.mean_variance[unit].isnan())),
    )
    for label, colour, chosen in groups:
        rows = [i for i, unit in enumerate(order) if chosen(unit)]
        if rows:
            ax.bar(rows, [float(values[order[i]]) for i in rows], color=colour, label=f"{label}: {len(rows)}")
    _name_ticks(ax, [information.names[unit] for unit in order])
    ax.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)
    finish(ax, None, "unit, largest first", "KL per unit (nats)" if known else "variance of the guide's mean")
    return figure


def _draws(ax: Axes, sets: dict[str, np.ndarray], names: tuple[str, ...]) -> None:
    both = np.concatenate(list(sets.values()))
    if len(names) == 1:
        edges = np.histogram_bin_edges(both[:, 0], 40)
        for name, z in sets.items():
            ax.hist(z[:, 0], bins=list(edges), density=True, color=NAMES[name], alpha=0.6, label=name)
        finish(ax, None, plain(names[0]), "density")
    else:
        pca = PCA(2, svd_solver="full").fit(both) if len(names) > 2 else None
        for name, z in sets.items():
            at = z if pca is None else pca.transform(z)
            ax.scatter(at[:, 0], at[:, 1], s=8, color=NAMES[name], alpha=0.6, linewidths=0, label=name)
        axes = names if pca is None else ("principal component 1", "principal component 2")
        finish(ax, None, *map(plain, axes))
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=9, ncols=2)


def _units(ax: Axes, sets: dict[str, np.ndarray], names: tuple[str, ...]) -> None:
    for shift, (name, z) in zip((-0.15, 0.15), sets.items(), strict=True):
        at = np.arange(len(names)) + shift
        ax.errorbar(at, z.mean(0), z.std(0), fmt=".", color=NAMES[name], linewidth=1.0, markersize=4)
    _name_ticks(ax, list(names))
    finish(ax, None, "unit", "mean ± standard deviation")


def _name_ticks(ax: Axes, names: list[str]) -> None:
    if len(names) <= LABELLED_UNITS:
        ax.set_xticks(range(len(names)), [plain(n) for n in names], rotation=60 if len(names) > 8 else 0, fontsize=8)
