"""Every objective scores the run that drew: under dropout, BatchNorm and noise that is no site it is what it says it is.

log p(x, z) is asked under the noise that the model ran with, and log q(z) under that which drew z. With the same random numbers
objectives that report one bound report one number, to rounding. (Run again with a mask of its own, dropout put the "bound" of stl
and dreg a nat above log p(x).)
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.util import is_validation_enabled
from test_objectives_bounds import gradients, objective, same_mean
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from pyro_vae import registry
from pyro_vae.errors import UserError
from pyro_vae.seeding import seeded

SCORED_IN: set[bool] = set()  # whether Pyro's validation, which waits for the host, was on where a density was asked


class Watched(dist.Normal):
    def log_prob(self, value: Tensor) -> Tensor:
        SCORED_IN.add(is_validation_enabled())
        return super().log_prob(value)


class Noisy(nn.Module):
    """Two latents, the second given the first; noise of every kind on both sides, and a map that changes in each run."""

    event_shape = (2,)

    def __init__(self, *, discrete: bool = False, batch_norm: bool = True) -> None:
        super().__init__()
        self.discrete = discrete
        self.drop = nn.Dropout(0.5)
        self.encoder, self.decoder = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()
        self.spectral = spectral_norm(nn.Linear(2, 2).double())
        self.bn = nn.ModuleList([nn.BatchNorm1d(2).double() if batch_norm else nn.Identity() for _ in range(2)])

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            if self.discrete:
                z = pyro.sample("z", dist.Bernoulli(x.new_full((2,), 0.5)).to_event(1))
            else:
                a = pyro.sample("a", Watched(x.new_zeros(2), 1.0).to_event(1))
                z = pyro.sample("z", Watched(a, 1.0).to_event(1))
            h = self.decoder(z)
            h = self.drop(self.bn[1](h.reshape(-1, 2)).reshape(h.shape))
            pyro.sample("x", Watched(h + 0.5 * torch.randn_like(h), 0.8).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        h = self.spectral(self.drop(self.bn[0](x))) * (1 + 0.5 * torch.rand(len(x), 1, dtype=x.dtype))
        with pyro.plate("data", len(x), dim=-1):
            if self.discrete:
                pyro.sample("z", dist.Bernoulli(logits=h).to_event(1))
                return
            a = pyro.sample("a", Watched(self.encoder(h), 0.7).to_event(1))
            pyro.sample("z", Watched(self.encoder(self.drop(a)), 0.6).to_event(1))


def noisy(**how: bool) -> Noisy:
    with seeded(3):
        program = Noisy(**how)
    return program.train()


def rows(n: int = 12) -> Tensor:
    with seeded(4):
        return torch.randn(n, 2, dtype=torch.float64)


def stepped(name: str, program: nn.Module, **options: Any) -> float:
    with seeded(5):
        loss, surrogate = objective(name, **options)(program, rows())
        surrogate.backward()
    return float(loss)


SAME = [
    ("stl", {}, "elbo", {}), ("stl", {"num_particles": 4}, "elbo", {"num_particles": 4}),
    ("dreg", {"num_particles": 4}, "iwae", {"num_particles": 4}), ("free-bits", {}, "elbo", {}),
    ("wake-sleep", {"num_particles": 4}, "iwae", {"num_particles": 4}), ("mmd", {}, "elbo", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "like", "others"), SAME, ids=lambda v: str(v))
def test_objectives_of_one_bound_report_one_number_and_leave_the_same_buffers(
    name: str, options: Any, like: str, others: Any
) -> None:
    a, b = noisy(), noisy()
    assert stepped(name, a, **options) == pytest.approx(stepped(like, b, **others), rel=1e-10)
    for (key, x), y in zip(a.named_buffers(), b.buffers(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12, msg=f"{name} leaves another {key}")


@pytest.mark.parametrize("name", registry.names("objectives"))
def test_a_step_counts_its_batch_once_and_reads_nothing_to_the_host(name: str) -> None:
    program = noisy(discrete=name == "enumerated-elbo")
    SCORED_IN.clear()
    try:
        with pyro.validation_enabled(True):
            stepped(name, program)
    except UserError as refusal:
        pytest.skip(f"two latents are refused: {refusal}")
    assert [int(bn.num_batches_tracked) for bn in program.bn] == [1, 1]
    assert True not in SCORED_IN


@pytest.mark.parametrize(
    ("name", "like", "options"),
    [
        pytest.param("stl", "elbo", {}, marks=pytest.mark.slow),
        pytest.param("dreg", "iwae", {"num_particles": 4}, marks=pytest.mark.slow),
    ],
)
def test_path_gradients_under_dropout_have_the_expectation_of_the_bounds(name: str, like: str, options: Any) -> None:
    """At 400 draws a guide scored under another mask than drew is 21 standard errors off, and what is right is one."""
    program, x = noisy(batch_norm=False), rows()
    a, _ = gradients(objective(name, **options), program, x, 0, draws=400)
    b, _ = gradients(objective(like, **options), program, x, 1, draws=400)
    assert same_mean(a, b)


class Turning(Noisy):
    """A guide that draws other noise each time that it is run."""

    turn = 0

    def guide(self, x: Tensor) -> None:
        self.turn += 1
        super().guide(x + (torch.rand_like(x) if self.turn % 2 else torch.randn(x.shape, dtype=x.dtype)))


def test_a_guide_whose_noise_cannot_be_given_again_is_refused() -> None:
    with seeded(3):
        program = Turning()
    with pytest.raises(UserError, match="other noise outside of its sites"):
        stepped("stl", program)
