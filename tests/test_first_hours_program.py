"""A newcomer's first hours with a Pyro program of one's own: twenty steps in order, each with the outcome that the user sees."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from scipy.stats import multivariate_normal
from torch import Tensor, nn
from typed import Typed

import pyro_vae as pv
from pyro_vae.evaluation.degenerate import DegenerateFitWarning
from pyro_vae.seeding import seeded

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning"),
]
PROGRAM = '''
import pyro
import pyro.distributions as dist
import torch
from torch import nn


class Factors(nn.Module):
    """Factor analysis of a table: z ~ N(0, I), x ~ N(W z + b, s^2)."""

    def __init__(self, event_shape):
        super().__init__()
        (columns,) = event_shape
        self.decode, self.encode = nn.Linear(2, columns), nn.Linear(columns, 2)
        self.log_noise = nn.Parameter(torch.zeros(columns))
        self.log_scale = nn.Parameter(torch.zeros(2))

    def model(self, x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("factors", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("table", dist.Normal(self.decode(z), self.log_noise.exp()).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("rows", len(x)):
            pyro.sample("factors", dist.Normal(self.encode(x), self.log_scale.exp()).to_event(1))


program = Factors
'''
TRAINED: dict[str, Any] = {"lr": 0.02, "batch_size": 100, "compile": "off"}
MIXING = torch.tensor([[1.0, 0.0, 2.0, -1.0, 0.5], [0.0, 1.5, 1.0, 1.0, -2.0]])
NOISE = 0.5


def table(n: int = 1000, seed: int = 0) -> Tensor:
    with seeded(seed, torch.device("cpu")):
        return torch.randn(n, 2) @ MIXING + NOISE * torch.randn(n, 5)


def truth(x: Tensor) -> float:
    """The NLL of the density that made the table."""
    covariance = (MIXING.T @ MIXING + NOISE**2 * torch.eye(5)).numpy()
    return -float(multivariate_normal(np.zeros(5), covariance).logpdf(x.numpy()).mean())


def own() -> nn.Module:
    found: dict[str, Any] = {}
    exec(PROGRAM, found)
    with seeded(0, torch.device("cpu")):
        module: nn.Module = found["program"]((5,))
    return module


@cache
def trained() -> pv.Run:
    return pv.fit(own(), table(), epochs=300, **TRAINED)


@pytest.fixture(scope="class")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("program")
    (where / "factors.py").write_text(PROGRAM)
    np.save(where / "table.npy", table().numpy())
    return where


class TestInPython:
    def test_01_a_module_as_it_was_written_is_trained(self) -> None:
        losses = [m["train_loss"] for m in trained().metrics]
        assert losses[-1] < losses[0] - 1

    def test_02_its_number_is_the_truth(self) -> None:
        x = table(500, seed=1)
        found = pv.log_likelihood(trained().program, x, num_samples=500)
        assert abs(found.nll - truth(x)) < 4 * found.nll_mc_se + 0.1  # of weights that 1,000 rows have estimated

    def test_03_the_draws_have_the_covariance_of_the_table(self) -> None:
        x = pv.sample(trained().program, 4000, event_shape=(5,))
        assert torch.allclose(torch.cov(x.T), torch.cov(table().T), atol=0.6)

    def test_04_latents_come_by_the_name_of_their_site(self) -> None:
        assert pv.encode(trained().program, table()).shape == (1000, 2)
        tree = pv.posterior(trained().program, table(3, seed=2), num_samples=50)
        assert tree.posterior["factors"].dims == ("chain", "draw", "image", "factors_dim")

    def test_05_the_guide_against_chains(self) -> None:
        x = table(2, seed=3)
        tree = pv.posterior(trained().program, x, source="nuts", num_samples=300, num_warmup=200)
        chains = tree.posterior["factors"].mean(("chain", "draw")).values
        assert np.abs(chains - pv.encode(trained().program, x).detach().numpy()).max() < 0.3

    def test_06_functions_and_parameters_of_pyro(self) -> None:
        with seeded(1, torch.device("cpu")):
            encoder = nn.Linear(5, 2)

        def model(x: Tensor) -> None:
            weight = pyro.param("weight", lambda: 0.1 * torch.randn(2, 5))
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z @ weight, NOISE).to_event(1), obs=x)

        def guide(x: Tensor) -> None:
            pyro.module("encoder", encoder)
            with pyro.plate("rows", len(x)):
                pyro.sample("z", dist.Normal(encoder(x), 0.3).to_event(1))

        run = pv.fit(pv.adopt(model, guide), table(), epochs=200, **TRAINED)
        assert pv.log_likelihood(run.program, table(500, seed=1), num_samples=200).nll < truth(table(500, seed=1)) + 0.3
        assert len(pyro.get_param_store()) == 0

    def test_07_a_latent_that_the_guide_forgot(self) -> None:
        class Forgot(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(()))

            def model(self, x: Tensor) -> None:
                with pyro.plate("rows", len(x)):
                    z = pyro.sample("z", dist.Normal(0.0, 1.0))
                    pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, 5), self.scale.exp()).to_event(1), obs=x)

            def guide(self, x: Tensor) -> None:
                pass

        with pytest.raises(pv.UserError, match="guide: no site for the model's latent 'z'"):
            pv.fit(Forgot(), table(), epochs=1)

    def test_08_a_model_that_looks_at_the_minibatch(self) -> None:
        program = own()
        plain = program.model

        def centred(x: Tensor) -> None:
            with pyro.plate("rows", len(x)):
                z = pyro.sample("factors", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("table", dist.Normal(program.decode(z) + x.mean(0), 1.0).to_event(1), obs=x)

        program.model = centred
        with pytest.raises(pv.UserError, match="reads x itself"):
            pv.fit(program, table(), epochs=1)
        program.model = plain

    def test_09_a_collapse_is_named(self) -> None:
        program = own()
        with torch.no_grad():
            program.encode.weight.zero_()
        program.encode.requires_grad_(False)
        with pytest.warns(DegenerateFitWarning, match="none of 2 units is active"):
            pv.fit(program, table(), epochs=60, **TRAINED)

    def test_10_a_number_that_is_not_one(self) -> None:
        x = table(200)
        x[7, 2] = math.nan
        with pytest.raises(pv.UserError, match=r"row 7"):
            pv.fit(own(), x, epochs=1)


class TestAtTheCommandLine:
    def test_11_a_file_of_ones_own(self, typed: Typed, folder: Path) -> None:
        typed(
            "train table.npy --model factors.py --epochs 300 --lr 0.02 --batch-size 100 --compile off --quiet --out runs/own"
        )
        assert "validation ELBO" in typed.err

    def test_12_it_is_run_only_where_it_is_named(self, typed: Typed) -> None:
        typed("evaluate runs/own --samples 50 --quiet", status=2)
        assert "--model" in typed.err

    def test_13_and_only_if_it_is_the_one_that_was_trained(self, typed: Typed, folder: Path) -> None:
        (folder / "other.py").write_text(PROGRAM + "\nCHANGED = True\n")
        typed("evaluate runs/own --samples 50 --quiet --model other.py", status=2)
        assert "other.py" in typed.err

    def test_14_its_number(self, typed: Typed, folder: Path) -> None:
        typed("evaluate runs/own --samples 300 --json --quiet --model factors.py")
        figures = json.loads(typed.out)
        assert abs(figures["nll"] - truth(pv.load_data(folder / "table.npy").observed("test"))) < 0.4
        assert figures["active_units"] == [2]
        assert not [w for w in figures["warnings"] if "active" in w]

    def test_15_annealing_agrees(self, typed: Typed, folder: Path) -> None:
        typed("evaluate runs/own --method bdmc --limit 10 --json --quiet --model factors.py")
        figures = json.loads(typed.out)
        assert figures["bdmc_lower"] <= figures["bdmc_upper"] + 0.05
        assert figures["bdmc_gap"] < 0.5

    def test_16_samples_and_a_picture_of_them(self, typed: Typed, folder: Path) -> None:
        typed("sample runs/own --out x.npy --num 500 --draws --model factors.py")
        assert np.load(folder / "x.npy").shape == (500, 5)
        typed("sample runs/own --out x.png --model factors.py")
        assert (folder / "x.png").stat().st_size > 1000

    def test_17_against_the_declared_model_of_the_same_kind(self, typed: Typed) -> None:
        typed(
            "train table.npy --model ppca --guide linear-full-rank --set latent_dim=2 --epochs 300 --lr 0.02 --batch-size 100 "
            "--compile off --quiet --out runs/ppca"
        )
        typed("compare runs/own runs/ppca --samples 300 --json --quiet --model factors.py")
        pair = json.loads(typed.out)["comparisons"][0]
        assert abs(pair["difference"]) < 0.4  # both hold the density that made the table

    def test_18_the_posterior_as_a_file(self, typed: Typed, folder: Path) -> None:
        typed("posterior runs/own --images 2 --samples 50 --out z.nc --quiet --model factors.py")
        with xr.open_datatree(folder / "z.nc") as tree:
            assert tree.posterior["factors"].sizes["image"] == 2

    def test_19_a_page(self, typed: Typed, folder: Path) -> None:
        typed("report runs/own --samples 50 --limit 60 --model factors.py")
        assert "Factors" in (folder / "runs/own/report.html").read_text()

    def test_20_the_run_in_python_with_the_program_handed_over(self, folder: Path) -> None:
        run = pv.load(folder / "runs/own", program=own())
        x = run.load_data().observed("test")
        assert abs(pv.log_likelihood(run.program, x, num_samples=300).nll - truth(x)) < 0.4
