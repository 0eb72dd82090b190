"""Wake-sleep and Monte Carlo EM against closed forms: z ~ N(0, 1), x | z ~ N(z + shift, 1)."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from one_latent import OneLatent, exact
from torch import nn

import pyro_vae as pv
from pyro_vae import registry
from pyro_vae.errors import UserError


def wake_sleep(phase):
    return registry.get("objectives", "wake-sleep")(num_particles=1, phase=phase)


def with_guide(slope, scale):
    """q(z | x) = N(slope x, scale)."""
    program = OneLatent(lambda x: dist.Normal(program.slope * x[:, 0], program.scale))
    program.slope, program.scale = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (slope, scale))
    return program


@pytest.mark.parametrize(("slope", "scale"), [(0.5, 0.5**0.5), (0.2, 1.0)])
def test_the_sleep_phase_follows_the_divergence_of_dreams(slope, scale):
    # E_p[-log q(z | x)] = log s + (1 - 2 a + 2 a^2) / (2 s^2): x has variance 2, and covariance 1 with z.
    # Means of 40 gradients of 1,000 dreams: 4.5 errors are passed by chance once in 1e5; the wake phase's is 0 or elsewhere.
    program, x = with_guide(slope, scale), torch.zeros(1000, 1, dtype=torch.float64)
    found = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(40):
            program.zero_grad()
            wake_sleep("sleep")(program, x)[1].backward()
            found.append(torch.stack([program.slope.grad, program.scale.grad]))
    grads = torch.stack(found)
    want = torch.tensor([(2 * slope - 1) / scale**2, 1 / scale - (1 - 2 * slope + 2 * slope**2) / scale**3])
    error = grads.std(0) / len(grads) ** 0.5
    assert ((grads.mean(0) - want).abs() < 4.5 * error).all()
    assert (error < 0.02).all()


def test_dreams_teach_the_model_nothing():
    program, x = with_guide(0.2, 1.0), torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]
    grads = []
    for phase in ("wake", "sleep"):
        program.zero_grad()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            wake_sleep(phase)(program, x)[1].backward()
        grads.append(program.shift.grad.clone())
    assert torch.equal(*grads)


def test_monte_carlo_em_finds_the_maximum_and_leaves_exact_posteriors():
    # log p(x) = log N(x; shift, 2): the best shift is the mean of the data; draws of 400 rows leave 0.05
    random = torch.Generator().manual_seed(0)
    x = 1.5 + 2**0.5 * torch.randn(400, 1, dtype=torch.float64, generator=random)
    program = OneLatent(exact)
    em = pv.MonteCarloEM(program, x, batch_size=200, lr=0.1, seed=0)
    state = torch.get_rng_state()
    metrics = em.run(40)
    assert torch.equal(state, torch.get_rng_state())
    assert abs(float(program.shift.detach() - x.mean())) < 0.15
    assert 0.8 < metrics[-1]["acceptance_rate"] < 0.98
    # chains at the posterior N((x - shift) / 2, 1/2): means and variances of 400 standardised draws, by five errors
    z = em.latents()["z"]
    standard = (z - (x[:, 0] - program.shift.detach()) / 2) / 0.5**0.5
    assert abs(float(standard.mean())) < 5 / 20
    assert abs(float(standard.var()) - 1) < 5 * (2 / 400) ** 0.5


def test_monte_carlo_em_goes_on_to_the_bit():
    x = torch.linspace(-1, 3, 12, dtype=torch.float64)[:, None]
    whole = pv.MonteCarloEM(OneLatent(exact), x, batch_size=5, seed=3)
    whole.run(4)
    first = pv.MonteCarloEM(OneLatent(exact), x, batch_size=5, seed=3)
    first.run(2)
    again = pv.MonteCarloEM(OneLatent(exact), x, batch_size=5, seed=3)
    again.load_state_dict(first.state_dict())
    again.run(2)
    assert torch.equal(whole.program.shift, again.program.shift)
    assert torch.equal(whole.latents()["z"], again.latents()["z"])


def test_monte_carlo_em_refuses_what_has_no_gradient():
    program = pv.build("categorical-latents", "score-categorical", (1, 4, 4))
    with pytest.raises(UserError, match="discrete"):
        pv.MonteCarloEM(program, torch.zeros(4, 1, 4, 4))
    with pytest.raises(UserError, match="batch_size"):
        pv.MonteCarloEM(OneLatent(exact), torch.zeros(4, 1, dtype=torch.float64), batch_size=0)
