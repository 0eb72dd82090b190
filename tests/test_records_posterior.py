"""Records as ArviZ takes them, and drawn column by column."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from record_programs import M2, JointGaussian, gaussian_data, m2_data

import pyro_vae as pv
from pyro_vae.evaluation.result import UnreliableEstimateWarning


@pytest.mark.parametrize("source", ["psis", pytest.param("nuts", marks=pytest.mark.slow)])
def test_posterior_trees_have_missing_columns_among_the_latents(source: str) -> None:
    """Means of z and of a missing c agree with the closed form; every column has predictions and, where present, data."""
    program = JointGaussian(draws=True)
    record, values, known = gaussian_data(program, 12)
    how = {"num_warmup": 100} if source == "nuts" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)  # few draws of chains that were hardly warmed up
        tree = pv.posterior(program, record, num_samples=150, source=source, **how)
    mean, precision = program.posterior(values, known)
    spread = torch.linalg.inv(precision).diagonal(dim1=-2, dim2=-1).sqrt().numpy()
    found = tree["posterior"].to_dataset()
    assert float(np.abs((found["z"].mean(("chain", "draw")).values - mean.numpy()) / spread).max()) < 5 / math.sqrt(60)
    assert found["c"].sizes == {"chain": 4, "draw": 150, "image": 12, "c_dim": 1}
    observed, predicted = (tree[group].to_dataset() for group in ("observed_data", "posterior_predictive"))
    assert set(observed) == set(predicted) == {"a", "b", "c"}
    assert np.array_equal(np.isfinite(observed["b"].values), known[:, 2:5].numpy())
    prior = tree["prior"].to_dataset()
    assert abs(float(prior["z"].mean())) < 0.2
    assert set(tree["prior_predictive"].to_dataset()) == {"a", "b", "c"}


def test_markov_chains_and_trees_of_discrete_latents_are_refused() -> None:
    """By name, and weights are not given a k that cannot see states."""
    with pytest.raises(pv.UserError, match="label are summed over"):
        pv.posterior(M2(), m2_data(6), num_samples=30, source="nuts")
    tree = pv.posterior(M2(), m2_data(6), num_samples=30)
    assert bool(np.isnan(tree["sample_stats"].to_dataset()["khat"].values).all())
    assert set(np.unique(tree["posterior"].to_dataset()["label"].values)) <= {0, 1, 2}


def test_columns_are_drawn_given_others() -> None:
    """Of M2: images of a label have that label's mean; labels have the prior's probabilities; means are means."""
    program = M2()
    drawn = pv.sample_columns(program, 4000, given={"label": 2}, columns={"image": (6,), "label": ()}, seed=1)
    assert bool((drawn["label"] == 2).all())
    mean = pv.sample_columns(program, 4000, given={"label": 2}, mean=True, seed=2)["image"]
    off = (drawn["image"].mean(0) - mean.mean(0)) / (0.25 / 4000 + mean.var(0) / 4000).sqrt()
    assert float(off.abs().max()) < 4.5
    classes = pv.sample_columns(program, 8, mean=True)["label"]
    assert torch.allclose(classes, program.prior.softmax(0).detach().expand(8, 3).to(classes))
    with pytest.raises(pv.UserError, match="no column 'lable'"):
        pv.sample_columns(program, given={"lable": 2})
