"""Annealed importance sampling against closed forms: probabilistic PCA and conjugate pairs."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, fx, nn

import pyro_vae as pv
from pyro_vae.errors import UserError
from pyro_vae.evaluation.ais import annealed_log_likelihood
from pyro_vae.evaluation.anneal import run
from pyro_vae.evaluation.bdmc import bidirectional
from pyro_vae.evaluation.hmc import transition
from pyro_vae.evaluation.methods import Annealing
from pyro_vae.evaluation.path import Path
from pyro_vae.evaluation.result import UnreliableEstimateWarning
from pyro_vae.evaluation.unconstrained import Unconstrained
from pyro_vae.programs.examination import examined
from pyro_vae.programs.trace import evaluating
from pyro_vae.seeding import generator, seeded

# Every statistical test has a fixed seed and, at |z| < 3.3, a false-alarm rate of 0.1 % where its error bars are right.
LIMIT = 3.3


class LinearGaussian(nn.Module):
    """p(z) = N(0, I), p(x|z) = N(W z, s^2 I); the guide is the best diagonal normal, its scale times a factor."""

    def __init__(self, dim: int, latent_dim: int, noise: float = 0.5, narrow: float = 1.0) -> None:
        super().__init__()
        weight = torch.randn(dim, latent_dim, generator=generator(0), dtype=torch.float64)
        self.weight, self.noise, self.narrow = nn.Parameter(weight), noise, narrow
        self.event_shape = (dim,)
        self.precision = torch.eye(latent_dim, dtype=torch.float64) + weight.T @ weight / noise**2

    def model(self, x: Tensor) -> None:
        zeros = x.new_zeros(self.weight.shape[1])
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T, self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.mean(x), self.narrow * self.precision.diagonal() ** -0.5).to_event(1))

    def mean(self, x: Tensor) -> Tensor:
        return torch.linalg.solve(self.precision, self.weight.T @ x.T / self.noise**2).T

    def exact(self, x: Tensor) -> Tensor:
        w = self.weight.detach()
        covariance = w @ w.T + self.noise**2 * torch.eye(len(w), dtype=torch.float64)
        return torch.distributions.MultivariateNormal(torch.zeros(len(w), dtype=torch.float64), covariance).log_prob(x)


def standard_error(result: Any, exact: Tensor) -> float:
    """How many stated Monte Carlo errors the corrected mean is from the exact one."""
    return float((result.log_likelihood - result.bias - exact).mean()) / result.nll_mc_se


@pytest.mark.parametrize(
    ("schedule", "start"),
    [
        ("sigmoidal", "prior"),
        ("linear", "guide"),
        pytest.param("sigmoidal", "guide", marks=pytest.mark.slow),
        pytest.param("linear", "prior", marks=pytest.mark.slow),
    ],
)
def test_agrees_with_the_exact_value(start: Any, schedule: str) -> None:
    program = LinearGaussian(6, 3)
    x = pv.sample(program, 40, seed=1)
    result = annealed_log_likelihood(program, x, num_distributions=200, start=start, schedule=schedule, seed=2)
    assert abs(standard_error(result, program.exact(x))) < LIMIT
    assert result.log_likelihood.dtype == torch.float64
    assert result.khat.isnan().all()
    assert result.num_samples == 16
    assert float(result.acceptance.mean()) == pytest.approx(0.65, abs=0.08)
    assert all(p.grad is None for p in program.parameters())
    figures = result.summary()
    assert figures["khat_median"] is None
    assert figures["method"] == "ais"


def test_stated_errors_cover() -> None:
    """Of 100 images' 95 % intervals (Student's t, 15 degrees), 88 or more hold the exact value: false alarm 0.2 %."""
    program = LinearGaussian(6, 2)
    x = pv.sample(program, 100, seed=3)
    result = annealed_log_likelihood(program, x, num_distributions=300, seed=4)
    z = (result.log_likelihood - result.bias - program.exact(x)) / result.mc_se
    assert int((z.abs() < 2.131).sum()) >= 88


def test_hmc_leaves_the_posterior_invariant() -> None:
    """Chains that start as exact draws of the posterior stay so: first and second moments of 4000 chains."""
    program = LinearGaussian(6, 3)
    x = pv.sample(program, 1, seed=5)
    covariance = torch.linalg.inv(program.precision)
    mean = program.mean(x)[0].detach()
    factor = torch.linalg.cholesky(covariance)
    with seeded(6), evaluating(program):
        path = Path(Unconstrained(examined(program, x).traces, x), 4000)
        u = (mean + torch.randn(4000, 1, 3, dtype=torch.float64) @ factor.T).contiguous()
    point, beta, accepted = path(u), torch.ones((), dtype=torch.float64), []
    for t in range(20):
        point, probability = transition(
            path, point, beta, torch.full((1,), 0.2, dtype=torch.float64), 10, generator(7, t)
        )
        accepted.append(float(probability.mean()))
    assert 0.5 < sum(accepted) / 20 < 0.95  # rejection is at work
    white = torch.linalg.solve_triangular(factor, (point.u[:, 0] - mean).T, upper=False)
    moments = white @ white.T / 4000
    assert float((white.mean(1) * math.sqrt(4000)).abs().max()) < 3.7  # 3 means: false alarm 0.06 %
    assert float(((moments.diagonal() - 1) * math.sqrt(2000)).abs().max()) < 3.7
    assert float((moments - moments.diagonal().diag()).abs().max() * math.sqrt(4000)) < 3.7
    assert float((point.u - u).abs().mean()) > 0.1  # and they did move


def test_a_proposal_without_a_finite_density_is_rejected() -> None:
    program = LinearGaussian(6, 3)
    x = pv.sample(program, 2, seed=5)
    with evaluating(program):
        path = Path(Unconstrained(examined(program, x).traces, x), 4)
    point = path(path.draw(0))
    beta = torch.ones((), dtype=torch.float64)
    new, probability = transition(path, point, beta, torch.full((2,), 1e200, dtype=torch.float64), 10, generator(0))
    assert torch.equal(new.u, point.u)
    assert float(probability.max()) == 0.0


class Conditional(LinearGaussian):
    """p(x|z, y) = N(W z + y, s^2 I)."""

    def model(self, x: Tensor, y: Tensor) -> None:  # type: ignore[override]
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.weight.shape[1]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T + y, self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor) -> None:  # type: ignore[override]
        super().guide(x - y)


def test_a_conditional_program_in_several_blocks() -> None:
    program = Conditional(6, 2)
    y = torch.randn(20, 6, generator=generator(1), dtype=torch.float64)
    x = pv.sample(program, 20, y, seed=1)
    result = annealed_log_likelihood(program, x, y, num_distributions=100, chunk_size=7 * 16, seed=2)
    assert abs(standard_error(result, program.exact(x - y))) < LIMIT
    assert result.chunk_size == 7 * 16
    bounds = bidirectional(program, 20, y, num_distributions=100, seed=2)
    exact = program.exact(bounds.x - y)
    assert float((bounds.upper - exact).mean()) > -LIMIT * float((bounds.upper - exact).std()) / math.sqrt(20)
    assert float((exact - bounds.lower).mean()) > -LIMIT * float((exact - bounds.lower).std()) / math.sqrt(20)


class GammaPoisson(nn.Module):
    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            rate = pyro.sample("rate", dist.Gamma(x.new_tensor(3.0), 2.0))
            pyro.sample("x", dist.Poisson(rate.unsqueeze(-1).expand(*rate.shape, 4)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("rate", dist.LogNormal(((x.sum(-1) + 3) / 6).log(), 0.4))

    def exact(self, x: Tensor) -> Tensor:
        total = x.sum(-1) + 3.0
        constant = 3 * math.log(2.0) - math.lgamma(3.0) - torch.lgamma(x + 1).sum(-1)
        return constant + torch.lgamma(total) - total * math.log(6.0)


class DirichletMultinomial(nn.Module):
    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            p = pyro.sample("p", dist.Dirichlet(x.new_tensor([1.5, 2.0, 3.0])))
            pyro.sample("x", dist.Multinomial(12, p, validate_args=False), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("p", dist.Dirichlet(x + 2.0))

    def exact(self, x: Tensor) -> Tensor:
        return dist.DirichletMultinomial(x.new_tensor([1.5, 2.0, 3.0]), total_count=12).log_prob(x)


class TwoSites(nn.Module):
    """A uniform scale and a normal location below it; x is their normal sum: a support that depends on a latent."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            top = pyro.sample("top", dist.Uniform(x.new_tensor(1.0), 3.0))
            below = pyro.sample("below", dist.Uniform(torch.zeros_like(top), top))
            pyro.sample("x", dist.Normal(below, 0.5).expand(below.shape).to_event(0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            top = pyro.sample("top", dist.Uniform(x.new_tensor(1.0), 3.0))
            pyro.sample("below", dist.Uniform(torch.zeros_like(top), top))


@pytest.mark.parametrize(
    ("program", "start"),
    [
        (GammaPoisson(), "guide"),
        (DirichletMultinomial(), "prior"),
        pytest.param(GammaPoisson(), "prior", marks=pytest.mark.slow),
        pytest.param(DirichletMultinomial(), "guide", marks=pytest.mark.slow),
    ],
    ids=["positive-guide", "simplex-prior", "positive-prior", "simplex-guide"],
)
def test_constrained_latents(program: Any, start: Any) -> None:
    rows = [[2, 0, 1, 3], [5, 4, 6, 5], [0, 0, 0, 0]] if isinstance(program, GammaPoisson) else [[4, 4, 4], [12, 0, 0]]
    x = torch.tensor(rows * 8).double()
    program = program.double()
    program.register_buffer("dtype_of_the_program", torch.zeros((), dtype=torch.float64))
    program.p = nn.Parameter(torch.zeros((), dtype=torch.float64))
    result = annealed_log_likelihood(program, x, num_distributions=100, start=start, seed=1)
    assert abs(standard_error(result, program.exact(x))) < LIMIT
    assert float((result.log_likelihood - program.exact(x)).abs().mean()) < 0.2


def test_there_and_back_through_dependent_supports() -> None:
    x = torch.randn(5, generator=generator(0))
    density = Unconstrained(examined(TwoSites(), x).traces, x)
    assert density.sites == ["top", "below"]
    u = torch.randn(7, 5, 2, generator=generator(1))
    values = density.constrain(u)
    assert bool((values["below"] < values["top"]).all())
    assert torch.allclose(density.unconstrain(values).float(), u, atol=1e-4)  # supports with edges: in float64
    jacobian = torch.autograd.functional.jacobian(
        lambda v: torch.stack(list(density.constrain(v.expand(1, 5, 2)).values()), -1)[0, 0], u[0, 0]
    )
    log_det = density.densities(u).log_jacobian[0, 0]
    assert float(log_det) == pytest.approx(float(torch.linalg.slogdet(jacobian)[1]), abs=1e-5)


class Discrete(nn.Module):
    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("real", dist.Normal(x.new_zeros(()), 1.0))
            switch = pyro.sample("switch", dist.Bernoulli(x.new_tensor(0.3)))
            pyro.sample("x", dist.Normal(switch.unsqueeze(-1), 1.0).expand([*switch.shape, 2]).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("real", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("switch", dist.Bernoulli(x.new_tensor(0.5)))


def test_discrete_latents_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"'switch' is discrete \(Bernoulli\)"):
        annealed_log_likelihood(Discrete(), torch.zeros(3, 2), num_distributions=5)


class NoInverse(LinearGaussian):
    """A guide that is a flow without an inverse."""

    def __init__(self) -> None:
        super().__init__(4, 2)
        with seeded(0):
            self.flow = dist.transforms.Planar(2).double()

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            base = dist.Normal(self.mean(x), 0.5).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [self.flow]))


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")
def test_a_guide_that_cannot_score_leaves_the_prior_to_anneal_from() -> None:
    program = NoInverse()
    x = pv.sample(program, 3, seed=1)
    with pytest.raises(UserError, match="cannot score latents that it did not draw"):
        annealed_log_likelihood(program, x, num_distributions=5, start="guide")
    result = annealed_log_likelihood(program, x, num_distributions=100)
    assert abs(standard_error(result, program.exact(x))) < LIMIT


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_chains", 0),
        ("num_distributions", 0),
        ("num_leapfrog", 0),
        ("start", "x"),
        ("schedule", "x"),
        ("target_accept", 1.0),
    ],
)
def test_settings_are_checked(option: str, value: Any) -> None:
    with pytest.raises(UserError, match=option):
        Annealing(**{option: value})


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")
def test_a_guide_too_narrow_is_found_out() -> None:
    """Scale times 0.3 in 8 latents: Pareto k says so, importance weighting is far off, annealing is right."""
    program = LinearGaussian(12, 8, noise=1.0, narrow=0.3)
    x = pv.sample(program, 20, seed=8)
    exact = program.exact(x)
    weighted = pv.log_likelihood(program, x, num_samples=1000, seed=0)
    assert weighted.khat_bad_fraction > 0.9
    assert any("too narrow" in warning for warning in weighted.warnings)
    assert float((exact - weighted.log_likelihood).mean()) > 0.5
    annealed = annealed_log_likelihood(program, x, num_distributions=400, seed=9)
    assert abs(standard_error(annealed, exact)) < LIMIT
    assert float((exact - annealed.log_likelihood).mean().abs()) < 0.15


