"""Anomaly scores, missing pixels, latents as features, and the two commands."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import conjugate
import numpy as np
import pytest
import scipy.stats
import torch
import xarray as xr
from torch import Tensor

import pyro_vae as pv
from pyro_vae.analysis.anomaly import auroc, detect, most_surprising, p_values, scores
from pyro_vae.analysis.features import linear_probe
from pyro_vae.analysis.imputation import WithMissing, impute
from pyro_vae.cli.app import run as command
from pyro_vae.data import Data
from pyro_vae.data.alike import fitted, observed_like
from pyro_vae.evaluation.result import UnreliableEstimateWarning
from pyro_vae.seeding import generator


def draws(num: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Data from the linear-Gaussian model, times ``scale``."""
    return scale * pv.sample(conjugate.LinearGaussian(), num, seed=seed)


def test_scores_are_calibrated_and_tell_the_wrong_images_from_the_right(record_property: Any) -> None:
    program = conjugate.LinearGaussian()
    result = detect(program, draws(300, seed=1), draws(300, seed=2), draws(200, 2.5, seed=3), num_samples=30)
    for name, p in result.normal_p.items():
        # of normal images the p-values are uniform, up to the finite reference: a two-sample test, at 1e-3 for each score
        uniform = (np.arange(301) + 1) / 301
        assert scipy.stats.ks_2samp(p, uniform).pvalue > 1e-3, name
    record_property("AUROC", result.auroc)
    assert result.auroc["nll"] > 0.9
    assert result.found(0.05) > 0.5
    assert result.warnings == []
    np.testing.assert_allclose(result.normal["nll"], -program.evidence(draws(300, seed=2)), atol=1e-9)


def test_where_the_likelihood_fails_it_says_so_and_typicality_does_not() -> None:
    # all in the middle of the density: more likely than the data are, and not like them
    result = detect(
        conjugate.LinearGaussian(), draws(300, seed=1), draws(300, seed=2), draws(200, 0.1, seed=3), num_samples=30
    )
    assert result.auroc["nll"] < 0.1
    assert any("nll ranks the anomalies as less surprising" in w for w in result.warnings)
    assert result.auroc["typicality"] > 0.6
    assert not any(w.startswith("typicality") for w in result.warnings)
    summary = result.summary()
    assert json.loads(json.dumps(summary)) == summary


def test_the_standard_error_of_an_auroc_is_its_spread() -> None:
    random = np.random.default_rng(0)
    found = [auroc(random.normal(size=80), random.normal(0.8, 1, size=60)) for _ in range(400)]
    areas, errors = np.transpose(found)
    assert abs(areas.mean() - scipy.stats.norm.cdf(0.8 / np.sqrt(2))) < 0.01
    assert abs(errors.mean() / areas.std() - 1) < 0.15
    assert auroc(np.zeros(3), np.zeros(4)) == (0.5, 0.0)
    assert p_values(np.array([1.0]), np.array([1.0])).tolist() == [1.0]


def test_smaller_images_are_put_in_the_middle() -> None:
    x = fitted(torch.ones(2, 1, 2, 3), (1, 4, 6))
    assert x.shape == (2, 1, 4, 6)
    assert x[0, 0].sum() == 6
    assert x[0, 0, 1:3, 1:4].all()
    assert fitted(x, (1, 4, 6)) is x
    for shape in ((3, 4, 6), (1, 3, 6), (24,)):
        with pytest.raises(pv.UserError, match="do not fit"):
            fitted(x, shape)


def test_the_picture_and_images_that_the_model_rules_out() -> None:
    program = conjugate.LinearGaussian()
    assert np.isfinite(scores(program, draws(3) * 1e6, num_samples=5)["nll"]).all()
    result = detect(program, draws(20), draws(20), draws(20), num_samples=5)
    images = torch.rand(20, 1, 4, 4, generator=generator(0))
    assert most_surprising(result, images, images, 10).get_images()
    with pytest.raises(pv.UserError, match="at least two other images"):
        detect(program, draws(20), draws(20), draws(1), num_samples=5)


