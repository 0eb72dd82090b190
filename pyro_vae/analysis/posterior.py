"""The posterior of each image's latents, as ArviZ takes it.

    p(z | x) = p(z) p(x | z) / p(x)

by the guide q(z | x); by the guide's draws resampled with smoothed weights p(x, z) / q(z | x) (Vehtari et al. 2024,
https://arxiv.org/abs/1507.02646); by NUTS or HMC; and, beside it, the prior.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_vae import __version__
from pyro_vae.analysis.convergence import Convergence
from pyro_vae.analysis.mcmc import sample_chains
from pyro_vae.analysis.resampling import resampled
from pyro_vae.analysis.schema import Tree, data_name, event_dims, require_names
from pyro_vae.analysis.scoring import (
    Arrays,
    Groups,
    concatenated,
    draw_from_guide,
    draw_from_prior,
    host,
    predict,
    score,
)
from pyro_vae.errors import UserError, nearest, warn
from pyro_vae.evaluation.blind import discrete_sites, point_masses, require_weights
from pyro_vae.evaluation.estimators import Estimate, estimate, good_khat
from pyro_vae.evaluation.every_row import narrow_sites
from pyro_vae.evaluation.interval import FEWEST
from pyro_vae.evaluation.proven import blind_spots
from pyro_vae.evaluation.result import BAD_FRACTION, UnreliableEstimateWarning
from pyro_vae.programs.columns import layout_of, nothing_present
from pyro_vae.programs.contract import require_latents
from pyro_vae.programs.door import admitted, door
from pyro_vae.programs.given import require_rows
from pyro_vae.programs.summing import few_states
from pyro_vae.programs.trace import OBSERVED, Program, Traces, to_program, y_to_program
from pyro_vae.programs.walk import Block, Walk, at_once
from pyro_vae.seeding import derive_seed

SOURCES = ("guide", "psis", "nuts", "hmc", "prior")
PREDICTIVE = ("draws", "mean", "none")
MARGINAL = f"{OBSERVED}_marginal"
PREDICTIVE_ELEMENTS = 2**23  # numbers in posterior_predictive at most: 32 MiB in float32
PPC_DRAWS = 50  # that ArviZ's predictive checks draw, and that are kept in any case
VERSIONS = ("torch", "pyro-ppl", "arviz-base", "arviz-stats", "xarray")


@door(records=True)
def posterior(
    program: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    num_samples: int = 1000,
    source: str = "guide",
    num_chains: int = 4,
    seed: int = 0,
    predictive: str = "draws",
    num_predictive: int | None = None,
    prior: bool = True,
    labels: Tensor | Sequence[int] | None = None,
    image_index: Tensor | Sequence[int] | None = None,
    attributes: Mapping[str, Any] | None = None,
    progress: Callable[[float], None] | None = None,
    **mcmc: Any,
) -> xr.DataTree:
    """Draws from the posterior of the latents of every row of x, in ArviZ's schema.

    Chains of the guide, of ``"psis"`` and of the prior are independent draws dealt out to chains, so that every
    source has the same shape. The work is cut into fixed blocks of images, each seeded from (seed, first image).
    Dropout is off.

    Args:
        program: any Program, on its device.
        x: data ``(N, *event)`` as the program sees it (binarized, if its likelihood is); or a record, whose missing
            columns are among the latents where the guide draws them, and predictions are of every column.
        y: what a conditional program is conditioned on, ``(N, ...)``.
        num_samples: draws per chain and image.
        source: ``"guide"``, q(z | x) as it is; ``"psis"``, as many draws of it resampled by Pareto-smoothed
            importance weights; ``"nuts"`` or ``"hmc"``, Markov chains with the decoder fixed; ``"prior"``, no
            posterior at all.
        num_chains: chains per image.
        seed: of everything drawn; torch's generators are put back.
        predictive: what ``posterior_predictive`` holds: ``"draws"`` of x from p(x | z), as ``x``; its ``"mean"``, as
            ``x_mean``; or ``"none"``.
        num_predictive: for how many draws per chain, evenly spaced (``draw`` says which); by default so many that the
            group has about 8 million numbers, and at least 50 over all chains.
        prior: also add ``prior`` and ``prior_predictive``, as many draws, without an axis of images unless the
            program is conditional.
        labels: of the images, ``(N,)``: ``constant_data``.
        image_index: the rows of the data that the images are: the coordinate ``image``; 0 to N - 1 where None.
        attributes: more attributes, such as the run's path.
        progress: called with images' worth of work done, a fraction at a time.
        mcmc: options of :func:`pyro_vae.analysis.mcmc.sample_chains`: ``num_warmup``, ``target_accept``, ...

    Returns:
        A tree with the groups posterior, posterior_predictive, log_likelihood, log_prior (per latent site), sample_stats, prior,
        prior_predictive, observed_data and constant_data. ``log_likelihood`` has ``x``, log p(x | z) per image, and
        ``x_marginal``, log p(x) by importance weights of as many draws from the guide, for ``loo(tree, var_name="x_marginal")``:
        latents are each image's own, and loo of log p(x | z), without the image, is no predictive density. ``sample_stats``
        has ``lp`` = log p(x, z); for the guide and PSIS the ``log_weight`` of each draw, and per image ``khat``,
        ``ess`` and ``log_evidence``; for Markov chains what :class:`pyro_vae.analysis.mcmc.Chains` has. ``khat`` is NaN where
        latents are discrete, since it cannot see states that were not drawn; all that is made of weights is NaN where a guide's
        site is a point estimate (a Delta), which has none. A ``pyro.factor`` of the model counts in log_likelihood.

    Raises:
        UserError: an unknown source, x outside the support, discrete latents with NUTS or HMC.

    Warns:
        UnreliableEstimateWarning: Markov chains that have not converged, or that diverge
            (:class:`pyro_vae.analysis.convergence.Convergence`); weights for ``"psis"`` with a bad Pareto k; a guide whose
            support is a part of the model's; discrete latents with ``"psis"``.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.build("ppca", "linear", (3,), latent_dim=2)
        >>> tree = posterior(vae, torch.zeros(5, 3), num_samples=25)
        >>> dict(tree.posterior.sizes)
        {'chain': 4, 'draw': 25, 'image': 5, 'z_dim': 2}
    """
    _check(x, source, predictive, num_samples, num_chains, mcmc)
    index = np.arange(len(x)) if image_index is None else _column("image_index", image_index, len(x))
    tree = Tree(index)
    shape = (num_chains, num_samples)
    traces, layout = admitted(), layout_of(program, x)
    require_latents(traces, "a posterior")
    if layout is not None and layout.states and source in ("nuts", "hmc"):
        raise UserError(
            f"the discrete latents {', '.join(layout.states)} are summed over by Markov chains, and a tree has all latents: use "
            "source='psis', or pyro_vae.analysis.mcmc.sample_chains for the others alone"
        )
    require_names(traces)
    if source == "psis":
        require_weights(traces)
    if source != "prior":
        chains = source in ("nuts", "hmc")  # which have blocks and a report of progress of their own
        rows = len(x) if chains else at_once("posterior", math.prod(x.shape[1:]))
        walk = Walk(program, x, y, rows=rows, progress=None if chains else progress)
        for block in walk:
            with block:
                found = _draws(block, source, shape, derive_seed("posterior: block", seed, block.first), mcmc, progress)
                _forget_weights(found, traces)
                walk.keep(found)
        blocks = walk.gathered()
        _add_posterior(tree, blocks, shape)
    kept = _kept(num_samples, num_chains, math.prod(x.shape), num_predictive)
    if predictive != "none" and source != "prior":
        values = concatenated([b.groups["posterior"] for b in blocks], 1)
        _add_predictive(tree, "posterior", program, x, y, values, shape, kept, predictive, seed)
    if prior or source == "prior":
        _add_prior(tree, program, x, y, shape, kept, predictive, seed)
    seen = data_name(traces)
    observed = {seen: x} if layout is None else layout.columns_of(x)
    tree.add(
        "observed_data",
        {n: host(v) for n, v in observed.items()},
        {n: ["image", *event_dims(n, v.shape[1:], data=True)] for n, v in observed.items()},
    )
    constant = {} if labels is None else {"label": _column("labels", labels, len(x))}
    dims = {"label": ["image"]}
    if y is not None:
        constant["y"] = host(y)
        dims["y"] = ["image", *event_dims("y", y.shape[1:])]
    if constant:
        tree.add("constant_data", constant, dims)
    built = tree.build(
        {
            "source": source,
            "guide": guide_name(program),
            "program": type(program).__name__,
            "seed": seed,
            "num_samples": num_samples,
            "num_chains": num_chains,
            "pyro_vae_version": __version__,
            **{name.replace("-", "_") + "_version": importlib.metadata.version(name) for name in VERSIONS},
            **{
                name: value if isinstance(value, (int, float)) else str(value)
                for name, value in mcmc.items()
                if value is not None
            },
            **(attributes or {}),
        }
    )
    for message in [*_blind(program, x, y, traces, source), *_doubts(built, source)]:
        warn(message, UnreliableEstimateWarning)
    return built


def _blind(program: Program, x: Tensor, y: Tensor | None, traces: Traces, source: str) -> list[str]:
    """What the weights of a source's draws cannot see; the guide's own draws are of the guide in any case."""
    if source == "psis":
        return blind_spots(program, x, y, traces)
    return narrow_sites(traces) if source == "guide" else []


def _forget_weights(block: _Block, traces: Traces) -> None:
    """NaN for what weights cannot tell: all of it of a point estimate, Pareto k of discrete latents."""
    points = point_masses(traces)
    weighed = (block.groups["sample_stats"], ["log_weight"]), (block.groups["log_likelihood"], [MARGINAL])
    for of, names in ((block.per_image, block.per_image), *weighed):
        for name in names if points else ["khat"] if discrete_sites(traces) or traces.known.get(few_states) else []:
            if name in of:
                of[name] = np.full_like(of[name], np.nan)


def _doubts(tree: xr.DataTree, source: str) -> list[str]:
    """Why the draws may not be of the posterior, as far as they can tell; the guide's are its own in any case."""
    if source in ("nuts", "hmc"):
        return Convergence(tree).warnings
    if source != "psis":
        return []
    khat = tree["sample_stats"].to_dataset()["khat"].values
    draws = tree.attrs["num_samples"] * tree.attrs["num_chains"]
    bad = float((~(khat <= good_khat(draws))).mean())
    if bad <= BAD_FRACTION:
        return []
    unknown = f"unknown (of {draws} draws, where {FEWEST} are needed)" if draws < FEWEST else "bad"
    return [
        f"Pareto k is {unknown} for {bad:.1%} of {len(khat)} images: their draws lie between the guide and the posterior; draw "
        "more, or use Markov chains"
    ]


