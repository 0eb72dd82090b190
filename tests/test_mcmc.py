"""NUTS and HMC: that they leave their density alone, adapt, and refuse what they cannot do. Closed forms: test_posterior.py."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import conjugate
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from arviz_stats.base import array_stats
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.analysis.adaptation import DualAveraging, windows
from pyro_vae.analysis.mcmc import sample_chains, starting_points
from pyro_vae.analysis.nuts import NUTS
from pyro_vae.evaluation.unconstrained import Unconstrained
from pyro_vae.programs.examination import examined
from pyro_vae.seeding import generator

FALSE_ALARM = 1e-3


class Independent(nn.Module):
    """Latents of several shapes and supports, of which the data say nothing: their posterior is their prior."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("rate", dist.Gamma(x.new_tensor(3.0), 2.0))
            pyro.sample("share", dist.Beta(x.new_full((2,), 2.0), 4.0).to_event(1))
            pyro.sample("heavy", dist.StudentT(x.new_full((1, 2), 5.0)).to_event(2))
            pyro.sample("x", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("rate", dist.Gamma(x.new_tensor(1.0), 1.0))
            pyro.sample("share", dist.Beta(x.new_full((2,), 2.0), 2.0).to_event(1))
            pyro.sample("heavy", dist.Normal(x.new_zeros(1, 2), 0.5).to_event(2))


@pytest.mark.parametrize("kernel", [pytest.param("nuts", marks=pytest.mark.slow), "hmc"])
def test_the_density_is_left_alone_on_constrained_and_heavy_tailed_latents(kernel: str, record_property: Any) -> None:
    x = torch.zeros(8, 3, dtype=torch.float64)
    chains = sample_chains(Independent().double(), x, kernel=kernel, num_samples=300, num_warmup=120)
    assert {n: v.shape[3:] for n, v in chains.latents.items()} == {"rate": (), "share": (2,), "heavy": (1, 2)}
    exact = {"rate": scipy.stats.gamma(3, scale=0.5), "share": scipy.stats.beta(2, 4), "heavy": scipy.stats.t(5)}
    # the probability of each quarter of every coordinate, one z-score each, Bonferroni over all
    z = []
    for name, law in exact.items():
        for level in (0.25, 0.5, 0.75):
            below = (chains.latents[name] <= law.ppf(level)).astype(float)
            below = below.reshape(*below.shape[:3], -1)
            ess = array_stats.ess(below, method="mean", chain_axis=0, draw_axis=1)
            z.append(((below.mean((0, 1)) - level) / np.sqrt(level * (1 - level) / ess)).ravel())
    z = np.concatenate(z)
    record_property("largest standardised error of quartiles", float(np.abs(z).max()))
    assert np.abs(z).max() < scipy.stats.norm.ppf(1 - FALSE_ALARM / (2 * len(z)))


class _Normal:
    """A standard normal in D dimensions in place of a program's density."""

    def __init__(self, batch: int, dim: int) -> None:
        self.scale, self.gradients, self.num_chains = torch.ones(batch, dim, dtype=torch.float64), [0], 1

    def __call__(self, v: Tensor) -> tuple[Tensor, Tensor]:
        return -0.5 * v.square().sum(-1), -v

    def of(self, keep: Tensor) -> _Normal:
        return _Normal(len(keep), self.scale.shape[1])


def test_a_step_of_nuts_keeps_exact_draws_exact_at_a_coarse_step(record_property: Any) -> None:
    # Many chains that start exactly distributed, each some transitions: still standard normal, whatever the step. The step is so
    # coarse that trees turn inside halves, points are chosen by unequal weights and some halves are thrown away.
    chains, dim = 4000, 2
    for step in (1.5, 0.4):
        start = torch.randn(chains, 3, dim, generator=generator(1), dtype=torch.float64)
        nuts = NUTS(_Normal(3, dim), start, 6, generator(2))  # type: ignore[arg-type]
        record = nuts.run(3, torch.full((3,), step, dtype=torch.float64))
        square = record.draws[-1].square().sum(-1).flatten().numpy()
        p = scipy.stats.kstest(square, scipy.stats.chi2(dim).cdf).pvalue
        angle = torch.atan2(record.draws[-1][..., 0], record.draws[-1][..., 1]).flatten().numpy()
        q = scipy.stats.kstest(angle, scipy.stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue
        record_property(f"p-values at step {step}", (p, q))
        assert min(p, q) > FALSE_ALARM / 4
        assert len(np.unique(record.statistics["n_steps"])) > 1


def test_trajectories_are_no_longer_than_the_depth_allows_and_turn_before() -> None:
    start = torch.zeros(50, 1, 1, dtype=torch.float64)
    nuts = NUTS(_Normal(1, 1), start, 3, generator(0))  # type: ignore[arg-type]
    short = nuts.run(20, torch.full((1,), 1e-3, dtype=torch.float64)).statistics
    assert (short["tree_depth"] == 3).all()
    assert (short["n_steps"] == 7).all()
    nuts = NUTS(_Normal(1, 1), start, 10, generator(0))  # type: ignore[arg-type]
    long = nuts.run(20, torch.full((1,), 0.1, dtype=torch.float64)).statistics
    # half a period of a harmonic oscillator is pi: 31 steps of 0.1, and 63 once doubled
    assert long["n_steps"].max() <= 63
    assert long["n_steps"].mean() > 7
    assert float(long["acceptance_rate"].mean()) > 0.99


def test_divergences_are_counted() -> None:
    start = torch.ones(20, 1, 1, dtype=torch.float64)
    wild = NUTS(_Normal(1, 1), start, 8, generator(0)).run(5, torch.full((1,), 100.0, dtype=torch.float64))  # type: ignore[arg-type]
    assert wild.statistics["diverging"].any()
    assert (wild.draws == 1).any()  # rejected: the chain stays where it was


def test_chains_start_twice_as_far_from_the_guides_mean_as_its_draws_and_at_the_prior() -> None:
    program, x = conjugate.LinearGaussian(), conjugate.data(200)
    with torch.no_grad():
        start, scale = starting_points(Unconstrained(examined(program, x).traces, x), 4, seed=0)
    mean, covariance = program.exact(x)
    spread = (start - mean)[::2].std((0, 1)) / covariance.diagonal().sqrt()
    np.testing.assert_allclose(spread, 2.0, rtol=0.15)
    np.testing.assert_allclose(start[1::2].std((0, 1)), 1.0, rtol=0.15)  # of the prior
    np.testing.assert_allclose(scale.mean(0), covariance.diagonal().sqrt(), rtol=0.05)


@pytest.mark.parametrize("target", [pytest.param(0.6, marks=pytest.mark.slow), 0.9])
def test_the_acceptance_comes_to_its_target(target: float) -> None:
    # Averaged step sizes are a little too small, as in Stan: the acceptance lies above its target.
    program, x = conjugate.LinearGaussian(diagonal=True), conjugate.data()
    chains = sample_chains(program, x, num_samples=100, num_warmup=200, target_accept=target)
    assert -0.05 < chains.statistics["acceptance_rate"].mean() - target < 0.2


def test_dual_averaging_waits_until_as_many_trajectories_have_ended_as_there_are_chains() -> None:
    averaging = DualAveraging(torch.tensor([0.5, 0.5]), 0.8)
    ended = torch.tensor([[True, True], [False, True]])
    step = averaging(torch.zeros(2, 2), ended)
    assert step[0] == 0.5
    assert step[1] != 0.5
    step = averaging(torch.zeros(2, 2), ended)
    assert step[0] != 0.5
    # and it falls while everything is rejected, and rises while nothing is
    for acceptance, low, high in ((0.0, 0.0, 1e-3), (1.0, 10.0, torch.inf)):
        averaging = DualAveraging(torch.tensor([0.5]), 0.8)
        for _ in range(50):
            step = averaging(torch.full((2, 1), acceptance), torch.ones(2, 1, dtype=torch.bool))
        assert low < float(step) < high


@pytest.mark.parametrize("num_warmup", [0, 1, 20, 100, 400, 1000, 1013])
def test_the_windows_add_up(num_warmup: int) -> None:
    first, middle, last = windows(num_warmup)
    assert first + sum(middle) + last == num_warmup
    assert all(a <= b for a, b in pairwise(middle))


def test_progress_adds_up_and_blocks_agree() -> None:
    program, x = conjugate.LinearGaussian(diagonal=True), conjugate.data()
    done: list[float] = []
    for kernel in ("nuts", "hmc"):
        done.clear()
        chains = sample_chains(
            program, x, kernel=kernel, num_samples=40, num_warmup=20, chunk_size=12, progress=done.append
        )
        assert chains.chunk_size == 12  # two blocks of three images
        assert chains.latents["z"].shape == (4, 40, 6, 3)
        assert abs(sum(done) - 6) < 1e-6
        assert chains.num_gradients > 4 * 6 * 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "gibbs"}, "'nuts' or 'hmc'"),
        ({"num_chains": 0}, "num_chains"),
        ({"max_tree_depth": 0}, "max_tree_depth"),
    ],
)
def test_what_a_user_can_mend_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(pv.UserError, match=message):
        sample_chains(conjugate.LinearGaussian(), conjugate.data(), **options)
