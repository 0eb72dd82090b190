"""Real-valued tables in standard units: the density is of the data as they are, and probabilistic PCA stays itself."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.decomposition import PCA
from small import small, small_vae
from test_selection import OLD
from torch import Tensor

import pyro_vae as pv
from pyro_vae import registry
from pyro_vae.errors import UserError
from pyro_vae.likelihoods.units import Units
from pyro_vae.networks.heads import positive_inverse
from pyro_vae.programs.trace import draw_terms, evaluating, to_program
from pyro_vae.seeding import generator, seeded
from pyro_vae.training.source import make_source
from pyro_vae.training.standardize import UnevenColumnsWarning, moments

REAL = [n for n in registry.names("likelihoods") if registry.get("likelihoods", n).data == "real"]  # type: ignore[attr-defined]
QUICK: dict[str, Any] = {"batch_size": 50, "compile": "off", "device": "cpu"}
CPU = torch.device("cpu")
# of tables as filed: probabilistic PCA has one scale, whatever the columns
UNEVEN = pytest.mark.filterwarnings("ignore::pyro_vae.training.standardize.UnevenColumnsWarning")


def table(n: int = 200, d: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    """Columns of scale about 1, correlated by two factors."""
    g = generator("test of units")
    return (torch.randn(n, 2, generator=g) @ torch.randn(2, d, generator=g) + torch.randn(n, d, generator=g)).to(dtype)


def vae(shape: Any, likelihood: Any = "normal", **options: Any) -> Any:
    return small_vae(shape, likelihood=likelihood, **options).double()


def log_likelihood(program: Any, x: Tensor, num: int = 200) -> Tensor:
    """By 200 draws, whose weights need not be good ones: only differences of the same draws matter here."""
    with evaluating(program), seeded(1):
        log_weight = draw_terms(program, to_program(program, x), num_samples=num).log_weight
    return log_weight.logsumexp(0) - math.log(num)


def nll(program: Any, x: Tensor) -> float:
    return -float(log_likelihood(program, x).mean())


def scaled(per_column: bool, d: int = 6) -> Tensor:
    return (
        torch.logspace(-3, 3, d, dtype=torch.float64) if per_column else torch.full((d,), 1000.0, dtype=torch.float64)
    )


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("scale", ["shared", "per-pixel", pytest.param("decoder", marks=pytest.mark.slow)])
def test_another_unit_adds_its_logarithm_and_changes_nothing_else(name: str, scale: str) -> None:
    """log p(a x + b) = log p(x) - sum_d log a_d, after the same training."""
    options = small("likelihoods", name)
    if "scale" in registry.schema("likelihoods", name).model_fields:
        options["scale"] = scale
    program = vae((6,), {"name": name, **options})
    by = program.likelihood.standardizes
    assert by == ("one" if scale == "shared" and "scale" in options else "columns")
    other, x = copy.deepcopy(program), table()
    a = scaled(by == "columns")
    y = a * x + 1e4 * a
    pv.fit(program, x, steps=20, **QUICK)
    pv.fit(other, y, steps=20, **QUICK)
    assert nll(other, y) == pytest.approx(nll(program, x) + float(a.log().sum()), abs=1e-4)
    assert torch.allclose(pv.encode(other, y), pv.encode(program, x), atol=1e-5)
    assert torch.allclose(pv.reconstruct(other, y), a * pv.reconstruct(program, x) + 1e4 * a, atol=0.0, rtol=1e-5)
    assert torch.allclose(pv.sample(other, 50), a * pv.sample(program, 50) + 1e4 * a, rtol=1e-5)


@UNEVEN
@pytest.mark.parametrize("load", [load_wine, load_breast_cancer])
@pytest.mark.parametrize("standardised", [False, True])
def test_probabilistic_pca_of_tables_as_filed_is_that_of_scikit_learn(
    load: Callable[[], Any], standardised: bool
) -> None:
    """With the solution of Tipping & Bishop in the program's own units, log p(x) is ``PCA.score_samples``."""
    x = torch.from_numpy(load().data)
    x = (x - x.mean(0)) / x.std(0, correction=0) if standardised else x
    program = pv.build("ppca", "full-rank", tuple(x.shape[1:]), latent_dim=4, encoder="linear").double()
    pv.fit(program, x, steps=1, **QUICK)
    units = program.likelihood.units
    assert units.by == "one"
    pca = PCA(4, svd_solver="full").fit(units(x).numpy())
    noise = float(pca.noise_variance_)
    weight = torch.from_numpy(pca.components_.T * np.sqrt(pca.explained_variance_ - noise))
    with torch.no_grad():
        program.likelihood.head.map.weight.copy_(weight)
        program.likelihood.head.map.bias.copy_(torch.from_numpy(pca.mean_))
        program.likelihood.raw_scale.fill_(positive_inverse(noise**0.5, program.likelihood.min_scale))
        # the exact posterior, linear in x
        inverse = torch.linalg.inv(weight.T @ weight + noise * torch.eye(4).double())
        found = log_likelihood(Exact(program, weight, inverse, noise), x, 10)
    expected = PCA(4, svd_solver="full").fit(x.numpy()).score_samples(x.numpy())
    assert found.numpy() == pytest.approx(expected, abs=1e-6)


