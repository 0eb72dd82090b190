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
    x = torch.tensor([[1.0], [1.5]])
    with pytest.warns(
        UnreliableEstimateWarning, match=r"chains of 2 of 2 images have not converged \(R-hat above 1.05"
    ):
        tree = pv.posterior(TwoModes(), x, source="nuts", num_samples=50, num_warmup=50, predictive="none")
    found = Convergence(tree)
    assert found.rhat.shape == found.ess.shape == (2, 1)
    assert "R-hat below 1.01 for 0.0% of 2 coordinates" in found.line


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


def test_one_chain_has_no_rhat() -> None:
    found = Convergence(chains(1, 0))
    assert np.isnan(found.rhat).all()
    assert found.warnings == []
    assert found.line.startswith("0 divergent transitions; no R-hat")