def grey(shape: tuple[int, ...], levels: int, seed: int = 0) -> Data:
    """Thirty images of grey levels."""
    x = torch.randint(0, levels, (30, *shape), generator=generator("test: grey", seed), dtype=torch.uint8)
    return Data("grey", x, x, x, levels)


PREPARATIONS = [{"binarization": b} for b in ("none", "static", "dynamic", "threshold")] + [
    {"dequantization": "uniform"}
]


@pytest.mark.parametrize("ours", PREPARATIONS, ids=lambda p: next(iter(p.values())))
@pytest.mark.parametrize("theirs", PREPARATIONS, ids=lambda p: next(iter(p.values())))
def test_the_same_images_are_the_same_however_they_were_loaded(ours: dict[str, str], theirs: dict[str, str]) -> None:
    """Images that were dequantized as the normal ones, and not as the others, were 3 nats apart from themselves."""
    data = grey((1, 4, 4), 17)
    ours_data, theirs_data = data.with_(**ours), data.with_(**theirs)
    for rows in (None, [3, 0, 7]):
        seen = observed_like(ours_data, theirs_data, rows=rows)
        assert torch.equal(seen, ours_data.observed("test", rows=rows))


def test_other_levels_and_smaller_images_are_brought_to_those_of_the_run() -> None:
    large, small = grey((1, 4, 4), 256), grey((1, 2, 2), 2)
    # two levels are the lowest and the highest of 256, and the background is level 0: both with the noise of a 256th
    seen = observed_like(large.with_(dequantization="uniform"), small)
    assert seen.shape == (30, 1, 4, 4)
    assert torch.equal((seen * 256).floor()[:, :, 1:3, 1:3], small.test.float() * 255)
    edge = torch.ones(4, 4, dtype=torch.bool)
    edge[1:3, 1:3] = False
    assert 0 < float(seen[..., edge].min()) < float(seen[..., edge].max()) < 1 / 256
    coarse = grey((1, 4, 4), 17)
    lattice = observed_like(large, coarse) * 255
    torch.testing.assert_close(lattice, (coarse.test.double() * 255 / 16).round().float())
    assert set(observed_like(large.with_(binarization="dynamic"), coarse).unique().tolist()) == {0.0, 1.0}
    floats = Data("floats", *[torch.rand(30, 1, 4, 4, generator=generator("test: floats"))] * 3, None)
    assert torch.equal(observed_like(large, floats), floats.test)
    assert torch.equal(observed_like(floats, coarse), coarse.test / 16)
    with pytest.raises(pv.UserError, match="grey was dequantized, and floats holds floats"):
        observed_like(large.with_(dequantization="uniform"), floats)
    with pytest.raises(pv.UserError, match="do not fit"):
        observed_like(small, large)


def test_data_against_themselves_are_not_told_apart(record_property: Any) -> None:
    """Exactly where they are the same images; within the error where they are others of the same law.

    The second is a z-test of the mean AUROC of 100 sets of 60 (seeds fixed, false alarms 1e-4); it would find a shift of
    0.2 standard deviations, an AUROC of 0.55, in all but 1e-4 of cases.
    """
    program = conjugate.LinearGaussian()
    x = draws(60, seed=2)
    same = detect(program, draws(60, seed=1), x, x.clone(), num_samples=20, seed=3)
    assert same.auroc == dict.fromkeys(same.auroc, 0.5)
    areas = [auroc(*(-program.evidence(draws(60, seed=s)).numpy() for s in (2 * i, 2 * i + 1)))[0] for i in range(100)]
    z = (np.mean(areas) - 0.5) / (np.std(areas, ddof=1) / 10)
    record_property("z", z)
    assert abs(z) < 3.9