class Exact(torch.nn.Module):
    """A probabilistic PCA with its exact posterior as guide."""

    def __init__(self, program: Any, weight: Tensor, inverse: Tensor, noise: float) -> None:
        super().__init__()
        self.program, self.noise = program, noise
        self.weight, self.inverse = weight, inverse

    def model(self, x: Tensor) -> None:
        self.program.model(x)

    def guide(self, x: Tensor) -> None:
        import pyro
        import pyro.distributions as dist

        units, bias = self.program.likelihood.units, self.program.likelihood.head.map.bias
        loc = (units(x) - bias) @ self.weight @ self.inverse
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(loc, covariance_matrix=self.noise * self.inverse))


@UNEVEN
@pytest.mark.slow
def test_training_on_a_table_as_filed_comes_close_to_scikit_learn() -> None:
    """As filed, not one step of training was possible in these units: an NLL of 26,000. It is never below the optimum."""
    x = torch.from_numpy(load_breast_cancer().data).float()
    program = pv.build("ppca", "full-rank", (30,), latent_dim=4, encoder="linear")
    pv.fit(program, x, steps=600, lr=0.05, batch_size=569, compile="off", device="cpu")
    best = -float(PCA(4, svd_solver="full").fit(x.double().numpy()).score(x.double().numpy()))
    assert best - 0.05 < nll(program, x) < best + 25


def test_columns_that_one_scale_leaves_to_noise_are_told() -> None:
    x = torch.from_numpy(load_breast_cancer().data).float()
    with pytest.warns(UnevenColumnsWarning, match=r"from 0\.0026 to 569, and .* one scale .* scale=per-pixel"):
        pv.fit(vae((30,), "normal"), x, steps=2, **QUICK)
    pv.fit(vae((30,), "normal:scale=per-pixel"), x, steps=2, **QUICK)  # a warning would be an error
    pv.fit(vae((30,), "normal"), (x - x.mean(0)) / x.std(0), steps=2, **QUICK)


def test_columns_that_do_not_vary_keep_the_scale_1() -> None:
    x = table()
    x[:, 2] = 7.1
    for scale in ("shared", "per-pixel"):
        program = vae((6,), f"normal:scale={scale}")
        pv.fit(program, x, steps=2, **QUICK)
        units = program.likelihood.units
        assert torch.equal(units.scale[2:3], torch.ones(1).double()) == (scale == "per-pixel")
        assert float(units.loc[2]) == pytest.approx(7.1)
    units = Units(3, "one")
    units.start_at(torch.full((3,), 5.0), torch.zeros(3))
    assert torch.equal(units.scale, torch.ones(1))


def test_series_are_standardized_by_column() -> None:
    x = table(200, 8).reshape(200, 4, 2) * torch.tensor([1.0, 100.0]) + torch.tensor([0.0, 1e4])
    for likelihood in ("normal:scale=per-pixel", "low-rank-normal:rank=2"):
        program = vae((4, 2), likelihood)
        pv.fit(program, x, steps=2, **QUICK)
        assert torch.allclose(program.likelihood.units.loc, x.mean((0, 1)))
        assert torch.allclose(program.likelihood.units.scale, x.reshape(-1, 2).std(0, correction=0))
        assert math.isfinite(nll(program, x))


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda: vae((6,), "normal:mean=sigmoid"), lambda: table().sigmoid()),
        (lambda: vae((1, 2, 3)), lambda: table().reshape(-1, 1, 2, 3)),
        (lambda: vae((6,), "bernoulli"), lambda: (table() > 0).double()),
        (lambda: vae((6,), "poisson"), lambda: table().abs().round()),
    ],
)
def test_what_has_no_units_of_its_own_is_left_alone(make: Callable[[], Any], data: Callable[[], Tensor]) -> None:
    program = make()
    names = list(program.state_dict())
    pv.fit(program, data(), steps=2, **QUICK)
    assert list(program.state_dict()) == names


def test_data_with_levels_are_left_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "bytes.npy", np.random.default_rng(0).integers(0, 256, (40, 6), dtype=np.uint8))
    data = pv.load_data(tmp_path / "bytes.npy", dequantization="uniform")
    program = small_vae(data, likelihood="normal")
    pv.fit(program, data, steps=2, **QUICK)
    assert program.likelihood.units is None


