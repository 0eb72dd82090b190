"""Draws that are not of the posterior say so; those that are do not (every other test: warnings are errors)."""

from __future__ import annotations

import conjugate
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.analysis.convergence import Convergence
from pyro_vae.analysis.diagnostics import compare_guide
from pyro_vae.evaluation.result import UnreliableEstimateWarning


class TwoModes(nn.Module):
    """x is about z^2, so that z and -z explain it as well."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z**2, 0.05).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(1), self.scale).to_event(1))


def test_chains_that_stay_in_modes_of_their_own() -> None:
    """Four chains are in one mode by chance once in eight: in more than two of six images, once in 60."""
    x = torch.linspace(1.0, 1.5, 6).unsqueeze(1)
    with pytest.warns(
        UnreliableEstimateWarning, match=r"chains of [456] of 6 images have not converged \(R-hat above 1.05"
    ):
        tree = pv.posterior(TwoModes(), x, source="nuts", num_samples=50, num_warmup=50, predictive="none")
    found = Convergence(tree)
    assert found.rhat.shape == found.ess.shape == (6, 1)
    assert float(np.sort(found.rhat[:, 0])[2]) > 1.4
    assert "of 6 coordinates (largest " in found.line


def test_a_guide_whose_weights_cannot_be_smoothed() -> None:
    narrow = conjugate.LinearGaussian(diagonal=True, scale=0.3)
    with pytest.warns(UnreliableEstimateWarning, match=r"Pareto k is bad for 83.3% of 6 images"):
        pv.posterior(narrow, conjugate.data(), source="psis", num_samples=500)
    pv.posterior(narrow, conjugate.data(), source="guide", num_samples=500)  # is what it is


def chains(num_chains: int, num_divergent: int) -> xr.DataTree:
    """Independent draws of two images, and divergences of the second."""
    z = np.random.default_rng(0).standard_normal((num_chains, 100, 2, 3))
    diverging = np.zeros((num_chains, 100, 2), dtype=bool)
    diverging[0, :num_divergent, 1] = True
    dims = ("chain", "draw", "image")
    groups = {"posterior": {"z": ((*dims, "z_dim"), z)}, "sample_stats": {"diverging": (dims, diverging)}}
    return xr.DataTree.from_dict({n: xr.Dataset(v, coords={"image": [0, 1]}) for n, v in groups.items()})


def test_divergences_are_counted_by_image() -> None:
    assert Convergence(chains(4, 4)).warnings == []  # 1 % of the image's
    (message,) = Convergence(chains(4, 5)).warnings
    assert "more than 1% of the transitions of 1 of 2 images diverge" in message


@pytest.mark.parametrize(
    ("num_chains", "said"), [(1, "1 chain of 100 draws cannot tell"), (4, "4 chains of 6 draws cannot")]
)
def test_one_chain_or_few_draws_cannot_tell_and_say_so(num_chains: int, said: str) -> None:
    tree = chains(num_chains, 0)
    tree = tree if num_chains == 1 else tree.isel(draw=slice(6))
    found = Convergence(tree)
    assert np.isnan(found.rhat).all() == (num_chains == 1)
    (message,) = found.warnings
    assert said in message
    assert "0 divergent transitions" in found.line


def test_chains_that_never_moved_have_no_rhat_and_say_so() -> None:
    tree = chains(4, 0)
    tree["posterior"]["z"].values[:, :, 1, 0] = 0.5
    (message,) = Convergence(tree).warnings
    assert "the chains of 1 of 2 images have no R-hat" in message


def test_whoever_runs_one_chain_is_told() -> None:
    options = {"num_samples": 20, "num_warmup": 20, "predictive": "none"}
    for source in ("nuts", "hmc"):
        with pytest.warns(UnreliableEstimateWarning, match="1 chain of 20 draws cannot tell"):
            tree = pv.posterior(conjugate.LinearGaussian(), conjugate.data(2), source=source, num_chains=1, **options)
    with pytest.warns(UnreliableEstimateWarning, match="1 chain of 20 draws cannot tell"):
        table = compare_guide(conjugate.LinearGaussian(), conjugate.data(2), chains=tree, num_samples=20)
    assert np.isnan(table["rhat"]).all()
