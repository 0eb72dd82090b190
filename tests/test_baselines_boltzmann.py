"""Restricted Boltzmann machines and deep belief networks, against enumeration of small ones."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

import pyro_vae as pv
from pyro_vae.baselines.base import How
from pyro_vae.baselines.boltzmann import RestrictedBoltzmann, annealed_log_z, bernoulli
from pyro_vae.baselines.chib import chib
from pyro_vae.baselines.dbn import DBN, AsProgram
from pyro_vae.baselines.rbm import RBM
from pyro_vae.errors import UserError
from pyro_vae.seeding import generator


def every(n: int) -> Tensor:
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)))


def strong(machine: RestrictedBoltzmann, seed: int) -> RestrictedBoltzmann:
    """Weights at which the units are far from independent."""
    source = torch.Generator().manual_seed(seed)
    machine.start(torch.rand(len(machine.base), generator=source), source)
    machine.weight.normal_(generator=source)
    machine.hidden_bias.normal_(generator=source)
    return machine


def network() -> DBN:
    made = DBN((1, 2, 3), first=4, second=5, batch_size=10)
    strong(made.lower, 1), strong(made.upper, 2)
    return made


def exact(made: DBN, x: Tensor) -> Tensor:
    g = every(len(made.lower.hidden_bias))
    logits = g @ made.lower.weight.T + made.lower.visible_bias
    log_given = (x[:, None] * logits - softplus(logits)).sum(-1).double()
    return (made.upper.log_unnormalised(g) - made.upper.enumerated_log_z() + log_given).logsumexp(1)


@pytest.mark.parametrize(("visible", "hidden"), [(8, 5), (5, 8)])
def test_log_z_by_enumeration_is_that_of_every_image(visible: int, hidden: int) -> None:
    machine = strong(RestrictedBoltzmann(visible, hidden), 0)
    assert machine.enumerated_log_z() == pytest.approx(
        float(machine.log_unnormalised(every(visible)).logsumexp(0)), abs=1e-5
    )


def test_the_mean_weight_is_z_over_two_hundred_seeds() -> None:
    """False alarms: 1 in 1,000; a bias of 0.16 is found with a probability of 0.5."""
    machine = strong(RestrictedBoltzmann(8, 5), 0)
    log_z = machine.enumerated_log_z()
    found = [annealed_log_z(machine, num_chains=4, num_distributions=12, seed=seed) for seed in range(200)]
    weights = torch.tensor([z.value - log_z for z in found], dtype=torch.float64).exp()
    assert weights.std() > 0.2  # few distributions on purpose
    assert abs(float(weights.mean()) - 1) < 3.3 * float(weights.std()) / math.sqrt(200)


def test_annealing_from_both_sides_meets_at_log_z_within_its_error() -> None:
    machine = strong(RestrictedBoltzmann(8, 5), 0)
    found = annealed_log_z(machine, num_chains=100, num_distributions=300, seed=1, backwards=50)
    assert abs(found.value - machine.enumerated_log_z()) < 4 * found.se
    many = [annealed_log_z(machine, num_chains=20, num_distributions=30, seed=s, backwards=50) for s in range(100)]
    uppers = torch.tensor([z.upper for z in many], dtype=torch.float64)
    errors = torch.tensor([z.upper_se for z in many], dtype=torch.float64)
    assert float(errors.mean() / uppers.std()) == pytest.approx(1, abs=0.3)  # of 100 the spread is known to 7 %
    assert found.gap is not None
    assert abs(found.gap) < 0.2


def test_the_step_climbs_the_likelihood_and_its_gradient_is_the_exact_one() -> None:
    """With as many chains as make its noise small, a step goes where the enumerated likelihood rises, as fast as it says."""
    source = torch.Generator().manual_seed(0)
    machine = strong(RestrictedBoltzmann(6, 3, chains=100_000), 0)
    x = bernoulli(torch.full((50, 6), 0.3), source)
    mean = lambda: float(machine.log_unnormalised(x).mean()) - machine.enumerated_log_z()  # noqa: E731
    for _ in range(20):
        machine.step(x, 0.0, 1, 0.0, source)
    before, held = mean(), {n: p.clone() for n, p in machine.named_parameters()}
    model = (machine.log_unnormalised(every(6)) - machine.enumerated_log_z()).exp().float()
    gradient = x.T @ machine.hidden_mean(x) / len(x) - (every(6) * model[:, None]).T @ machine.hidden_mean(every(6))
    machine.step(x, 1e-3, 1, 0.0, source)
    moved = (machine.weight - held["weight"]) / 1e-3
    offset = (x.mean(0) - model @ every(6))[:, None] * machine.hidden_offset
    other = machine.visible_offset[:, None] * (machine.hidden_mean(x).mean(0) - model @ machine.hidden_mean(every(6)))
    assert torch.allclose(moved, gradient - offset - other, atol=0.02)  # that of the centred machine
    assert mean() > before


def test_training_raises_the_likelihood_of_the_digits() -> None:
    made, data = _trained()
    figures = made.figures(data, How(chains=50, distributions=300), lambda share: None)
    independent = data.mean_image().clamp(1e-3, 1 - 1e-3)
    x = data.observed("test")
    baseline = -float((x * independent.log() + (1 - x) * (1 - independent).log()).flatten(1).sum(1).mean())
    assert figures["nll"] < baseline - 2
    assert figures["bits_per_dim"] == pytest.approx(figures["nll"] / 64 / math.log(2))
    assert "AIS" in figures["computed"]


def _trained() -> tuple[pv.Data, pv.Data]:  # type: ignore[type-arg]
    data = pv.load_data("digits")
    made = RBM(data.event_shape, hidden=20, epochs=40, batch_size=50, lr=0.3, gibbs=1)
    made.start(data, generator("test", 0))
    for number in range(made.passes):
        made.train_pass(number, data, generator("test", number))
    return made, data  # type: ignore[return-value]


def test_a_belief_network_as_a_program_adds_up_to_one_and_its_elbo_is_the_bound() -> None:
    made, x = network(), every(6)
    truth = exact(made, x)
    assert float(truth.exp().sum()) == pytest.approx(1, abs=1e-5)
    found = pv.log_likelihood(AsProgram(made, made.upper.enumerated_log_z()), x.reshape(-1, 1, 2, 3), num_samples=400)
    assert torch.allclose(found.log_likelihood, truth, atol=1e-4)  # 16 states: summed exactly
    assert bool((found.elbo <= truth + 1e-4).all())


def test_a_network_begins_with_the_likelihood_of_its_lower_machine() -> None:
    """But for the units beyond one for each pixel, whose weights are small and not zero."""
    made, x = DBN((1, 2, 3), first=4, second=8, batch_size=10), every(6)
    strong(made.lower, 1)
    made.begin_upper(x, torch.Generator().manual_seed(0))
    alone = made.lower.log_unnormalised(x) - made.lower.enumerated_log_z()
    assert torch.allclose(exact(made, x), alone, atol=0.05)
    made.upper.weight[:, 6:] = 0
    assert torch.allclose(exact(made, x), alone, atol=1e-5)


@pytest.mark.slow
def test_the_estimate_by_chains_has_the_mean_p_of_x() -> None:
    """Of 300 seeds and 64 images at three sweeps. False alarms: 1 in 1,000.

    The weights are halved: at their full strength p(x) is the mean of ratios so skewed that 300 of them are no normal mean.
    """
    made, x = network(), every(6)
    for machine in (made.lower, made.upper):
        machine.weight.mul_(0.5)
    log_z, truth = made.upper.enumerated_log_z(), exact(made, x)
    found = torch.stack([chib(made.lower, made.upper, x, 3, seed) - log_z for seed in range(300)])
    ratio = (found - truth).exp()
    z = (ratio.mean(0) - 1) / (ratio.std(0) / math.sqrt(300))
    assert float(ratio.std()) > 0.05
    assert float(z.abs().max()) < 4.5
    assert abs(float(ratio.mean(1).mean()) - 1) < 3.5 * float(ratio.mean(1).std()) / math.sqrt(300)


def test_what_cannot_be_enumerated_or_taken_over_is_refused() -> None:
    with pytest.raises(UserError, match="up to 20 units"):
        RestrictedBoltzmann(30, 25).enumerated_log_z()
    with pytest.raises(UserError, match="begins with an rbm"):
        network().begin_with(network())
    with pytest.raises(UserError, match="leave --from out"):
        RBM((1, 2, 3), hidden=2).begin_with(network())
