"""Exported posteriors: against the closed form, through ArviZ, and through a file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import arviz_plots
import arviz_stats
import by_hand
import conjugate
import numpy as np
import pytest
import scipy.stats
import torch
import xarray as xr
from arviz_stats.base import array_stats
from matplotlib import pyplot

import pyro_vae as pv
from pyro_vae.analysis.diagnostics import compare_guide, khat_data, predictive_check
from pyro_vae.analysis.resampling import resampled, smoothed_weights
from pyro_vae.analysis.schema import save_netcdf
from pyro_vae.seeding import seeded

FALSE_ALARM = 1e-3  # of the tests against the closed form, each over all of its moments


@cache
def tree(source: str, diagonal: bool = True) -> xr.DataTree:
    program = conjugate.LinearGaussian(diagonal=diagonal)
    options = {"num_warmup": 200} if source in ("nuts", "hmc") else {}
    return pv.posterior(
        program,
        conjugate.data(),
        source=source,
        num_samples=1000,
        labels=range(6),
        image_index=range(10, 16),
        **options,
    )


def moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of draws ``(chain, draw, image, D)``: every z_i and (z_i - m_i)(z_j - m_j), their expectations, and their variances."""
    mean, covariance = (t.numpy() for t in conjugate.LinearGaussian().exact(conjugate.data()))
    centred = values - mean
    first, second = np.triu_indices(3)
    products = centred[..., first] * centred[..., second]
    diagonal = covariance.diagonal()
    shape = products.shape[2:]
    expected = np.concatenate([mean, np.broadcast_to(covariance[first, second], shape)], -1)
    spread = diagonal[first] * diagonal[second] + covariance[first, second] ** 2
    variance = np.concatenate([np.broadcast_to(diagonal, mean.shape), np.broadcast_to(spread, shape)], -1)
    return np.concatenate([values, products], -1), expected, variance


def assert_within_error(error: np.ndarray, se: np.ndarray, record: Any) -> None:
    z = error / se
    record("largest standardised error of means and covariances", float(np.abs(z).max()))
    assert np.abs(z).max() < scipy.stats.norm.ppf(1 - FALSE_ALARM / (2 * z.size))


def test_the_exact_guide_has_the_closed_form(record_property: Any) -> None:
    exported = tree("guide", diagonal=False)
    found, expected, variance = moments(exported.posterior["z"].values)
    draws = found.shape[0] * found.shape[1]
    assert_within_error(found.mean((0, 1)) - expected, np.sqrt(variance / draws), record_property)
    # every weight is p(x)
    stats = exported.sample_stats
    assert np.isneginf(stats["khat"]).all()
    np.testing.assert_allclose(stats["ess"], 4000)
    np.testing.assert_allclose(stats["log_evidence"], conjugate.LinearGaussian().evidence(conjugate.data()))
    np.testing.assert_allclose(stats["log_weight"], stats["log_evidence"].broadcast_like(stats["log_weight"]))


def test_psis_has_the_closed_form_and_the_diagonal_guide_has_not(record_property: Any) -> None:
    guide, psis = tree("guide"), tree("psis")
    found, expected, variance = moments(psis.posterior["z"].values)
    draws = found.shape[0] * found.shape[1]
    # The same seed drew the same guide: what was resampled. Its weighted mean has variance sum w^2 (f - E f)^2, the
    # resampling adds at most that of as many exact draws.
    raw, _, _ = moments(guide.posterior["z"].values)
    log_weight = guide.sample_stats["log_weight"].values
    weight = np.exp(log_weight - log_weight.max((0, 1)))
    weight /= weight.sum((0, 1))
    spread = (np.square(weight)[..., None] * np.square(raw - expected)).sum((0, 1))
    assert_within_error(found.mean((0, 1)) - expected, np.sqrt(spread + variance / draws), record_property)
    # A diagonal guide has no covariances: it misses those of the posterior, exactly, and by many standard errors.
    pairs = [4, 5, 7]  # of moments' columns, i < j
    se = np.sqrt(variance / draws)[:, pairs]
    missed = -expected[:, pairs] / se
    assert_within_error((raw.mean((0, 1)) - expected)[:, pairs] / se - missed, np.ones_like(se), record_property)
    assert np.abs(missed).max() > 8
    assert float(guide.sample_stats["khat"].max()) < 0.7
    truth = conjugate.LinearGaussian().evidence(conjugate.data()).numpy()
    assert np.abs(guide.sample_stats["log_evidence"] - truth).max() < 0.1


