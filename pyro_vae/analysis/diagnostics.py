"""Is the guide any good? Held against Markov chains, against the data it predicts, and by its own weights.

Simulation-based calibration, the fourth test, is in :mod:`pyro_vae.analysis.calibration`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import numpy as np
import xarray as xr
from arviz_stats.utils import ELPDData
from scipy.stats import wasserstein_distance
from torch import Tensor

from pyro_vae.analysis.convergence import Convergence, flat_latents
from pyro_vae.analysis.posterior import posterior
from pyro_vae.analysis.schema import SAMPLE_DIMS
from pyro_vae.errors import UserError, warn
from pyro_vae.evaluation.estimators import good_khat
from pyro_vae.evaluation.result import UnreliableEstimateWarning
from pyro_vae.programs.trace import Program

Quantity = Callable[[np.ndarray], np.ndarray]


def compare_guide(
    program: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    num_samples: int = 1000,
    source: str = "nuts",
    seed: int = 0,
    chains: xr.DataTree | None = None,
    guide: xr.DataTree | None = None,
    **options: Any,
) -> xr.Dataset:
    """Hold the guide against Markov chains, image by image and latent by latent.

    Args:
        program: any Program with continuous latents.
        x: data ``(N, *event)``.
        y: what a conditional program is conditioned on.
        num_samples: draws per chain and image, of the chains and of the guide.
        source: ``"nuts"`` or ``"hmc"``.
        seed: of everything drawn.
        chains: the chains, if :func:`pyro_vae.posterior` has drawn them already; ``guide`` likewise.
        guide: see ``chains``.
        options: more for :func:`pyro_vae.posterior`: ``num_chains``, ``num_warmup``, ``progress``, ...

    Warns:
        UnreliableEstimateWarning: chains that have not converged, or that are too few to tell.

    Returns:
        A table over ``image`` and ``latent`` (``"z[3]"``): of the chains ``rhat`` (rank-normalised, folded; Vehtari
        et al. 2021, https://arxiv.org/abs/1903.08008), ``ess_bulk`` and ``ess_tail``; ``mean`` and ``sd`` of the
        chains, ``guide_mean`` and ``guide_sd``; ``wasserstein``, the distance of the two marginals in units of the
        chains' sd. Per image ``khat`` of the guide's importance weights and the number of ``divergences``.
        ``.to_dataframe()`` makes a frame of it.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.build("ppca", "linear", (3,), latent_dim=2)
        >>> table = compare_guide(vae, torch.zeros(2, 3), num_samples=50, num_warmup=50)
        >>> table.rhat.dims, table.latent.values.tolist()
        (('image', 'latent'), ['z[0]', 'z[1]'])
    """
    extra: dict[str, Any] = {"predictive": "none", "prior": False}
    if chains is None:
        chains = posterior(program, x, y, num_samples=num_samples, source=source, seed=seed, **extra, **options)
    else:
        for message in Convergence(chains).warnings:
            warn(message, UnreliableEstimateWarning)
    if guide is None:
        kept = {k: v for k, v in options.items() if k in ("num_chains", "labels", "image_index")}
        guide = posterior(program, x, y, num_samples=num_samples, source="guide", seed=seed, **extra, **kept)
    ours, theirs = flat_latents(chains.posterior), flat_latents(guide.posterior)
    if ours.shape[2:] != theirs.shape[2:]:
        raise UserError(
            f"chains of {ours.shape[2:]} images and latents, and a guide of {theirs.shape[2:]}: give both for the same x"
        )
    values, drawn = ours.values, theirs.values
    told = Convergence(chains)
    sd = values.std((0, 1), ddof=1)
    columns = {
        "rhat": told.rhat,
        "ess_bulk": told.ess,
        "ess_tail": told.ess_tail,
        "mean": values.mean((0, 1)),
        "sd": sd,
        "guide_mean": drawn.mean((0, 1)),
        "guide_sd": drawn.std((0, 1), ddof=1),
        "wasserstein": _distances(values, drawn) / sd,
    }
    stats = chains.sample_stats
    per_image = {"khat": guide.sample_stats["khat"].values, "divergences": stats["diverging"].sum(SAMPLE_DIMS).values}
    coords = {"image": ours["image"].values, "latent": ours["latent"].values}
    return xr.Dataset(
        {n: (("image", "latent"), v) for n, v in columns.items()} | {n: ("image", v) for n, v in per_image.items()},
        coords=coords,
        attrs={"source": source, "seed": seed, "num_samples": ours.sizes["draw"], "num_chains": ours.sizes["chain"]},
    )


def khat_data(tree: xr.DataTree) -> ELPDData:
    """The Pareto k of every image's importance weights, as ``arviz_plots.plot_khat`` takes it: the object that ``loo`` returns.

    ``elpd_i`` is log p(x) by importance weighting, ``elpd`` its sum over images.

    Args:
        tree: :func:`pyro_vae.posterior` with ``source="guide"`` or ``"psis"``.
    """
    stats = tree["sample_stats"].to_dataset() if "sample_stats" in tree.children else xr.Dataset()
    if "khat" not in stats:
        raise UserError(
            "the posterior has no khat: make it with source='guide' or 'psis', which weigh the guide's draws"
        )
    num_samples = stats.sizes["chain"] * stats.sizes["draw"]
    evidence, khat, threshold = stats["log_evidence"], stats["khat"], good_khat(num_samples)
    of_init: dict[str, Any] = {"kind": "iw"} if "kind" in signature(ELPDData).parameters else {}
    return _Weighted(
        **of_init,
        elpd=float(evidence.sum()),
        se=float(evidence.std(ddof=1)) * math.sqrt(evidence.size) if evidence.size > 1 else math.nan,
        p=math.nan,
        n_samples=num_samples,
        n_data_points=evidence.size,
        scale="log",
        warning=bool((khat > threshold).any()),
        good_k=threshold,
        elpd_i=evidence,
        # k of equal weights is minus infinity, which no axis can show: any k below 0 is as good
        pareto_k=khat.where(khat > -1.0, -1.0),
    )


class _Weighted(ELPDData):
    kind = "iw"  # which is the class's in arviz-stats 1, and an argument before


def mean_ink(x: np.ndarray) -> np.ndarray:
    """The mean over all elements."""
    mean: np.ndarray = x.reshape(*x.shape[:3], -1).mean(-1)
    return mean


def contrast(x: np.ndarray) -> np.ndarray:
    """The standard deviation over all elements."""
    sd: np.ndarray = x.reshape(*x.shape[:3], -1).std(-1)
    return sd


def roughness(x: np.ndarray) -> np.ndarray:
    """The mean square of the differences between neighbours along the last axis, and the last but one where there is one."""
    axes = (-1,) if x.ndim < 5 else (-2, -1)
    steps = [np.square(np.diff(x, axis=axis)).reshape(*x.shape[:3], -1).mean(-1) for axis in axes]
    return np.asarray(sum(steps) / len(steps))


QUANTITIES: dict[str, Quantity] = {"mean_ink": mean_ink, "contrast": contrast, "roughness": roughness}


def predictive_check(tree: xr.DataTree, quantities: Mapping[str, Quantity] | None = None) -> xr.Dataset:
    """Posterior predictive checks: is T(x) of the data one of the T that the model would make, given this image?

    Gelman, Meng & Stern 1996, https://www3.stat.sinica.edu.tw/statistica/oldpdf/A6n41.pdf. The model has seen the
    image: p-values near 0 or 1 tell of misfit, and even ones of little.

    Args:
        tree: :func:`pyro_vae.posterior` with ``predictive="draws"``.
        quantities: test quantities by name, of arrays ``(chain, draw, image, *event)`` to ``(chain, draw, image)``;
            :data:`QUANTITIES` where None.

    Returns:
        Over ``quantity`` and ``image``: ``observed`` T(x), ``mean`` and ``sd`` of the replicated T, and ``p_value`` =
        P(T(x_rep) >= T(x)), equal values counting half.
    """
    seen = next(iter(tree["observed_data"].to_dataset().data_vars))
    if "posterior_predictive" not in tree.children or seen not in tree["posterior_predictive"].data_vars:
        raise UserError(f"the posterior has no predictive draws of {seen}: make it with predictive='draws'")
    drawn = tree["posterior_predictive"].to_dataset()[seen].values
    observed = tree["observed_data"].to_dataset()[seen].values[None, None]
    quantities = QUANTITIES if quantities is None else quantities
    rows = []
    for quantity in quantities.values():
        t, t_rep = quantity(observed)[0, 0], quantity(drawn)
        p = (t_rep > t).mean((0, 1)) + 0.5 * (t_rep == t).mean((0, 1))
        rows.append((t, t_rep.mean((0, 1)), t_rep.std((0, 1)), p))
    names = ("observed", "mean", "sd", "p_value")
    return xr.Dataset(
        {n: (("quantity", "image"), np.stack([row[i] for row in rows])) for i, n in enumerate(names)},
        coords={"quantity": list(quantities), "image": tree["observed_data"].to_dataset()["image"].values},
    )


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """First Wasserstein distances ``(image, latent)`` between draws ``(chain, draw, image, latent)``."""
    out = np.empty(a.shape[2:])
    for index in np.ndindex(*out.shape):
        where = (slice(None), slice(None), *index)
        out[index] = wasserstein_distance(a[where].ravel(), b[where].ravel())
    return out
