"""Sobol noise: the law of independent draws, less error in few dimensions, and an error bar that covers."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import pyro_vae as pv
from pyro_vae.capture import CaptureWarning
from pyro_vae.evaluation.quasi import SobolNoise, length_of
from pyro_vae.evaluation.result import UnreliableEstimateWarning
from pyro_vae.seeding import seeded


@pytest.fixture(scope="module")
def ppca() -> tuple[Any, torch.Tensor]:
    with seeded(0):
        vae, x = pv.build("ppca", "linear", (3,), latent_dim=2).double(), torch.randn(500, 3, dtype=torch.float64)
    pv.fit(vae, x, steps=400, batch_size=100, lr=0.02)
    return vae, x[:20]


def log_likelihood(*args: Any, **options: Any) -> pv.LogLikelihood:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)
        return pv.log_likelihood(*args, **options)


def noise(first: int, number: int, seed: int = 0, length: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    with seeded(0), SobolNoise(seed, 0, first, number, length):
        return torch.randn(number, 3, 2), torch.empty(number, 3).uniform_(-1, 1)


def test_every_draw_has_the_law_of_an_independent_one() -> None:
    draws = [noise(5, 1, seed) for seed in range(800)]
    normal, uniform = (torch.stack(parts).squeeze(1) for parts in zip(*draws, strict=True))
    for i in range(3):
        assert stats.kstest(normal[:, i, 0], "norm").pvalue > 1e-4
        assert stats.kstest(uniform[:, i], stats.uniform(-1, 2).cdf).pvalue > 1e-4
    columns = torch.cat([normal.flatten(1), uniform], 1).numpy()
    correlations = np.corrcoef(columns.T)[np.triu_indices(9, 1)]
    assert abs(correlations).max() < 4.5 / np.sqrt(800)  # images, coordinates and latents are independent


def test_points_are_the_same_however_they_are_cut() -> None:
    whole = noise(0, 100)
    parts = [noise(first, number) for first, number in ((0, 40), (40, 50), (90, 10))]
    for all_at_once, cut in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(all_at_once, torch.cat(cut))


def test_points_fill_space_evenly() -> None:
    normal, _ = noise(0, 64)
    counts = torch.histc(torch.special.ndtr(normal[:, 0, 0]), 8, 0, 1)
    assert counts.max() - counts.min() <= 3  # 8 each, but for the shift


def test_the_error_is_smaller_and_its_bar_is_right(ppca: tuple[Any, torch.Tensor]) -> None:
    vae, x = ppca
    many = log_likelihood(vae, x, num_samples=200_000, seed=99)
    truth = many.log_likelihood - many.bias
    scores, errors = [], {"random": [], "sobol": []}
    for seed in range(30):
        for kind, found in errors.items():
            result = log_likelihood(vae, x, num_samples=1024, seed=seed, noise=kind)
            error = result.log_likelihood - result.bias - truth
            found.append(error)
            if kind == "sobol":
                scores.append(error / (result.mc_se.square() + many.mc_se.square()).sqrt())
    spread = {kind: torch.stack(found).square().mean().sqrt() for kind, found in errors.items()}
    assert spread["sobol"] < 0.5 * spread["random"]
    # 600 scores of about 15 degrees of freedom: a mean square of 15/13, to 4.5 standard errors of itself
    assert 0.7 < torch.stack(scores).square().mean() < 1.7


def test_blocks_do_not_change_it(ppca: tuple[Any, torch.Tensor]) -> None:
    vae, x = ppca
    one, other = (log_likelihood(vae, x[:1], num_samples=500, noise="sobol", chunk_size=n) for n in (500, 60))
    torch.testing.assert_close(one.log_likelihood, other.log_likelihood)
    torch.testing.assert_close(one.mc_se, other.mc_se)
    assert "sobol noise" in str(one)
    assert one.summary()["noise"] == "sobol"


def test_what_cannot_be_is_said(ppca: tuple[Any, torch.Tensor]) -> None:
    vae, x = ppca
    with pytest.raises(pv.UserError, match=r"unknown noise 'sobel'.*sobol"):
        pv.log_likelihood(vae, x, noise="sobel")
    with pytest.raises(pv.UserError, match="target_se needs random noise"):
        pv.log_likelihood(vae, x, noise="sobol", target_se=0.1)
    with pytest.warns(CaptureWarning, match="Sobol noise is not made in graphs"):
        log_likelihood(vae, x[:1], num_samples=100, noise="sobol", compile="on")
    assert length_of(5000) == 313