@pytest.mark.parametrize("source", ["nuts", "hmc"])
def test_markov_chains_have_the_closed_form(source: str, record_property: Any) -> None:
    exported = tree(source)
    found, expected, variance = moments(exported.posterior["z"].values)
    ess = array_stats.ess(found, method="mean", chain_axis=0, draw_axis=1)
    assert_within_error(found.mean((0, 1)) - expected, np.sqrt(variance / ess), record_property)
    rhat = array_stats.rhat(exported.posterior["z"].values, chain_axis=0, draw_axis=1)
    record_property("R-hat, largest; ESS, smallest", (float(rhat.max()), float(ess.min())))
    assert rhat.max() < 1.01
    stats = exported.sample_stats
    assert not stats["diverging"].any()
    assert 0.7 < float(stats["acceptance_rate"].mean()) < 0.97
    joint = exported.log_likelihood["x"] + exported.log_prior["z"]
    np.testing.assert_allclose(stats["lp"], joint, rtol=1e-10)


def test_the_schema() -> None:
    exported = tree("guide")
    groups = {"posterior", "posterior_predictive", "prior", "prior_predictive", "log_likelihood", "log_prior"}
    assert set(exported.children) == groups | {"sample_stats", "observed_data", "constant_data"}
    assert exported.posterior["z"].dims == ("chain", "draw", "image", "z_dim")
    assert exported.posterior["image"].values.tolist() == list(range(10, 16))
    assert exported.constant_data["label"].values.tolist() == list(range(6))
    assert exported.prior["z"].dims == ("chain", "draw", "z_dim")
    assert exported.posterior_predictive["x"].dims == ("chain", "draw", "image", "x_dim")
    assert exported.observed_data["x"].dims == ("image", "x_dim")
    assert exported.log_likelihood["x"].dims == exported.log_prior["z"].dims == ("chain", "draw", "image")
    assert exported.sample_stats["khat"].dims == ("image",)
    assert {"source", "guide", "seed", "num_samples", "torch_version", "pyro_vae_version"} <= set(exported.attrs)
    assert exported.posterior.attrs["source"] == "guide"
    assert set(tree("prior").children) == {"prior", "prior_predictive", "observed_data", "constant_data"}
    stats = set(tree("nuts").sample_stats.data_vars)
    assert stats == {"lp", "acceptance_rate", "step_size", "energy", "diverging", "tree_depth", "n_steps"}


def test_images_have_channels_rows_and_columns_and_the_predictions_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with seeded(0):
        vae = pv.build("mlp", "diagonal", (1, 4, 5), latent_dim=2)
    x = torch.zeros(3, 1, 4, 5)
    monkeypatch.setattr("pyro_vae.analysis.posterior.PREDICTIVE_ELEMENTS", 3 * 20 * 2 * 40)
    exported = pv.posterior(vae, x, num_samples=100, num_chains=2, predictive="mean")
    mean = exported.posterior_predictive["x_mean"]
    assert mean.dims == ("chain", "draw", "image", "channel", "row", "column")
    assert mean.shape == (2, 40, 3, 1, 4, 5)
    # the prediction of a draw is that of the latents with the same coordinates
    z = torch.from_numpy(exported.posterior["z"].sel(draw=mean["draw"]).values)
    np.testing.assert_allclose(mean.values[1], pv.decode(vae, z[1]), atol=1e-6)
    assert "posterior_predictive" not in pv.posterior(vae, x, num_samples=5, predictive="none").children
    draws = pv.posterior(vae, x, num_samples=10, num_predictive=3).posterior_predictive["x"]
    assert draws["draw"].values.tolist() == [0, 3, 6]
    assert set(np.unique(draws)) == {0.0, 1.0}


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")  # few draws
def test_several_sites_and_a_conditional_program() -> None:
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    with seeded(0):
        layers, conditional, discrete_program = by_hand.TwoLayers(), by_hand.Conditional(), by_hand.DiscreteLatent()
    for source in ("guide", "psis", "nuts", "hmc"):
        options = {"num_warmup": 5} if source in ("nuts", "hmc") else {}
        exported = pv.posterior(layers, x, source=source, num_samples=20, **options)
        assert {n: v.shape for n, v in exported.posterior.data_vars.items()} == {
            "z2": (4, 20, 3, 2),
            "z1": (4, 20, 3, 3),
        }
    y = torch.tensor([0, 1, 2])
    exported = pv.posterior(conditional, x.gt(0).float(), y, num_samples=20)
    assert exported.prior["z"].dims == ("chain", "draw", "image", "z_dim")
    assert exported.constant_data["y"].values.tolist() == [0, 1, 2]
    discrete = pv.posterior(discrete_program, x, source="psis", num_samples=20)
    assert set(np.unique(discrete.posterior["z"])) <= {0.0, 1.0}