def guide_name(program: Any) -> str:
    """What a program's guide is: the class of its posterior block, or the program's own class."""
    block = getattr(program, "posterior", None)
    return type(program if block is None else block).__name__


class _Block:
    """Draws ``(num_chains * num_samples, batch, ...)`` of a block of images, by group of the tree; and values of each image."""

    def __init__(self, groups: Groups) -> None:
        lp = groups["log_likelihood"][OBSERVED] + sum(groups["log_prior"].values())
        self.groups, self.per_image = groups | {"sample_stats": {"lp": lp}}, Arrays()

    def rows(self, chosen: np.ndarray) -> None:
        """Keep the draws ``chosen`` ``(num, batch)`` of each image."""
        for group in self.groups.values():
            for name, array in group.items():
                where = chosen.reshape(*chosen.shape, *(1 for _ in array.shape[2:]))
                group[name] = np.take_along_axis(array, where, 0)


def _draws(
    rows: Block, source: str, shape: tuple[int, int], seed: int, mcmc: dict[str, Any],
    progress: Callable[[float], None] | None,
) -> _Block:  # fmt: skip
    program, x, y = rows.walk.program, rows.x, rows.y
    drawn = draw_from_guide(program, x, y, math.prod(shape), derive_seed("posterior: guide", seed))
    log_guide = drawn.pop("log_guide")[OBSERVED]
    block = _Block(drawn)
    log_weight = block.groups["sample_stats"]["lp"] - log_guide
    found = estimate(torch.from_numpy(log_weight))
    if source in ("nuts", "hmc"):
        num_chains, num_samples = shape
        chains = sample_chains(
            program, x, y, kernel=source, num_chains=num_chains, num_samples=num_samples, seed=seed, progress=progress, **mcmc
        )  # fmt: skip
        latents = {n: v.reshape(-1, *v.shape[2:]) for n, v in chains.latents.items()}
        block = _Block(score(program, x, y, latents))
        block.groups["sample_stats"] = {n: v.reshape(-1, *v.shape[2:]) for n, v in chains.statistics.items()}
        block.groups["log_likelihood"][MARGINAL] = _marginal(found, math.prod(shape))
        return block
    block.groups["sample_stats"]["log_weight"] = log_weight
    block.groups["log_likelihood"][MARGINAL] = _marginal(found, math.prod(shape))
    block.per_image = {
        "khat": found.khat.numpy(), "ess": found.ess.numpy(), "log_evidence": found.log_likelihood.numpy()
    }  # fmt: skip
    if source == "psis":
        block.rows(resampled(log_weight, block.per_image["khat"], derive_seed("posterior: resampling", seed)))
    return block


