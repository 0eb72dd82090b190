"""Records under annealing and Markov chains, against closed forms: missing columns are latents, discrete ones summed over."""

from __future__ import annotations

import math

import pytest
import torch
from record_programs import M2, JointGaussian, gaussian_data, m2_data

import pyro_vae as pv
from pyro_vae.analysis.mcmc import sample_chains

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("draws", [False, True])
@pytest.mark.parametrize("start", ["prior", "guide"])
def test_annealing_of_columns_with_holes(draws: bool, start: str) -> None:
    """log p of what is present, and of columns given others: 100 rows, mean and spread of z-scores, level 1e-4 each."""
    program = JointGaussian(draws=draws)
    record, values, known = gaussian_data(program, 100)
    how = {"num_chains": 64, "num_distributions": 100, "start": start}
    found = pv.annealed_log_likelihood(program, record, **how)
    z = (found.log_likelihood - found.bias - program.log_prob(values, known)) / found.mc_se
    assert abs(float(z.mean())) * 10 < 3.9
    assert float(z.square().mean()) < 1 + 3.72 * math.sqrt(2 / 100) + 0.2
    some = pv.annealed_log_likelihood(program, record, of="a", given=["b"], **how)
    parts = torch.zeros_like(known), torch.zeros_like(known)
    parts[0][:, :5], parts[1][:, 2:5] = known[:, :5], known[:, 2:5]
    truth = program.log_prob(values, parts[0]) - program.log_prob(values, parts[1])
    there = record.present["a"]
    z = ((some.log_likelihood - some.bias - truth) / some.mc_se)[there]
    assert abs(float(z.mean())) * math.sqrt(len(z)) < 3.9


def test_annealing_sums_over_discrete_columns() -> None:
    """log p of M2 by annealing agrees with importance weights that sum over labels, and refuses no label."""
    program, record = M2(), m2_data(6)
    found = pv.annealed_log_likelihood(program, record, num_chains=64, num_distributions=100)
    other = pv.log_likelihood(program, record, num_samples=20_000)
    z = (found.log_likelihood - found.bias - other.log_likelihood + other.bias) / found.mc_se.hypot(other.mc_se)
    assert float(z.abs().max()) < 4.5


@pytest.mark.parametrize("draws", [False, True])
def test_chains_draw_from_the_posterior_of_what_is_present(draws: bool) -> None:
    """Means and variances of z of 20 rows, by NUTS, within five errors of the closed form."""
    program = JointGaussian(draws=draws)
    record, values, known = gaussian_data(program, 20)
    chains = sample_chains(program, record, num_samples=500, num_warmup=300)
    z = torch.from_numpy(chains.latents["z"])
    mean, precision = program.posterior(values, known)
    spread = torch.linalg.inv(precision).diagonal(dim1=-2, dim2=-1)
    error = (spread / 200).sqrt()  # of 2,000 draws, a tenth of which count
    assert float(((z.mean((0, 1)) - mean) / error).abs().max()) < 5
    assert float((z.var((0, 1)) / spread - 1).abs().max()) < 0.6
    if draws:  # a missing c is drawn with z, a present one is itself
        c = torch.from_numpy(chains.latents["c"])
        assert torch.equal(c[..., known[:, 5], 0], values[known[:, 5], 5].expand(4, 500, -1))
        own = (mean @ program.weight.T + program.shift)[:, 5].detach()
        off = (c.mean((0, 1))[:, 0] - own)[~known[:, 5]]
        assert float(off.abs().max()) < 0.4