def test_netcdf_reads_back_equal(tmp_path: Path) -> None:
    for source in ("psis", "nuts"):
        path = save_netcdf(tree(source), tmp_path / f"{source}.nc")
        with xr.open_datatree(path, engine="h5netcdf") as read:
            xr.testing.assert_identical(read.load(), tree(source))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["nuts.nc", "psis.nc"]
    for bad in (tmp_path / "x.png", tmp_path / "nowhere" / "x.nc"):
        with pytest.raises(pv.UserError, match=r"expected a name|no directory"):
            save_netcdf(tree("psis"), bad)


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")  # few draws
def test_the_same_seed_gives_the_same_draws_whatever_was_drawn_before() -> None:
    program, x = conjugate.LinearGaussian(diagonal=True), conjugate.data()
    for source, options in (("psis", {}), ("nuts", {"num_warmup": 10})):
        first = pv.posterior(program, x, source=source, num_samples=20, seed=3, **options)
        torch.rand(3, generator=torch.Generator().manual_seed(1))
        again = pv.posterior(program, x, source=source, num_samples=20, seed=3, **options)
        other = pv.posterior(program, x, source=source, num_samples=20, seed=4, **options)
        np.testing.assert_array_equal(first.posterior["z"], again.posterior["z"])
        np.testing.assert_array_equal(first.posterior_predictive["x"], again.posterior_predictive["x"])
        assert (first.posterior["z"] != other.posterior["z"]).any()


def test_resampling_takes_each_draw_as_often_as_its_weight_says() -> None:
    log_weight = np.random.default_rng(0).normal(size=(400, 2)) * [0.5, 0.0]
    rows = resampled(log_weight, np.array([0.1, -np.inf]), seed=0)
    expected = 400 * smoothed_weights(log_weight[:, 0], 0.1)
    assert np.abs(np.bincount(rows[:, 0], minlength=400) - expected).max() < 1
    assert sorted(rows[:, 1]) == list(range(400))  # equal weights: a permutation
    # the smoothing is of the largest weights, not of the smallest: the sign of the log-weights is the right one
    smallest, largest = np.argsort(log_weight[:, 0])[[0, -1]]
    raw = 400 * np.exp(log_weight[:, 0]) / np.exp(log_weight[:, 0]).sum()
    assert expected[largest] > 2 > 1 > expected[smallest]
    assert abs(expected[smallest] / raw[smallest] - 1) < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "gide"}, "did you mean 'guide'"),
        ({"predictive": "all"}, "unknown predictive"),
        ({"num_samples": 0}, "num_samples of at least 1"),
        ({"num_warmup": 5}, "is for source='nuts'"),
        ({"source": "nuts", "target_accept": 2.0}, "between 0 and 1"),
        ({"labels": [1, 2]}, "labels of shape"),
        ({"num_predictive": 0}, "num_predictive"),
    ],
)
def test_what_a_user_can_mend_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(pv.UserError, match=message):
        pv.posterior(conjugate.LinearGaussian(), conjugate.data(), **options)


def test_discrete_latents_are_refused_by_name() -> None:
    with seeded(0):
        program = by_hand.DiscreteLatent()
    with pytest.raises(pv.UserError, match="the latent 'z' is discrete"):
        pv.posterior(program, torch.zeros(2, 6), source="nuts")