def _marginal(found: Estimate, num: int) -> np.ndarray:
    """Log p(x) ``(num, batch)`` by importance weights, for every draw alike but for a millionth: ArviZ takes no equal values."""
    value = found.log_likelihood - found.bias.nan_to_num(0.0, posinf=0.0, neginf=0.0)
    return value.numpy() + 1e-6 * np.linspace(-1, 1, num)[:, None]


def _add_posterior(tree: Tree, blocks: list[_Block], shape: tuple[int, int]) -> None:
    for group in blocks[0].groups:
        found = concatenated([b.groups[group] for b in blocks], 1)
        seen = data_name(admitted())
        names = {OBSERVED: seen, MARGINAL: f"{seen}_marginal"} if group == "log_likelihood" else {}
        found = {names.get(n, n): v.reshape(*shape, *v.shape[1:]) for n, v in found.items()}
        tree.add(group, found, {n: ["image", *event_dims(n, v.shape[3:])] for n, v in found.items()})
    tree.add_per_image("sample_stats", concatenated([b.per_image for b in blocks]))


def _add_predictive(
    tree: Tree, group: str, program: Program, x: Tensor, y: Tensor | None, latents: Arrays, shape: tuple[int, int],
    kept: np.ndarray, predictive: str, seed: int, axes: Sequence[str] = ("image",),
) -> None:  # fmt: skip
    """Predictions for the draws ``kept`` of each chain of latents ``(num_chains * num_samples, batch, *latent)``."""
    rows = (np.arange(shape[0])[:, None] * shape[1] + kept).ravel()
    chosen = {n: v[rows] for n, v in latents.items()}
    found = predict(
        program, to_program(program, x), y_to_program(program, y), chosen,
        mean=predictive == "mean", seed=derive_seed("posterior: prediction", seed),
    )  # fmt: skip
    if layout_of(program, x) is None:  # under the name that a variable of a tree can have
        found = {data_name(admitted()): value for value in found.values()}
    end = "_mean" if predictive == "mean" else ""
    dims = {n + end: [*axes, *event_dims(n, v.shape[2:], data=True)] for n, v in found.items()}
    values = {
        n + end: v.reshape(shape[0], len(kept), *v.shape[1 if "image" in axes else 2 :]) for n, v in found.items()
    }
    tree.add(f"{group}_predictive", values, dims, draw=kept)