@cache
def missing() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Data, what was seen of them, and the exact mean and variance of x given what was seen."""
    program, x = conjugate.LinearGaussian(), draws(5, seed=4)
    seen = torch.rand(5, 5, generator=generator(7)) < 0.6
    weight = program.weight.detach()
    covariance = weight @ weight.T + conjugate.NOISE**2 * torch.eye(5, dtype=x.dtype)
    mean, variance = x.clone(), torch.zeros_like(x)
    for row, mask in enumerate(seen):
        gain = covariance[~mask][:, mask] @ torch.linalg.inv(covariance[mask][:, mask])
        mean[row, ~mask] = gain @ x[row, mask]
        variance[row, ~mask] = (covariance[~mask][:, ~mask] - gain @ covariance[mask][:, ~mask]).diagonal()
    return x, seen, mean, variance


@pytest.mark.parametrize("diagonal", [False, True])
def test_missing_elements_have_their_conditional_law(diagonal: bool, record_property: Any) -> None:
    x, seen, mean, variance = missing()
    found = impute(conjugate.LinearGaussian(diagonal=diagonal), x, seen, num_chains=200, num_rounds=100)
    assert torch.equal(found.mean[seen], x[seen])
    assert (found.draws[:, seen] == x[seen]).all()
    # the mean over chains has a t distribution; the draws of independent chains a known variance: 1e-3 over all missing elements
    z = ((found.mean - mean) / found.mc_se)[~seen]
    record_property("largest standardised error", float(z.abs().max()))
    assert float(z.abs().max()) < scipy.stats.t(199).ppf(1 - 1e-3 / (4 * len(z)))
    ratio = found.draws.var(0)[~seen] / variance[~seen] * 199
    low, high = scipy.stats.chi2(199).ppf([1e-3 / (4 * len(z)), 1 - 1e-3 / (4 * len(z))])
    assert low < float(ratio.min()) < float(ratio.max()) < high
    if diagonal:
        assert 0.3 < float(found.acceptance.min()) < float(found.acceptance.max()) < 0.99
    else:
        assert float(found.acceptance.min()) > 1 - 1e-9


@pytest.mark.parametrize("scale", [1.2, 0.6, 0.4])
def test_chains_that_stay_where_they_started_say_so(scale: float) -> None:
    """One element of five is seen: of 100 rows their conditional law covers 95 %, or there is a warning."""
    program, x = conjugate.LinearGaussian(scale=scale), draws(100, seed=4)
    weight = program.weight.detach()
    covariance = weight @ weight.T + conjugate.NOISE**2 * torch.eye(5, dtype=x.dtype)
    mean = x[:, :1] / covariance[0, 0] * covariance[0, 1:]
    seen = torch.tensor([True] + [False] * 4)
    if scale > 1:
        found = impute(program, x, seen)
    else:
        with pytest.warns(UnreliableEstimateWarning, match="have not forgotten where they started"):
            found = impute(program, x, seen)
    inside = ((found.mean[:, 1:] - mean).abs() < scipy.stats.t(15).ppf(0.975) * found.mc_se[:, 1:]).double().mean()
    assert float(inside) > 0.9 or scale < 1
    assert float(inside) < 0.9 or scale > 0.4
    assert bool(found.warnings) == (scale < 1)


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")  # few draws
def test_a_program_with_missing_elements_is_a_program() -> None:
    x, seen, _, _ = missing()
    program = conjugate.LinearGaussian(scale=2.5)  # wide enough for a posterior that has seen less
    weight = program.weight.detach()
    covariance = weight @ weight.T + conjugate.NOISE**2 * torch.eye(5, dtype=x.dtype)
    exact = torch.stack(
        [
            torch.distributions.MultivariateNormal(row.new_zeros(int(m.sum())), covariance[m][:, m]).log_prob(row[m])
            for row, m in zip(x, seen, strict=True)
        ]
    )
    filled = impute(program, x, seen).mean
    masked = WithMissing(program)
    result = pv.log_likelihood(masked, filled, seen.double(), num_samples=20_000)
    assert ((result.log_likelihood - exact) / result.mc_se).abs().max() < 5
    tree = pv.posterior(masked, filled, seen.double(), source="nuts", num_samples=40, num_warmup=40)
    assert tree.constant_data["y"].shape == (5, 5)


def test_a_joint_likelihood_is_refused() -> None:
    class Joint(conjugate.LinearGaussian):
        def model(self, x: Tensor) -> None:
            import pyro
            import pyro.distributions as dist

            with pyro.plate("data", x.shape[0], dim=-1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
                pyro.sample("x", dist.MultivariateNormal(z @ self.weight.T, torch.eye(5, dtype=x.dtype)), obs=x)

    x, seen, _, _ = missing()
    with pytest.raises(pv.UserError, match="independent given z"):
        impute(Joint(), x, seen)


def test_features_for_a_linear_classifier() -> None:
    labels = torch.arange(300) % 3
    x = draws(300) + 4 * torch.nn.functional.one_hot(labels, 5)
    table = linear_probe(
        conjugate.LinearGaussian(), x[:200], labels[:200], x[200:], labels[200:], num_labels=(3, 30), num_seeds=2
    )
    assert table.dims == ("representation", "num_labels", "seed")
    assert table.representation.values.tolist() == ["latents", "pixels", "pca"]
    accuracy = table.mean("seed")
    assert float(accuracy.sel(representation="pixels", num_labels=30)) > 0.8
    assert (accuracy.sel(num_labels=30) > accuracy.sel(num_labels=3) - 0.1).all()
    with pytest.raises(pv.UserError, match="one of each class"):
        linear_probe(conjugate.LinearGaussian(), x, labels, x, labels, num_labels=(2,))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "digits"
    arguments = [
        "train",
        "digits",
        "--model",
        "mlp",
        "--set",
        "latent_dim=4",
        "--steps",
        "100",
        "--compile",
        "off",
    ]
    assert command([*arguments, "--out", str(path), "--quiet"]) == 0
    return path


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")  # few draws
def test_the_posterior_command(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = trained / "p.nc"
    few = ["--images", "3", "--samples", "15", "--quiet"]
    assert command(["posterior", str(trained), *few, "--mcmc", "nuts", "--warmup", "15", "--out", str(out)]) == 0
    assert "R-hat below 1.01" in capsys.readouterr().out
    with xr.open_datatree(out, engine="h5netcdf") as tree:
        assert tree.attrs["run"] == str(trained)
        assert tree.attrs["source"] == "nuts"
        assert tree.posterior["z"].shape == (4, 15, 3, 4)
        assert tree.constant_data["label"].shape == (3,)
        assert tree.observed_data["x"].dims == ("image", "channel", "row", "column")
    assert command(["posterior", str(trained), *few, "--source", "psis"]) == 0
    assert (trained / "posterior.nc").is_file()
    for wrong, message in (
        (["--mcmc", "gibbs"], "none, nuts or hmc"),
        (["--mcmc", "nuts", "--source", "psis"], "exclude each other"),
        (["--out", "x.txt"], "ends in .nc"),
        (["--images", "100000"], "lower --images"),
    ):
        capsys.readouterr()
        assert command(["posterior", str(trained), *wrong]) == 2
        assert message in capsys.readouterr().err


def test_the_anomaly_command(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "noise.npy", np.random.default_rng(0).integers(0, 256, (60, 6, 6), dtype=np.uint8))
    options = ["--limit", "20", "--samples", "20", "--quiet"]
    assert command(["anomaly", str(trained), str(tmp_path / "noise.npy"), *options, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["scores"]["nll"]["auroc"] > 0.6
    assert figures["num_normal"] == 20
    assert Path(figures["picture"]).is_file()
    assert json.loads((trained / "anomaly.json").read_text()) == figures
    assert command(["anomaly", str(trained), "digits", *options]) == 0
    assert "| nll            | 0.500 +- " in capsys.readouterr().out
    assert command(["anomaly", str(trained), "pinwheel", *options]) == 2
    assert "do not fit" in capsys.readouterr().err
