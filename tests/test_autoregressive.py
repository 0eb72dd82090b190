"""The autoregressive Bernoulli likelihood: causal, normalised, and drawn as it is scored."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import scipy.stats
import torch
from densities import gradients, shaken
from torch import Tensor
from torch.autograd.functional import jacobian

import pyro_vae as pv
from pyro_vae.errors import UserError
from pyro_vae.likelihoods.autoregressive_bernoulli import AutoregressiveBernoulli
from pyro_vae.programs.latents import mean_of
from pyro_vae.seeding import generator, seeded

FEATURES = 3
DRAWS = 4_000
ALPHA = 1e-4  # of a chi-square test
SMALL: dict[str, Any] = {"channels": 6, "layers": 2, "kernel": 3, "maps": 2}


def density(event_shape: tuple[int, ...], **options: Any) -> Any:
    with seeded(0):
        likelihood: Any = shaken(AutoregressiveBernoulli((FEATURES,), event_shape, **{**SMALL, **options}))
    return likelihood(torch.randn(FEATURES, generator=generator(2), dtype=torch.float64))


def all_images(*shape: int) -> Tensor:
    pixels = torch.Size(shape).numel()
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=pixels)), dtype=torch.float64).reshape(-1, *shape)


@pytest.mark.parametrize(("shape", "kernel"), [((1, 4, 5), 7), ((2, 3, 3), 3), ((3, 3, 2), 5), ((6,), 3)])
def test_a_pixel_depends_on_those_before_it_and_on_no_other(shape: tuple[int, ...], kernel: int) -> None:
    p = density(shape, kernel=kernel)
    x = torch.rand(shape, generator=generator(1), dtype=torch.float64)
    c, h, w = p.logits.shape[-3:]

    def odds(x: Tensor) -> Tensor:  # in the order of drawing: pixel by pixel, and channel by channel in each
        return p.log_odds(x).movedim(0, -1).flatten()

    size = c * h * w
    derivative = jacobian(odds, x).reshape(size, c, h, w).movedim(1, -1).reshape(size, size).detach()
    assert not bool(derivative.triu().any())
    # and it does depend on the ones right before it: on every pixel here, but for the blind ones of a small kernel
    assert bool(derivative.diagonal(-1)[c - 1 :: c].any())
    assert c == 1 or bool(derivative.diagonal(-1).reshape(-1)[: c - 1].all())
    if shape == (1, 4, 5):
        assert int((derivative.tril(-1) == 0).sum() - derivative.triu().numel() + size * (size - 1) // 2) < size


@pytest.mark.parametrize("shape", [(1, 2, 2), (2, 2, 1), (3,), (3, 1, 2)])
def test_it_sums_to_one_over_all_images(shape: tuple[int, ...]) -> None:
    total = density(shape).log_prob(all_images(*shape)).exp().sum()
    torch.testing.assert_close(total, torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("shape", [(1, 2, 2), (2, 1, 2)])
def test_draws_have_the_frequencies_of_the_density(shape: tuple[int, ...]) -> None:
    p = density(shape)
    images = all_images(*shape)
    with seeded(4):
        drawn = p.sample((DRAWS,))
    powers = 2.0 ** torch.arange(images[0].numel() - 1, -1, -1, dtype=torch.float64)
    seen = (drawn.flatten(1) @ powers).long().bincount(minlength=len(images)).double()
    expected = p.log_prob(images).exp().detach() * DRAWS
    assert float(expected.min()) > 5
    assert float(((seen - expected) ** 2 / expected).sum()) < scipy.stats.chi2.ppf(1 - ALPHA, len(images) - 1)


def test_the_pixels_depend_on_each_other() -> None:
    """No product of independent pixels has this density: its mutual information is far from zero."""
    p = density((1, 2, 2))
    images = all_images(1, 2, 2)
    mass = p.log_prob(images).exp().detach()
    independent = torch.where(images == 1, p.mean.detach(), 1 - p.mean.detach()).flatten(1).prod(-1)
    assert float((mass * (mass / independent).log()).sum()) > 1e-3


def test_the_mean_is_summed_where_that_is_cheap_and_drawn_elsewhere() -> None:
    small, large = density((1, 2, 2)), density((1, 4, 4))
    images = all_images(1, 2, 2)
    torch.testing.assert_close(small.mean, (small.log_prob(images).exp()[:, None, None, None] * images).sum(0))
    with pytest.raises(NotImplementedError, match="average draws"):
        _ = large.mean
    with seeded(0):
        mean = mean_of(large)
    assert mean.shape == (1, 4, 4)
    assert bool(((mean * 64).round() == mean * 64).all())


def test_gradients_reach_every_parameter_in_colour() -> None:
    with seeded(0):
        likelihood: Any = shaken(AutoregressiveBernoulli((FEATURES,), (3, 4, 4), **SMALL))
        x, f = torch.rand(5, 3, 4, 4).round().double(), torch.randn(2, 5, FEATURES).double()
    p = likelihood(f)
    assert p.log_prob(x).shape == (2, 5)
    torch.testing.assert_close(p.log_prob(x)[1, 3], likelihood(f[1, 3]).log_prob(x[3]))
    assert gradients(likelihood, (p.log_prob(x) * torch.linspace(0.5, 2, 5).double()).sum()) == []


def test_the_declared_model_runs_on_digits() -> None:
    vae = pv.build("pixelvae", "diagonal", (1, 8, 8), likelihood={"name": "autoregressive-bernoulli", **SMALL})
    assert pv.sample(vae, 3).shape == (3, 1, 8, 8)
    assert set(pv.sample(vae, 3).unique().tolist()) <= {0.0, 1.0}
    # at the start, pixels are independent of x: log-odds of 0 plus what z says
    x = torch.rand(4, 1, 8, 8, generator=generator(0)).round()
    z = torch.zeros(4, 40)
    p = vae.likelihood(vae.decoder(z))
    torch.testing.assert_close(p.log_odds(x), p.log_odds(1 - x))


def test_what_it_cannot_take_is_refused() -> None:
    with pytest.raises(UserError, match="at most 2 channels"):
        AutoregressiveBernoulli((FEATURES,), (3, 4, 4), channels=2)
    with pytest.raises(UserError, match="not events of"):
        AutoregressiveBernoulli((FEATURES,), (1, 3, 4, 4))
    with pytest.raises(UserError, match="kernel = 4"):
        pv.build("pixelvae", "diagonal", (1, 8, 8), likelihood="autoregressive-bernoulli:kernel=4")
