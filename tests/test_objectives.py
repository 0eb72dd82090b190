"""The objectives equal Pyro's, and are what their formulas say: float64, the same random draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from by_hand import DiscreteLatent, TwoLayers
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae.errors import UserError
from pyro_vae.objectives.elbo import ELBO, AnalyticELBO
from pyro_vae.programs.trace import draw_terms, isolated
from pyro_vae.seeding import generator, seeded

BATCH, DIM = 16, 6


def declared(prior: str, likelihood: str) -> nn.Module:
    vae = pv.build(
        "mlp", "diagonal", (DIM,), latent_dim=3, prior=prior, likelihood=likelihood,
        encoder={"name": "mlp", "hidden": [8]}, decoder={"name": "mlp", "hidden": [8]},
    )  # fmt: skip
    return vae.double()


def by_hand(cls: type[nn.Module]) -> nn.Module:
    with seeded(1):
        return cls(DIM).double()


PROGRAMS: dict[str, Callable[[], nn.Module]] = {
    "standard normal, Bernoulli": lambda: declared("standard-normal", "bernoulli"),
    "standard normal, normal": lambda: declared("standard-normal", "normal"),
    "mixture, Bernoulli": lambda: declared("gaussian-mixture", "bernoulli"),
    "mixture, normal": lambda: declared("gaussian-mixture:components=4", "normal:scale=per-pixel"),
    "two layers": lambda: by_hand(TwoLayers),
    "a discrete latent": lambda: by_hand(DiscreteLatent),
}


def rows(binary: bool = True) -> Tensor:
    x = torch.rand(BATCH, DIM, generator=generator(7), dtype=torch.float64)
    return x.round() if binary else x


def gradients(program: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in program.named_parameters() if p.grad is not None}
    program.zero_grad(set_to_none=True)
    return found


def pyro_loss_and_grads(program: Any, x: Tensor, particles: int, seed: int) -> tuple[float, dict[str, Tensor]]:
    """What ``SVI.step`` computes before it calls the optimizer."""

    def model(x: Tensor) -> None:
        pyro.module("program", program)  # or else loss_and_grads finds no parameter, and no gradient
        program.model(x)

    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1)
    with isolated(), seeded(seed):
        loss = elbo.loss_and_grads(model, program.guide, x)
    return loss / len(x), {n: g / len(x) for n, g in gradients(program).items()}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("name", PROGRAMS)
def test_loss_and_every_gradient_are_those_of_trace_elbo(name: str, particles: int) -> None:
    program, x = PROGRAMS[name](), rows()
    loss, expected = pyro_loss_and_grads(program, x, particles, seed=5)
    with seeded(5):
        ours, surrogate = ELBO(num_particles=particles)(program, x)
    surrogate.backward()
    found = gradients(program)
    assert set(found) == set(expected) == {n for n, _ in program.named_parameters()}
    worst = max(relative(found[n], expected[n]) for n in found)
    print("largest relative difference", max(worst, abs(float(ours) / loss - 1)))
    assert abs(float(ours) / loss - 1) < 1e-10
    assert worst < 1e-10
    assert not ours.requires_grad


@pytest.mark.parametrize("name", [n for n in PROGRAMS if n != "a discrete latent"])
def test_the_surrogate_is_the_loss_where_every_latent_is_reparameterized(name: str) -> None:
    with seeded(5):
        loss, surrogate = ELBO()(PROGRAMS[name](), rows())
    assert float(loss) == pytest.approx(float(surrogate.detach()), rel=1e-12)


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("likelihood", ["bernoulli", "normal"])
def test_the_analytic_kl_is_exact_for_two_normals(likelihood: str, particles: int) -> None:
    program, x = declared("standard-normal", likelihood), rows()
    with seeded(5):
        loss, _ = AnalyticELBO(num_particles=particles)(program, x)
    with seeded(5), torch.no_grad():
        terms = draw_terms(program, x, num_samples=particles)
        q = program.q(x)
        kl = kl_divergence(q, program.prior(x).expand(q.batch_shape)).sum()
    assert float(loss) == pytest.approx(
        float((kl.detach() - terms.log_likelihood.sum() / particles) / BATCH), rel=1e-12
    )


def test_the_analytic_elbo_has_the_mean_of_the_elbo() -> None:
    # 100 times 100 draws each, a z-test of the difference of means at |z| < 4.42: a false alarm in 1e-5 of seeds.
    program, x = declared("standard-normal", "bernoulli"), rows().repeat(100, 1)
    with seeded(11), torch.no_grad():
        elbo = torch.stack([ELBO()(program, x)[0] for _ in range(100)])
        analytic = torch.stack([AnalyticELBO()(program, x)[0] for _ in range(100)])
    z = (elbo.mean() - analytic.mean()) / ((elbo.var() + analytic.var()) / 100).sqrt()
    assert abs(float(z)) < 4.42
    assert analytic.var() < elbo.var()


def test_a_pair_without_a_closed_form_is_estimated_as_in_the_elbo() -> None:
    program, x = declared("gaussian-mixture", "bernoulli"), rows()
    with seeded(5):
        estimated, _ = ELBO()(program, x)
    with seeded(5):
        analytic, _ = AnalyticELBO()(program, x)
    assert float(analytic) == pytest.approx(float(estimated), rel=1e-12)


def test_the_analytic_kl_refuses_what_it_cannot_do() -> None:
    with seeded(0), pytest.raises(UserError, match="reparameterized"):
        AnalyticELBO()(by_hand(DiscreteLatent), rows())
    with seeded(0), pytest.raises(UserError, match="order of the model"):
        AnalyticELBO()(by_hand(TwoLayers), rows())


@pytest.mark.parametrize("objective", [ELBO, AnalyticELBO])
@pytest.mark.parametrize(
    ("beta", "warmup", "step"), [(1.0, 0, 0), (4.0, 0, 3), (1.0, 10, 0), (0.5, 10, 4), (2.0, 10, 99)]
)
def test_beta_and_warmup_weigh_the_kl_and_nothing_else(
    objective: Callable[..., ELBO], beta: float, warmup: int, step: int
) -> None:
    program, x = declared("standard-normal", "bernoulli"), rows()
    weight = beta * (min(1.0, (step + 1) / warmup) if warmup else 1.0)
    with seeded(5):
        plain, _ = objective()(program, x)
    with seeded(5):
        weighed, surrogate = objective(beta=beta, warmup_steps=warmup)(program, x, None, step)
    with seeded(5):
        reconstruction = draw_terms(program, x, num_samples=1).log_likelihood.mean().detach()
    expected = weight * (float(plain) + float(reconstruction)) - float(reconstruction)
    assert float(weighed) == pytest.approx(expected, rel=1e-10)
    surrogate.backward()
    assert all(torch.isfinite(p.grad).all() for p in program.parameters())


def test_warmup_rises_linearly_and_stays() -> None:
    objective, like = ELBO(beta=2.0, warmup_steps=4), torch.zeros(1, dtype=torch.float64)
    assert [float(objective.weight(like, s)) for s in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert float(objective.weight(like, torch.tensor(1))) == 1.0


@pytest.mark.parametrize("name", ["elbo", "analytic-elbo"])
@pytest.mark.parametrize(
    "options", ["num_particles=0", "beta=0", "beta=-1", "beta=nan", "warmup_steps=-1", "betta=1", "num_particles=1.5"]
)
def test_options_out_of_range_are_refused(name: str, options: str) -> None:
    with pytest.raises(UserError, match=options.split("=")[0]):
        pv.fit(declared("standard-normal", "bernoulli"), rows(), steps=1, objective=f"{name}:{options}")


def test_the_loss_is_mean_nats_per_image() -> None:
    # log p(x | z) = -D log 2 for a decoder of zeros, KL = 0 for a guide of zeros that is the prior
    program, x = declared("standard-normal", "bernoulli"), rows()
    with torch.no_grad():
        program.likelihood.head.map.weight.zero_()
        program.posterior.head.map.weight.zero_()
    with seeded(0):
        loss, _ = AnalyticELBO()(program, x)
    assert float(loss) == pytest.approx(DIM * math.log(2), abs=1e-5)