def test_off_is_off_and_a_program_that_was_trained_keeps_what_it_has() -> None:
    x, program = table(), vae((6,))
    assert pv.fit(program, x, steps=2, standardize="off", **QUICK).record["training"]["standardize"] == "off"
    assert program.likelihood.units is None
    pv.fit(program, x, steps=2, **QUICK)
    assert program.likelihood.units is None
    program = vae((6,))
    pv.fit(program, x, steps=2, **QUICK)
    kept = copy.deepcopy(program.likelihood.units.state_dict())
    pv.fit(program, 5 * x, steps=2, **QUICK)
    assert all(torch.equal(t, kept[n]) for n, t in program.likelihood.units.state_dict().items())


def test_a_program_whose_data_are_refused_is_as_it_was() -> None:
    x, program = table(), vae((6,))
    x[3, 2] = math.nan
    before = {n: t.clone() for n, t in program.state_dict().items()}
    with pytest.raises(UserError):
        pv.fit(program, x, steps=2, **QUICK)
    assert {n: t.shape for n, t in program.state_dict().items()} == {n: t.shape for n, t in before.items()}
    assert all(torch.equal(t, before[n]) for n, t in program.state_dict().items())


def test_units_are_saved_loaded_and_not_found_anew_by_a_resumed_run(tmp_path: Path) -> None:
    np.save(tmp_path / "table.npy", (1000 * table() + 5).numpy())
    data = pv.load_data(tmp_path / "table.npy")

    def make() -> Any:
        return small_vae(data, "vamp", likelihood="normal:scale=per-pixel", prior="vamp:components=4,start=data")

    how: dict[str, Any] = {"epochs": 4, "compile": "off", "batch_size": 50, "device": "cpu"}
    whole = pv.fit(make(), data, **how, out=tmp_path / "whole")
    pv.fit(make(), data, **how, out=tmp_path / "run", callback=lambda m: m["epoch"] == 2)
    run = pv.fit(make(), data, **how, out=tmp_path / "run", resume=True)
    loaded = pv.load(tmp_path / "run")
    fresh = make()
    fresh.load_state_dict(loaded.program.state_dict())
    for program in (run.program, loaded.program, fresh, pv.load(tmp_path / "run", program=make()).program):
        assert all(torch.equal(t, program.state_dict()[n]) for n, t in whole.program.state_dict().items())
        assert nll(program, data.test) == nll(whole.program, data.test)
    assert whole.record["program"]["units"] == "columns"
    pseudo = whole.program.prior.pseudo_inputs.detach()
    assert float(pseudo.abs().max()) < 10  # of data that reach 1000
    assert float(pseudo.min()) < 0
    again = pv.fit(loaded.program, data, **how)
    assert torch.equal(again.program.likelihood.units.loc, whole.program.likelihood.units.loc)


def test_runs_of_an_older_version_are_off_and_stay_so(tmp_path: Path) -> None:
    run = pv.load(shutil.copytree(OLD / "elbo", tmp_path / "run"))
    assert run.program.likelihood.units is None
    pv.fit(run.program, pv.load_data(OLD / "table.npy"), steps=2, **QUICK)
    assert run.program.likelihood.units is None


def test_observation_scales_start_at_the_data_s(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", 400 * table().reshape(200, 1, 2, 3).numpy())
    data = pv.load_data(tmp_path / "images.npy")
    for likelihood in ("normal", "normal:scale=decoder", "laplace", "low-rank-normal:rank=2"):
        program = small_vae(data, likelihood=likelihood)
        x = pv.sample(program, 2000)
        assert 0.5 < float(x.std()) / float(data.train.std()) < 2.5


@pytest.mark.parametrize("block", [7, 64, 10_000])
def test_moments_are_those_of_numpy_however_they_are_read(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_vae.training.standardize.BLOCK_ROWS", block)
    x = 1e6 + table(150)
    sources = [x, torch.utils.data.TensorDataset(x)]
    for data in sources:
        mean, variance = moments(make_source(data, False, CPU, torch.float64))
        assert mean.numpy() == pytest.approx(x.numpy().mean(0), rel=1e-12)
        assert variance.numpy() == pytest.approx(x.numpy().var(0), rel=1e-7)
    x[4, 3] = math.nan
    mean, variance = moments(make_source(x, False, CPU, torch.float64))
    assert mean.numpy() == pytest.approx(np.nanmean(x.numpy(), 0), rel=1e-12)
    assert variance.numpy() == pytest.approx(np.nanvar(x.numpy(), 0), rel=1e-7)
