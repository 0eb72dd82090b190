"""ArviZ as people call it, on a posterior as exported: ``az`` is ``arviz`` from Python 3.12 on and ``arviz.preview`` before."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import conjugate
import numpy as np
import pytest
import xarray as xr
from matplotlib import pyplot

import pyro_vae as pv

if sys.version_info >= (3, 12):
    import arviz as az
else:
    import arviz.preview as az

PLOTS: dict[str, Callable[[xr.DataTree], Any]] = {
    "plot_trace": lambda tree: az.plot_trace(tree),
    "plot_trace_dist": lambda tree: az.plot_trace_dist(tree),
    "plot_forest": lambda tree: az.plot_forest(tree),
    "plot_pair": lambda tree: az.plot_pair(tree, coords={"image": 12}),
    "plot_dist": lambda tree: az.plot_dist(tree),
    "plot_rank": lambda tree: az.plot_rank(tree),
    "plot_rank_dist": lambda tree: az.plot_rank_dist(tree),
    "plot_autocorr": lambda tree: az.plot_autocorr(tree),
    "plot_ess": lambda tree: az.plot_ess(tree),
    "plot_prior_posterior": lambda tree: az.plot_prior_posterior(tree),
    "plot_ppc_dist": lambda tree: az.plot_ppc_dist(tree),
    "plot_ppc_tstat": lambda tree: az.plot_ppc_tstat(tree),
}


@cache
def tree(source: str) -> xr.DataTree:
    options = {"num_warmup": 100} if source == "nuts" else {}
    return pv.posterior(
        conjugate.LinearGaussian(diagonal=True),
        conjugate.data()[:2],
        source=source,
        num_samples=200,
        image_index=[7, 12],
        **options,
    )


@pytest.fixture(autouse=True)
def _figures() -> Iterator[None]:
    backend = az.rcParams["plot.backend"]
    az.rcParams["plot.backend"] = "matplotlib"
    yield
    az.rcParams["plot.backend"] = backend
    pyplot.close("all")


@pytest.mark.parametrize("source", ["guide", pytest.param("nuts", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if "rank" in name else ()) for name in PLOTS]
)
# ArviZ's panels are many, and it draws them through pyplot
@pytest.mark.filterwarnings("ignore:More than 20 figures")
def test_plots(name: str, source: str, tmp_path: Path) -> None:
    PLOTS[name](tree(source)).savefig(tmp_path / "figure.png")
    pixels = pyplot.imread(tmp_path / "figure.png")
    assert pixels[..., :3].std() > 0.01, "nothing was drawn"


@pytest.mark.parametrize("source", ["guide", "nuts"])
def test_tables(source: str) -> None:
    exported = tree(source)
    assert len(az.summary(exported)) == 6  # 2 images, 3 latents
    assert float(az.rhat(exported)["z"].max()) < 1.1
    assert float(az.ess(exported)["z"].min()) > 50
    mean, covariance = (t.numpy() for t in conjugate.LinearGaussian().exact(conjugate.data()[:2]))
    interval = az.hdi(exported, prob=0.94)["z"]
    assert interval.dims == ("image", "z_dim", "ci_bound")
    if source == "nuts":  # 1.88 sd to either side of the mean, within some errors of 800 draws
        sd = np.sqrt(covariance.diagonal())
        np.testing.assert_allclose(interval.mean("ci_bound"), mean, atol=0.5 * sd.max())
        np.testing.assert_allclose(interval.diff("ci_bound").squeeze("ci_bound") / sd, np.full((2, 3), 3.76), rtol=0.25)


def test_draws_are_taken_out_by_name() -> None:
    exported = tree("guide")
    assert az.extract(exported).sizes["sample"] == 800
    assert az.extract(exported, var_names="z", num_samples=20).sizes["sample"] == 20


def test_a_file_comes_back(tmp_path: Path) -> None:
    exported = tree("nuts")
    exported.to_netcdf(tmp_path / "posterior.nc")
    with xr.open_datatree(tmp_path / "posterior.nc") as back:
        assert list(back.children) == list(exported.children)
        assert len(az.summary(back)) == 6
        np.testing.assert_array_equal(back.posterior["z"], exported.posterior["z"])


def test_energies_are_an_image_s() -> None:
    assert az.plot_energy(tree("nuts").sel(image=7)) is not None


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto")
def test_loo_runs_on_chains_and_is_told_by_its_own_k() -> None:
    found = az.loo(tree("nuts"), pointwise=True, var_name="x")
    assert found.pareto_k.dims == ("image",)
    assert az.plot_khat(found) is not None
