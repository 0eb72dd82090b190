"""Gradient estimators of the several-sample bounds: what they must equal in expectation, and where they must be quieter.

Statistical checks project gradients on fixed random directions and compare means by z-tests, two-sided at a level of 1e-4 after
Bonferroni's correction over the directions; seeds are fixed.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import norm
from torch import nn

from pyro_vae import registry
from pyro_vae.errors import UserError
from pyro_vae.objectives.aggregate import mmd
from pyro_vae.objectives.elbo import ELBO
from pyro_vae.spec import build

LEVEL = 1e-4
DIRECTIONS = 6
DRAWS = 250


def objective(name, **options):
    return registry.get("objectives", name)(**options)


@pytest.fixture(scope="module")
def vae():
    hidden = {"decoder.hidden": [8], "encoder.hidden": [8]}
    return build("mlp", "diagonal", (1, 3, 3), latent_dim=2, **hidden).double()


@pytest.fixture(scope="module")
def x():
    return torch.rand(8, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).round()


def gradients(objective, program, x, seed, draws=DRAWS):
    """Gradients ``(draws, parameters)``, and the mask of the guide's."""
    parameters = dict(program.named_parameters())
    guide = torch.cat([torch.full((p.numel(),), n.startswith(("encoder", "posterior"))) for n, p in parameters.items()])
    rows = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(draws):
            _, surrogate = objective(program, x)
            grads = torch.autograd.grad(surrogate, list(parameters.values()), allow_unused=True, materialize_grads=True)
            rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows), guide


def same_mean(a, b):
    """Whether two samples of gradients agree in mean along the directions."""
    directions = torch.randn(a.shape[1], DIRECTIONS, dtype=a.dtype, generator=torch.Generator().manual_seed(0))
    a, b = a @ directions, b @ directions
    z = (a.mean(0) - b.mean(0)) / (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
    return float(z.abs().max()) < norm.isf(LEVEL / DIRECTIONS / 2)


@pytest.mark.parametrize("num_particles", [1, 4])
def test_dreg_has_the_expectation_of_iwae_and_less_variance(vae, x, num_particles):
    a, guide = gradients(objective("dreg", num_particles=num_particles), vae, x, 0)
    b, _ = gradients(objective("iwae", num_particles=num_particles), vae, x, 1)
    assert same_mean(a, b)
    assert a.var(0)[guide].sum() < b.var(0)[guide].sum()


def test_stl_has_the_expectation_of_the_elbo(vae, x):
    a, _ = gradients(objective("stl"), vae, x, 2)
    b, _ = gradients(ELBO(), vae, x, 3)
    assert same_mean(a, b)


def test_the_check_finds_a_biased_gradient(vae, x):
    a, _ = gradients(objective("iwae", num_particles=8), vae, x, 4)
    b, _ = gradients(ELBO(), vae, x, 5)
    assert not same_mean(a, b)


def test_stl_has_no_variance_where_the_guide_is_exact():
    class Exact(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def model(self, x):
            with pyro.plate("data", x.shape[0], dim=-1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", x.shape[0], dim=-1):
                pyro.sample("z", dist.Normal(x / 2 + self.shift, 0.5**0.5).to_event(1))

    a, _ = gradients(
        objective("stl"), Exact(), torch.randn(5, 1, dtype=torch.float64, generator=torch.Generator()), 0, 20
    )
    assert float(a.abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("name", "options", "other"),
    [
        ("iwae", {"num_particles": 1}, ELBO()),
        ("renyi", {"alpha": 0.0, "num_particles": 3}, objective("iwae", num_particles=3)),
        ("tc", {"beta": 1.0}, ELBO()),
        ("mmd", {"alpha": 0.0, "weight": 1.0}, ELBO()),
        ("free-bits", {"free": 0.0}, None),
    ],
)
def test_limits(vae, x, name, options, other):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        loss, surrogate = objective(name, **options)(vae, x)
        torch.manual_seed(7)
        if other is not None:
            torch.testing.assert_close(surrogate, other(vae, x)[1], rtol=1e-10, atol=0)
    assert torch.isfinite(loss)
    assert surrogate.requires_grad


@pytest.mark.parametrize("name", registry.names("objectives"))
def test_every_objective_trains_every_parameter(vae, x, name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            loss, surrogate = objective(name)(vae, x)
        except UserError as refusal:
            pytest.skip(f"refused for continuous latents, and tested elsewhere: {refusal}")
        vae.zero_grad()
        surrogate.backward()
    assert loss.shape == ()
    assert not loss.requires_grad
    for parameter, value in vae.named_parameters():
        assert value.grad is not None, parameter
        assert torch.isfinite(value.grad).all(), parameter
    vae.zero_grad()


def test_free_bits_floors_each_coordinate(vae, x):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, surrogate = objective("free-bits", free=50.0)(vae, x)
        torch.manual_seed(0)
        loss, _ = ELBO()(vae, x)
    assert float(surrogate.detach()) > 2 * 50.0
    assert loss < surrogate


def test_mmd_of_equal_and_shifted_samples():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 500, 3, generator=generator)
    assert abs(float(mmd(a, b))) < 5e-3
    assert float(mmd(a, b + 1)) > 0.1


class Discrete(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 3).double(), nn.Linear(3, 4).double()

    def model(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((3,), 0.5)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decode(z)).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=self.encode(x)).to_event(1))


def test_path_gradients_refuse_discrete_latents_and_wake_sleep_takes_them():
    x = torch.ones(6, 4, dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        program = Discrete()
    for name in ("iwae", "dreg", "stl", "renyi", "free-bits", "mmd"):
        with torch.random.fork_rng(devices=[]), pytest.raises(UserError, match=f"{name}.*reparameterized"):
            objective(name)(program, x)
    with torch.random.fork_rng(devices=[]):
        _, surrogate = objective("wake-sleep")(program, x)
    surrogate.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in program.parameters())