def test_few_chains_and_few_distributions_warn() -> None:
    program = LinearGaussian(6, 3)
    x = pv.sample(program, 10, seed=1)
    with pytest.warns(UnreliableEstimateWarning, match="2 chains are too few"):
        annealed_log_likelihood(program, x, num_chains=2, num_distributions=50)


class Memory:
    """Keeps what is saved, and interrupts after so many saves."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.kept: Any = None
        self.stop_after, self.saves = stop_after, 0

    def load(self) -> Any:
        return self.kept

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.kept = ({k: t.clone() for k, t in tensors.items()}, state)
        self.saves += 1
        if self.saves == self.stop_after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop_after", [40, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (7, 70))])
def test_interrupted_work_goes_on_to_the_same_bits(stop_after: int) -> None:
    program = LinearGaussian(6, 3)
    x = pv.sample(program, 8, seed=1)
    z = {"z": torch.randn(8, 3, generator=generator(2), dtype=torch.float64)}
    settings = Annealing(num_chains=4, num_distributions=20, chunk_size=16)
    whole = run(program, x, None, settings, exact=z)
    memory = Memory(stop_after)
    with pytest.raises(KeyboardInterrupt):
        run(program, x, None, settings, exact=z, checkpoint=memory, save_every=0.0)
    memory.stop_after = None
    done: list[float] = []
    resumed = run(program, x, None, settings, exact=z, checkpoint=memory, save_every=0.0, progress=done.append)
    for name in ("log_weight", "reverse_log_weight", "acceptance", "step_size"):
        assert torch.equal(getattr(whole, name), getattr(resumed, name)), name
    assert sum(done) == pytest.approx(8)


def test_kept_work_of_other_settings_is_not_gone_on_with() -> None:
    program = LinearGaussian(6, 3)
    x = pv.sample(program, 4, seed=1)
    memory = Memory()
    run(program, x, None, Annealing(num_chains=4, num_distributions=5), checkpoint=memory)
    other = run(program, x, None, Annealing(num_chains=4, num_distributions=6), checkpoint=memory)
    assert torch.equal(other.log_weight, run(program, x, None, Annealing(num_chains=4, num_distributions=6)).log_weight)


@pytest.mark.parametrize(("model", "guide", "decoder"), [("mlp", "diagonal", "mlp"), ("mixture", "gated", "gated-mlp")])
@pytest.mark.parametrize("start", ["prior", "guide"])
def test_the_graph_computes_what_the_program_does(model: str, guide: str, decoder: str, start: Any) -> None:
    vae = pv.build(model, guide, (1, 8, 8), latent_dim=4, decoder=f"{decoder}:hidden=[16]", encoder="mlp:hidden=[16]")
    x = (torch.rand(3, 1, 8, 8, generator=generator(0)) < 0.5).float()
    with evaluating(vae):
        path = Path(Unconstrained(examined(vae, x).traces, x), 5, start)
        assert isinstance(path._point, fx.GraphModule)
        assert isinstance(path._slope, fx.GraphModule)
        u = torch.randn(5, 3, 4, generator=generator(1))
        beta = torch.tensor(0.3)
        for got, want in zip(path._point(u), path._evaluate(u), strict=True):
            assert torch.allclose(got, want, rtol=1e-5, atol=1e-4)
        assert torch.allclose(path.gradient(u, beta), path(u).gradient(beta), rtol=1e-5, atol=1e-4)