@pytest.fixture
def _figures() -> Iterator[None]:
    yield
    pyplot.close("all")


@pytest.mark.usefixtures("_figures")
@pytest.mark.parametrize("source", ["guide", *(pytest.param(s, marks=pytest.mark.slow) for s in ("psis", "nuts"))])
def test_arviz_takes_the_tree_as_it_is(source: str) -> None:
    options = {"num_warmup": 50} if source == "nuts" else {}
    exported = pv.posterior(
        conjugate.LinearGaussian(diagonal=True),
        conjugate.data()[:2],
        source=source,
        num_samples=200,
        image_index=[7, 12],
        **options,
    )
    summary = arviz_stats.summary(exported)
    assert len(summary) == 6
    assert (summary["r_hat"].astype(float) < 1.1).all()
    for plot in (arviz_plots.plot_forest, arviz_plots.plot_rank, arviz_plots.plot_ppc_dist):
        assert plot(exported, backend="matplotlib") is not None
        pyplot.close("all")
    assert arviz_plots.plot_pair(exported, coords={"image": 12}, backend="matplotlib") is not None


@pytest.mark.usefixtures("_figures")
def test_arviz_plots_the_pareto_k_of_every_image() -> None:
    found = khat_data(tree("guide"))
    assert found.pareto_k.dims == ("image",)
    assert not found.warning
    assert arviz_plots.plot_khat(found, backend="matplotlib") is not None
    assert "elpd_iw" in str(found)
    assert khat_data(tree("guide", diagonal=False)).pareto_k.min() == -1.0
    with pytest.raises(pv.UserError, match="no khat"):
        khat_data(tree("nuts"))


def test_the_guide_against_the_chains() -> None:
    program, x = conjugate.LinearGaussian(diagonal=True, scale=0.5), conjugate.data()
    table = compare_guide(program, x, chains=tree("nuts"), num_samples=1000)
    assert dict(table.sizes) == {"image": 6, "latent": 3}
    assert table["latent"].values.tolist() == ["z[0]", "z[1]", "z[2]"]
    assert float(table.rhat.max()) < 1.01
    np.testing.assert_allclose(table.guide_sd / table.sd, 0.5, rtol=0.1)
    # between N(m, s^2) and N(m, s^2 / 4) the distance is s / 2 E|N(0, 1)|
    np.testing.assert_allclose(table.wasserstein, 0.5 * np.sqrt(2 / np.pi), atol=0.06)
    assert len(table.to_dataframe()) == 18


def test_predictive_checks_see_what_the_model_cannot_make() -> None:
    check = predictive_check(tree("nuts"))
    assert check["p_value"].dims == ("quantity", "image")
    assert float(check["p_value"].min()) > 0.01
    outlier = conjugate.data() + torch.tensor([0.0, 0.0, 30.0, 0.0, 0.0], dtype=torch.float64)
    wrong = predictive_check(pv.posterior(conjugate.LinearGaussian(), outlier, num_samples=200))
    assert float(wrong["p_value"].sel(quantity="contrast").max()) < 0.01
    with pytest.raises(pv.UserError, match="predictive='draws'"):
        predictive_check(pv.posterior(conjugate.LinearGaussian(), outlier, num_samples=5, predictive="mean"))


@pytest.mark.parametrize("source", ["guide", "psis", pytest.param("nuts", marks=pytest.mark.slow)])
def test_loo_of_the_marginal_is_the_sum_of_log_p(source: str) -> None:
    """Of log p(x | z), whose latents are each image's own, it is not; and none of the two is taken unasked."""
    program, x = conjugate.LinearGaussian(scale=1.2), conjugate.data(30)
    how: Any = {"num_warmup": 100} if source == "nuts" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn = pv.posterior(program, x, num_samples=250, source=source, predictive="none", prior=False, **how)
        with pytest.raises(TypeError, match="x_marginal"):
            arviz_stats.loo(drawn)
        marginal, conditional = (arviz_stats.loo(drawn, var_name=name).elpd for name in ("x_marginal", "x"))
    truth = float(program.evidence(x).sum())
    assert marginal == pytest.approx(truth, abs=0.5)
    assert abs(conditional - truth) > 10