def _add_prior(
    tree: Tree,
    program: Program,
    x: Tensor,
    y: Tensor | None,
    shape: tuple[int, int],
    kept: np.ndarray,
    predictive: str,
    seed: int,
) -> None:
    axes = ["image"] if y is not None else []
    layout = layout_of(program, x)
    if layout is not None:
        axes = ["image"] if axes or len(layout.sites) < len(layout.columns) else []
        x = nothing_present(program, layout, x)
    if not axes:  # the prior is the same for every image
        x = torch.zeros_like(x[:1]) if layout is None else x[:1]
    block_y = y_to_program(program, y)
    latents = draw_from_prior(
        program, to_program(program, x), block_y, math.prod(shape), derive_seed("posterior: prior", seed)
    )
    values = {n: v.reshape(*shape, *v.shape[1 if axes else 2 :]) for n, v in latents.items()}
    event = {n: v.shape[2:] for n, v in latents.items()}
    tree.add("prior", values, {n: [*axes, *event_dims(n, event[n])] for n in values})
    if predictive != "none":
        _add_predictive(tree, "prior", program, x, y, latents, shape, kept, predictive, seed, axes)


def _kept(num_samples: int, num_chains: int, elements: int, num_predictive: int | None) -> np.ndarray:
    """Which draws of each chain have their prediction kept."""
    if num_predictive is None:
        fits = PREDICTIVE_ELEMENTS // max(1, num_chains * elements)
        num_predictive = max(fits, math.ceil(PPC_DRAWS / num_chains))
    if num_predictive < 1:
        raise UserError(f"expected num_predictive of at least 1, got {num_predictive}")
    num = min(num_samples, num_predictive)
    return np.arange(num) * num_samples // num


def _check(x: Any, source: str, predictive: str, num_samples: int, num_chains: int, mcmc: dict[str, Any]) -> None:
    require_rows(x)
    if source not in SOURCES:
        raise UserError(f"unknown source {source!r}: {nearest(str(source), SOURCES)}")
    if predictive not in PREDICTIVE:
        raise UserError(f"unknown predictive {predictive!r}: {nearest(str(predictive), PREDICTIVE)}")
    for name, value in (("num_samples", num_samples), ("num_chains", num_chains)):
        if value < 1:
            raise UserError(f"expected {name} of at least 1, got {value}")
    if mcmc and source not in ("nuts", "hmc"):
        raise UserError(f"the option {next(iter(mcmc))!r} is for source='nuts' and 'hmc', and the source is {source!r}")


def _column(name: str, values: Any, size: int) -> np.ndarray:
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    if array.shape != (size,):
        raise UserError(f"expected {name} of shape ({size},), one for each image, got {array.shape}")
    return array
