"""Rounding is a kind of error: densities in float32 against float64 over the range of their data, and what is said of others."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from test_captured import declared, observations
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import registry
from pyro_vae.evaluation.rounding import rounding_error
from pyro_vae.seeding import generator, seeded

ROWS, DIM = 64, 6
SCALES = (1e-6, 1e-3, 1.0, 1e3, 1e5, 1e6, 1e7, 1e9)
SHARP = {
    "negative-binomial": 1e4,
    "zero-inflated-negative-binomial": 1e4,
}  # a dispersion at which it is nearly a Poisson


def data(kind: str, scale: float) -> Tensor:
    draw = generator(1)
    if kind == "count":
        return torch.poisson(torch.full((ROWS, DIM), scale), generator=draw)
    if kind == "real":
        return scale * (1 + 0.3 * torch.randn(ROWS, DIM, generator=draw))
    level = torch.rand(ROWS, DIM, generator=draw)
    return {"binary": level.round(), "lattice": (level * 255).round() / 255, "unit": 0.01 + 0.98 * level}[kind]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", registry.names("likelihoods"))
def test_a_likelihood_in_float32_is_that_in_float64(name: str, scale: float) -> None:
    block: Any = registry.get("likelihoods", name)
    x = data(block.data, scale)
    for theta in (1.0, SHARP[name]) if name in SHARP else (None,):
        with seeded(2), torch.no_grad():
            one = block((5,), (DIM,))
            one.start_at(x.mean(0), float(x.std()))
            if theta is not None:
                one.raw_dispersion.fill_(theta)
            features = 0.01 * torch.randn(ROWS, 5)
            found = one(features).log_prob(x)
            exact = copy.deepcopy(one).double()(features.double()).log_prob(x.double())
        assert found.dtype == torch.float32
        # one part in a million of log p, and of sqrt(x) / x where counts stand at the end of their rates' digits
        tolerance = 1e-4 + 2e-6 * exact.abs() + (1e-6 * math.sqrt(scale) if block.data == "count" else 0.0)
        off = (found.double() - exact).abs()
        assert bool((off <= tolerance).all()), f"{name} at {scale:g}: off by {float(off.max()):.2g} of {exact[0]:.4g}"


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in ("priors", "posteriors") for name in registry.names(kind)]
)
def test_weights_in_float32_are_those_in_float64(kind: str, name: str) -> None:
    blocks, _ = declared(kind, name)
    x = observations(blocks).float()
    with seeded(0):
        vae = pv.build("mlp", "diagonal", tuple(x.shape[1:]), **blocks)
    off = rounding_error(vae, x, None, "full", 0, 1000)
    assert off is not None
    assert float(off.abs().max()) < 1e-3


class Totals(nn.Module):
    """x_d ~ p(exp(level + 0.00001 z)) by hand: log-gammas of large counts cancel in float32."""

    event_shape = (10,)

    def __init__(self, level: float, law: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.level, self.law = nn.Parameter(torch.tensor(level).log()), law

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", self.law((self.level + 1e-5 * z).exp().expand(*z.shape[:-1], 10)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))


LAWS: dict[str, Callable[[Tensor], Any]] = {
    "Poisson": dist.Poisson,
    "negative binomial": lambda rate: dist.NegativeBinomial(1e3 + 0 * rate, logits=rate.log() - math.log(1e3)),
    "gamma": lambda rate: dist.Gamma(rate, 1.0 + 0 * rate),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("level", [10.0, 1e4, 1e6])
def test_what_rounding_does_to_a_program_by_hand_is_told(law: str, level: float) -> None:
    program = Totals(level, LAWS[law])
    x = torch.poisson(torch.full((40, 10), level), generator=generator(1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = pv.log_likelihood(program, x, num_samples=200)
        exact = pv.log_likelihood(copy.deepcopy(program).double(), x.double(), num_samples=200)
    said = [w for w in found.warnings if "float64" in w]
    off = abs(found.nll - exact.nll)
    assert exact.rounding_error is None
    assert bool(said) == (off > 1e-3)
    assert all(any(line == str(w.message) for w in caught) for line in said)


def test_large_numbers_in_late_rows_are_looked_at() -> None:
    program = Totals(10.0, dist.Poisson)
    x = torch.poisson(torch.full((200, 10), 10.0), generator=generator(1))
    x[150] = 1e6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert [w for w in pv.log_likelihood(program, x, num_samples=50).warnings if "float64" in w]


def test_a_program_that_cannot_be_widened_is_measured_nowhere() -> None:
    program = Totals(10.0, dist.Poisson)
    constant = torch.ones(10)  # of float32, and no buffer: products with float64 are refused by torch
    program.law = lambda rate: dist.Poisson(rate * torch.nn.functional.linear(rate, torch.eye(10)).mean() * constant)
    x = torch.poisson(torch.full((20, 10), 10.0), generator=generator(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert pv.log_likelihood(program, x, num_samples=50).rounding_error is None
