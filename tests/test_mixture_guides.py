"""Mixtures of guides: weights, errors and gradients against quadrature and by hand."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from densities import Z_LIMIT
from scipy import stats
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.errors import UserError
from pyro_vae.evaluation.ais import annealed_log_likelihood
from pyro_vae.evaluation.estimators import estimate
from pyro_vae.objectives import pathwise
from pyro_vae.objectives.elbo import ELBO
from pyro_vae.objectives.importance_weighted import IWAE
from pyro_vae.objectives.particles import draw
from pyro_vae.objectives.pathwise import DoublyReparameterized, StickingTheLanding
from pyro_vae.posteriors.equal_mixture import EqualMixture
from pyro_vae.posteriors.mixture import Mixture
from pyro_vae.programs.ascent import ascend
from pyro_vae.programs.freed import SAME_FAMILY, free_guide
from pyro_vae.programs.strata import InStrata, strata_of
from pyro_vae.programs.trace import draw_terms, evaluating, isolated, run
from pyro_vae.seeding import seeded

GRID = torch.linspace(-8, 8, 4001, dtype=torch.float64)
STEP = float(GRID[1] - GRID[0])
X = torch.tensor([[0.5, 1.0], [1.0, 2.5], [1.5, 2.0], [0.0, 0.4]], dtype=torch.float64)


def normals(loc: Tensor, scale: Tensor) -> EqualMixture:
    """(1/S) sum_s N(loc_s, scale_s^2) of ``(*batch, S)``."""
    return EqualMixture([dist.Normal(m, s) for m, s in zip(loc.unbind(-1), scale.unbind(-1), strict=True)])


class Squares(nn.Module):
    """z ~ N(0, 1), x | z ~ N(W z^2, 0.5^2 I), W = (1, 2): probabilistic PCA of a square, its posterior the same at z and -z.

    The guide has four normals: about each mode, about zero, and one where the posterior is not.
    """

    event_shape = (2,)

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=dtype))
        self.at = nn.Parameter(torch.tensor([1.0, -1.0, 0.0, 2.5], dtype=dtype))
        self.scale = nn.Parameter(torch.tensor([0.15, 0.2, 0.6, 0.5], dtype=dtype))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.square().unsqueeze(-1) * self.weight, 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        mode = (x @ self.weight.detach() / 5).clamp(min=0.1).sqrt().unsqueeze(-1)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", normals(mode * self.at, self.scale.expand(len(x), -1)))

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """Log p(x, z), ``(n, len(z))``."""
        mean = z.square().unsqueeze(-1) * self.weight
        return dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(mean, 0.5).log_prob(x.unsqueeze(1)).sum(-1)

    def truth(self, x: Tensor) -> Tensor:
        """Log p(x) by quadrature."""
        return (self.log_joint(x, GRID).logsumexp(1) + math.log(STEP)).detach()


def same_rows(rows: int) -> tuple[Tensor, Tensor]:
    """The same datum many times ``(rows, 2)``, and its log p(x)."""
    return X[1:2].expand(rows, -1).contiguous(), Squares().truth(X[1:2])


def test_weights_of_stratified_draws_have_the_error_that_they_state() -> None:
    """z-scores of 600 estimates: |mean| and spread within a chance of 1e-4 each; by the formula of independent draws the error
    would be two fifths too large, and their spread outside."""
    program, (x, truth) = Squares(), same_rows(600)
    with seeded(0):
        found = pv.log_likelihood(program, x, num_samples=400, seed=1)
    assert found.strata == 4
    z = (found.log_likelihood - found.bias - truth) / found.mc_se
    spread = [(stats.chi2.ppf(p, len(z) - 1) / (len(z) - 1)) ** 0.5 for p in (5e-5, 1 - 5e-5)]
    assert abs(float(z.mean())) < 3.9 / len(z) ** 0.5
    assert spread[0] < float(z.std()) < spread[1]
    with seeded(0), isolated(), torch.no_grad(), InStrata():
        log_weight = draw_terms(program, x, num_samples=400).log_weight
    wrong = estimate(log_weight)
    assert float((wrong.log_likelihood - truth).div(wrong.mc_se).std()) < spread[0]
    inside = (found.interval[:, 0] <= truth) & (truth <= found.interval[:, 1])
    assert 0.925 < float(inside.double().mean()) < 0.98


def test_the_effective_sample_size_leaves_the_spread_between_components_out() -> None:
    program, x = Squares(), X[:2]
    q = normals((x @ program.weight / 5).sqrt().unsqueeze(-1) * program.at, program.scale.expand(2, -1))
    parts = torch.stack([part.expand((len(GRID), 2)).log_prob(GRID[:, None].expand(-1, 2)) for part in q.components])
    log_weight = program.log_joint(x, GRID).T - (parts.logsumexp(0) - math.log(4))
    weight = log_weight.exp()
    by_part = (parts.exp() * weight).sum(1) * STEP
    second = (parts.exp() * weight.square()).sum(1).mean(0) * STEP
    expected = by_part.mean(0).square() / (second - by_part.var(0, correction=0))
    found = pv.log_likelihood(program, x, num_samples=100_000).ess / 100_000
    torch.testing.assert_close(found, expected.detach(), rtol=0.03, atol=0)


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 6])
def test_the_mean_weight_is_unbiased_for_any_number_of_stratified_draws(num_samples: int) -> None:
    program, (x, truth) = Squares(), same_rows(20_000)
    with seeded(num_samples), isolated(), torch.no_grad(), InStrata():
        ratio = (draw_terms(program, x, num_samples=num_samples).log_weight - truth).exp()
    each = ratio.mean(1)  # of one place in the order: a draw of q too
    assert float(((each - 1) / (ratio.std(1) / len(x) ** 0.5)).abs().max()) < Z_LIMIT


def test_draws_in_a_row_hold_each_component_once() -> None:
    q = normals(torch.tensor([0.0, 10.0, 20.0]).expand(5, 3), torch.ones(5, 3) / 100).in_strata()
    with seeded(0):
        z = q.expand((12, 5))()
    component = (z / 10).round().reshape(4, 3, 5).sort(1).values
    assert torch.equal(component, torch.tensor([0.0, 1.0, 2.0])[:, None].expand(4, 3, 5))
    assert len({tuple(row) for row in (z / 10).round().T.tolist()}) == 5  # rows have orders of their own
    with seeded(0):
        z = normals(torch.tensor([0.0, 10.0, 20.0]), torch.ones(3) / 100).sample((3000,))
    counts = torch.bincount((z / 10).round().long())
    assert float((counts - 1000.0).abs().max()) < Z_LIMIT * 26
    assert counts.tolist() != [1000] * 3


class Two(nn.Module):
    """z1 ~ N(0, 1), z2 | z1 ~ N(z1, 1), x | z2 ~ N(z2, 1), with a mixture at each site of the guide: x ~ N(0, 3)."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(()), 1.0))
            z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
            pyro.sample("x", dist.Normal(z2.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        spread = torch.tensor([-1.0, 1.0], dtype=x.dtype)
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", normals(x / 1.5 + spread, torch.ones(len(x), 2, dtype=x.dtype)))
            loc = z2.unsqueeze(-1) / 2 + spread
            pyro.sample("z1", normals(loc, torch.ones_like(loc)))


def test_two_mixtures_in_one_guide_are_stratified_apart() -> None:
    """Orders that went together would pair components, whose product is not what is scored."""
    x = torch.full((250, 1), 1.3, dtype=torch.float64)
    found = pv.log_likelihood(Two(), x, num_samples=200)
    assert found.strata == 2
    z = (found.log_likelihood - found.bias - dist.Normal(0.0, math.sqrt(3.0)).log_prob(x[:, 0])) / found.mc_se
    assert abs(float(z.mean())) < 3.9 / len(z) ** 0.5
    assert 0.82 < float(z.std()) < 1.18  # 4 errors of a spread


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")
@pytest.mark.slow
@pytest.mark.parametrize("start", ["guide", "prior"])
def test_chains_agree_with_quadrature(start: Any) -> None:
    program = Squares()
    found: Any = annealed_log_likelihood(program, X, num_chains=64, num_distributions=60, start=start)
    z = (found.log_likelihood - found.bias - program.truth(X)) / found.mc_se
    assert float(z.abs().max()) < Z_LIMIT


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the chains of")  # some keep to the mode that they start in
def test_nuts_from_such_a_guide_agrees_with_quadrature() -> None:
    program = Squares()
    tree: Any = pv.posterior(program, X[:2], num_samples=1000, source="nuts", num_chains=4)
    z = tree["posterior"]["z"].values.reshape(-1, 2)
    weight = program.log_joint(X[:2], GRID).softmax(1).detach()
    exact = (weight * GRID.square()).sum(1)
    error = ((weight * GRID.pow(4)).sum(1) - exact.square()).div(400).sqrt()  # of 400 effective draws, of 4,000
    assert float((torch.as_tensor(z).square().mean(0) - exact).div(error).abs().max()) < Z_LIMIT


@pytest.mark.slow
def test_compiled_weights_and_steps_are_those_of_plain_ones() -> None:
    vae = pv.build("mlp", "mixture", (6,), latent_dim=2, encoder="mlp:hidden=[8]", decoder="mlp:hidden=[8]")
    with seeded(0):
        x = torch.rand(40, 6).gt(0.5).float()
    plain, compiled = (pv.log_likelihood(vae, x, num_samples=1000, compile=how) for how in ("off", "on"))
    torch.testing.assert_close(compiled.log_likelihood, plain.log_likelihood, rtol=0, atol=1e-4)
    means = []
    for how in ("off", "on"):
        vae = pv.build("mlp", "mixture", (6,), latent_dim=2, encoder="mlp:hidden=[8]", decoder="mlp:hidden=[8]")
        pv.fit(vae, x, epochs=2, batch_size=20, objective="elbo:num_particles=4", compile=how)
        means.append(pv.encode(vae, x))
    torch.testing.assert_close(*means, rtol=0, atol=1e-4)


def test_the_elbo_and_its_gradient_are_those_by_hand() -> None:
    """The same draws, float64, 1e-9."""
    vae: Any = pv.build(
        "mlp", "mixture", (5,), latent_dim=2, posterior="mixture:components=3", encoder="linear", decoder="linear"
    ).double()
    with seeded(1):
        x = torch.rand(7, 5).gt(0.5).double()
    with seeded(2):
        loss, surrogate = ELBO(num_particles=6)(vae, x)
    parameters = list(vae.parameters())
    found = torch.autograd.grad(surrogate, parameters)
    heads = [part.head.map for part in vae.posterior.each]
    loc, scale = zip(
        *((h[:, :2], nn.functional.softplus(h[:, 2:]) + 1e-6) for h in (head(x) for head in heads)), strict=True
    )
    with seeded(2):  # two rounds of the three components
        noise = [torch.randn(2, 7, 2, dtype=torch.float64) for _ in range(3)]
        order = torch.rand(2, 7, 3).argsort(-1)
    draws = torch.stack([m + s * e for m, s, e in zip(loc, scale, noise, strict=True)], 2)  # (rounds, rows, S, D)
    z = draws.gather(2, order.unsqueeze(-1).expand(-1, -1, -1, 2)).transpose(1, 2).flatten(0, 1)
    log_q = torch.stack([dist.Normal(m, s).log_prob(z).sum(-1) for m, s in zip(loc, scale, strict=True)])
    log_p = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + vae.likelihood(vae.decoder(z)).log_prob(x)
    by_hand = -(log_p - log_q.logsumexp(0) + math.log(3)).mean()
    torch.testing.assert_close(loss, by_hand.detach(), rtol=0, atol=1e-9)
    for a, b in zip(found, torch.autograd.grad(by_hand, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


class Free(nn.Module):
    """z ~ N(0, 1), x | z ~ N(z^2, 1), x = 2, and for each row two normals of its own: rows of one gradient each."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([-1.2, 0.6], dtype=torch.float64).repeat(rows, 1))
        self.scale = nn.Parameter(torch.tensor([0.5, 0.8], dtype=torch.float64).repeat(rows, 1))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.square(), 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", normals(self.loc, self.scale))


def bound_gradient(stratified: bool, particles: int) -> Tensor:
    """d bound / d (loc, scale) of two particles, or one, by quadrature: ``(4,)``."""
    loc, scale = (p.detach()[0].requires_grad_(True) for p in Free(1).parameters())
    z = GRID[::8]
    parts = dist.Normal(loc[:, None], scale[:, None]).log_prob(z)
    q = parts.exp().mean(0)
    log_w = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z.square(), 1.0).log_prob(torch.tensor(2.0)) - q.log()
    if particles == 1:
        bound = (q * log_w).sum() * 8 * STEP
    else:
        first, second = parts.exp() if stratified else (q, q)
        both = torch.logaddexp(log_w[:, None], log_w) - math.log(2)
        bound = (first[:, None] * second * both).sum() * (8 * STEP) ** 2
    return torch.cat(torch.autograd.grad(bound, [loc, scale]))


def gradients(objective: Any, rows: int = 20_000) -> Tensor:
    """The gradient of each row ``(rows, 4)``, of the bound."""
    program = Free(rows)
    with seeded(3):
        _, surrogate = objective(program, torch.full((rows,), 2.0, dtype=torch.float64))
    return -rows * torch.cat(torch.autograd.grad(surrogate, [program.loc, program.scale]), 1)


def z_scores(found: Tensor, expected: Tensor) -> float:
    return float(((found.mean(0) - expected) / (found.std(0) / len(found) ** 0.5)).abs().max())


@pytest.mark.parametrize(
    ("objective", "stratified", "particles"),
    [
        (ELBO(), True, 1),
        (ELBO(num_particles=2), True, 1),
        (StickingTheLanding(), True, 1),
        (StickingTheLanding(num_particles=2), True, 1),
        (IWAE(num_particles=2), True, 2),
        (DoublyReparameterized(num_particles=2), False, 2),
    ],
)
def test_gradients_agree_with_quadrature(objective: Any, stratified: bool, particles: int) -> None:
    assert z_scores(gradients(objective), bound_gradient(stratified, particles)) < Z_LIMIT


def test_dreg_would_be_biased_for_stratified_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above would see: neither the bound of stratified particles nor that of independent ones has this gradient."""
    monkeypatch.setattr(pathwise, "draw", lambda *args, stratified, **how: draw(*args, **how))
    found = gradients(DoublyReparameterized(num_particles=2), rows=100_000)
    assert z_scores(found, bound_gradient(True, 2)) > 2 * Z_LIMIT
    assert z_scores(found, bound_gradient(False, 2)) > 2 * Z_LIMIT


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")
@pytest.mark.parametrize("family", ["diagonal-normal", "full-rank-normal"])
def test_a_vamp_prior_of_a_mixture_has_a_component_for_each_pair(family: str) -> None:
    vae: Any = pv.build(
        "mlp", "mixture", (5,), latent_dim=2, prior="vamp:components=3", posterior={"name": "mixture", "of": family},
        encoder="linear", decoder="linear",
    ).double()  # fmt: skip
    u = vae.prior.pseudo_inputs.clamp(0, 1)
    with seeded(0):
        z = torch.randn(6, 7, 2, dtype=torch.float64)
    every = [q.log_prob(z.unsqueeze(2)) for q in vae.posterior(vae.encoder(u)).components]
    expected = torch.cat(every, -1).logsumexp(-1) - math.log(12)
    torch.testing.assert_close(vae.p(u).log_prob(z), expected, rtol=0, atol=1e-9)
    assert pv.sample(vae, 4).shape == (4, 5)
    x = torch.ones(3, 5)
    assert bool(torch.isfinite(pv.log_likelihood(vae, x, num_samples=200).log_likelihood).all())


def test_a_component_scores_its_own_draws_by_their_noise() -> None:
    """Of a normal of condition 1e6, in float32: solving for the noise would be off by nats."""
    tril = torch.eye(30) + 3 * torch.ones(30, 30).tril(-1)
    from pyro_vae.posteriors.full_rank_normal import CholeskyNormal

    q = EqualMixture([CholeskyNormal(torch.full((30,), m), scale_tril=tril, validate_args=False) for m in (0.0, 9e9)])
    with seeded(0):
        z = q.in_strata().expand((200, 1))
        log_prob = z.log_prob(z())[::1, 0]
    assert float((log_prob + 15 * (1 + math.log(2 * math.pi)) + math.log(2)).abs().max()) < 6 * 15**0.5


def test_it_has_the_mean_and_the_variance_of_its_draws() -> None:
    with seeded(0):
        posterior = Mixture((3,), (2,), of=["diagonal-normal", "full-rank-normal"], components=3).double()
        q: Any = posterior(2 * torch.randn(3, dtype=torch.float64))
        z = q.sample((50_000,))
    error = (z.mean(0) - q.mean.detach()) / (q.variance.detach() / len(z)).sqrt()
    assert float(error.abs().max()) < Z_LIMIT
    torch.testing.assert_close(z.var(0), q.variance.detach(), rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("posterior", "words"),
    [
        ("mixture:of=planar", "'planar' can score its own draws only: choose from"),
        ("mixture:of=bernoulli", "'bernoulli' has discrete latents: choose from"),
        ("mixture:of=planr", "unknown posterior 'planr'"),
        ({"name": "mixture", "of": {"name": "low-rank-normal", "rnk": 2}}, "has no option 'rnk'"),
        ({"name": "mixture", "of": ["diagonal-normal", "power-spherical"]}, "have two"),
        ({"name": "mixture", "of": ["diagonal-normal", "full-rank-normal"], "sees": "one-hot"}, "of one family"),
        ("mixture:of=autoregressive-flow,components=26", "the posterior 'mixture' scores every z under 26 densities"),
        ("mixture:sees=own,components=3", "not to be cut into 3 equal parts"),
    ],
)
def test_what_cannot_be_mixed_is_refused(posterior: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        pv.build("mlp", "diagonal", (4,), latent_dim=40, posterior=posterior, encoder="mlp:hidden=[8]")


@pytest.mark.parametrize("sees", ["shared", "one-hot", "own"])
def test_a_mixture_is_freed_component_by_component(sees: str) -> None:
    vae: Any = pv.build(
        "mlp", "diagonal", (4,), latent_dim=2, decoder="linear", encoder="mlp:hidden=[6]",
        posterior=f"mixture:components=2,hidden=5,sees={sees}",
    )  # fmt: skip
    x = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    with seeded(0), evaluating(vae):
        free: Any = free_guide(vae, x)
    assert free.family == SAME_FAMILY
    assert [tuple(p.shape) for p in free.parameters] == [(2, 2)] * 4
    with seeded(0), evaluating(vae), torch.enable_grad():
        before = float(free.log_weights(400).mean().detach())
        ascend(lambda: free.log_weights(4).mean(0).sum(), free.parameters, 15, 0.05)
        assert float(free.log_weights(400).mean().detach()) > before


def test_strata_are_those_of_all_sites() -> None:
    with seeded(0), isolated(), torch.no_grad():
        guides = [run(program.guide, x) for program, x in ((Squares(), X), (Two(), X[:, :1]))]
    assert [strata_of(guide) for guide in guides] == [4, 2]
    assert pv.log_likelihood(Squares(), X, num_samples=60).strata == 1  # too few of each to tell an error
    assert pv.log_likelihood(Squares(), X, num_samples=600, noise="sobol").strata == 1


def test_a_declared_mixture_is_kept_and_built_again(tmp_path: Any) -> None:
    posterior = {"name": "mixture", "components": 2, "of": {"name": "low-rank-normal", "rank": 1}, "sees": "own"}
    vae: Any = pv.build(
        "mlp", "ensemble", (4,), latent_dim=2, decoder="linear", posterior=posterior,
        encoder={"name": "ensemble", "members": 2, "of": {"name": "mlp", "hidden": [5]}},
    )  # fmt: skip
    x = torch.ones(20, 4)
    pv.fit(vae, x, epochs=1, out=tmp_path / "run", compile="off")
    again: Any = pv.load(tmp_path / "run").program
    assert again.spec == vae.spec
    assert torch.equal(pv.encode(again, x), pv.encode(vae, x))


@pytest.mark.filterwarnings("ignore")
def test_a_pilot_too_short_for_strata_draws_independently() -> None:
    # of 64 components a pilot of 250 draws holds four rounds, whose spread is no error: z-scores had a deviation of 1.2 to 8
    program = pv.build("ppca", "mixture", (1,), latent_dim=1, posterior={"name": "mixture", "components": 64})
    assert pv.log_likelihood(program, torch.zeros(2, 1), num_samples=2000, target_se=0.1).strata == 1
    assert pv.log_likelihood(program, torch.zeros(2, 1), num_samples=2000).strata == 64
