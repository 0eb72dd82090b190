"""Laws that every posterior keeps: normalised, draws agree, gradients reach every parameter, nothing overflows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from densities import DRAWS, Z_LIMIT, bits, discrepancy, gradients, one_hots, plane, shaken, sphere
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae import registry
from pyro_vae.errors import UserError
from pyro_vae.evaluation.estimators import estimate
from pyro_vae.objectives.elbo import AnalyticELBO
from pyro_vae.posteriors.flow import FlowPosterior
from pyro_vae.posteriors.mixture import Mixture
from pyro_vae.programs.trace import draw_terms, evaluating
from pyro_vae.seeding import seeded
from pyro_vae.spec import build

FEATURES = 4
POSTERIORS = registry.names("posteriors")
OPTIONS: dict[str, dict[str, Any]] = {
    "autoregressive-flow": {"layers": 2, "hidden": [8]},
    "coupling-flow": {"layers": 3, "hidden": [8]},
    "householder": {"count": 2},
    "low-rank-normal": {"rank": 1},
    "planar": {"layers": 3},
    "spline-flow": {"layers": 2, "hidden": [8], "bins": 5, "bound": 3.0},
}


def family(name: str) -> Any:
    return registry.get("posteriors", name)


RELAXED = ["relaxed-bernoulli", "relaxed-categorical"]
FLOWS = [n for n in POSTERIORS if issubclass(family(n), FlowPosterior) or n in ("householder", "planar")]
# families on bounded supports: their log-densities stay finite whatever the features
BOUNDED = ["bernoulli", "categorical", "power-spherical", *RELAXED]


def of_kind(kind: str) -> list[str]:
    return [name for name in POSTERIORS if kind in repr(family(name).support)]


def scoring(*costs: str) -> list[str]:
    return [name for name in POSTERIORS if family(name).scoring in costs]


def make(name: str, dim: int = 2, feature_shape: tuple[int, ...] = (FEATURES,), size: float = 0.3) -> Any:
    shape = (dim, 3) if name in of_kind("OneHot") else (dim,)
    with seeded(0):
        return shaken(family(name)(feature_shape, shape, **OPTIONS.get(name, {})), size)


def features(*leading: int, seed: int = 5) -> Tensor:
    with seeded(seed):
        return torch.randn(*leading, FEATURES, dtype=torch.float64)


def support(name: str) -> tuple[Tensor, Tensor]:
    if name in of_kind("Boolean"):
        return bits(2), torch.ones(4, dtype=torch.float64)
    if name in of_kind("OneHot"):
        return one_hots(2, 3), torch.ones(9, dtype=torch.float64)
    return sphere(200) if name in of_kind("phere") else plane(401, scale=2.0)


@pytest.mark.parametrize("name", scoring("cheap", "sequential"))
def test_a_posterior_is_normalised_and_its_draws_agree_with_it(name: str) -> None:
    points, weights = support(name)
    # a spline shaken as much as the rest has peaks that the grid does not resolve
    posterior = make(name, dim=points.shape[1], size=0.15 if name == "spline-flow" else 0.3).eval()
    total, z = discrepancy(posterior(features()), points, weights)
    assert total == pytest.approx(1.0, abs=2e-3 if weights.sum() > 100 else 1e-3)
    assert z < Z_LIMIT


@pytest.mark.parametrize("name", FLOWS)
def test_a_draw_is_scored_by_the_change_of_variables(name: str) -> None:
    """log q(z) = log N(e) - log|det dz/de|, the determinant by autograd; for planar flows this is the only test."""
    q: Any = make(name, dim=3)(features())
    with seeded(1):
        z = q.rsample()
    e = z
    for transform in reversed(q.transforms):
        e = transform.inv(e)  # from the cache

    def forward(v: Tensor) -> Tensor:
        for transform in make(name, dim=3)(features()).transforms:
            v = transform(v)
        return v

    torch.testing.assert_close(forward(e), z)
    expected = q.base_dist.log_prob(e) - torch.linalg.slogdet(jacobian(forward, e.detach())).logabsdet
    torch.testing.assert_close(q.log_prob(z), expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", POSTERIORS)
def test_gradients_reach_every_parameter_of_a_posterior(name: str) -> None:
    posterior = make(name, dim=3)
    q = posterior(features(5))
    with seeded(1):
        z = q.expand((6, 5))()
    if family(name).reparameterized:
        assert z.requires_grad
    # both of what a gradient of the ELBO holds: through z, and through log q at z
    weight = torch.linspace(0.5, 2, 5, dtype=torch.float64)
    loss = ((q.log_prob(z) + z.pow(2).flatten(2).cumsum(-1).sum(-1)) * weight).sum()
    assert gradients(posterior, loss) == []


@pytest.mark.parametrize("name", POSTERIORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_posterior_takes_leading_axes_and_keeps_the_dtype(name: str, dtype: torch.dtype) -> None:
    posterior = make(name, dim=3).to(dtype).eval()
    f = features(2, 5).to(dtype)
    q = posterior(f)
    assert q.batch_shape == (2, 5)
    with seeded(2):
        plated = q.expand((7, 2, 5))
        z = plated()
    assert z.shape == (7, 2, 5, *posterior.latent_shape)
    assert z.dtype == dtype
    log_prob = plated.log_prob(z)
    assert log_prob.shape == (7, 2, 5)
    assert log_prob.dtype == dtype
    assert bool(q.support.check(z).all())
    if family(name).scoring != "impossible":
        alone = posterior(f[1, 2]).log_prob(z[3, 1, 2])
        torch.testing.assert_close(log_prob[3, 1, 2], alone, atol=1e-3 if dtype == torch.float32 else 1e-8, rtol=1e-5)


@pytest.mark.parametrize("name", POSTERIORS)
def test_a_posterior_takes_a_map_of_features(name: str) -> None:
    posterior = make(name, feature_shape=(2, 3, 3)).float()
    with seeded(0):
        q = posterior(torch.randn(6, 2, 3, 3))
        assert bool(torch.isfinite(q.log_prob(q())).all())


@pytest.mark.parametrize("name", POSTERIORS)
@pytest.mark.parametrize("value", [0.0, 1e-30, -1e-30, 1e4, -1e4, 1e30, -1e30])
@pytest.mark.parametrize("training", [False, True])
def test_extreme_features_give_no_nan(name: str, value: float, training: bool) -> None:
    if abs(value) > 1e4 and name not in BOUNDED:
        pytest.skip("a location of 1e30 has no finite square in float32")
    posterior = make(name, dim=3).float().train(training)
    with seeded(1):
        q = posterior(torch.full((5, FEATURES), value))
        z = q()
    assert bool(torch.isfinite(z).all())
    assert bool(torch.isfinite(q.log_prob(z)).all())


@pytest.mark.parametrize("name", POSTERIORS)
def test_a_posterior_can_be_copied_after_use(name: str) -> None:
    posterior = make(name)
    q = posterior(features(2))
    with seeded(0):
        q.log_prob(q())
    copy.deepcopy(posterior)


def test_the_low_rank_and_full_rank_normals_have_the_covariance_that_they_say() -> None:
    low = make("low-rank-normal", dim=4)
    f = features(3)
    q, (_, raw) = low(f), low.head(f)
    scale = torch.nn.functional.softplus(raw) + 1e-4
    w = scale.unsqueeze(-1) * 30 * (low.factor(f)[0] / 30).tanh()
    torch.testing.assert_close(q.covariance_matrix, w @ w.mT + scale.square().diag_embed())
    full = make("full-rank-normal", dim=4)(f)
    assert bool((full.scale_tril.diagonal(dim1=-2, dim2=-1) > 0).all())
    assert bool((full.scale_tril.triu(1) == 0).all())
    assert bool((full.scale_tril.tril(-1).abs() > 0).sum((-2, -1)).eq(6).all())


@pytest.mark.parametrize("name", ["full-rank-normal", "low-rank-normal"])
def test_a_normal_scores_its_draws_by_their_noise_whatever_its_condition(name: str) -> None:
    from pyro_vae.posteriors.full_rank_normal import CholeskyNormal

    posterior = make(name, dim=5)
    q = posterior(features(3))
    with seeded(0):
        z = q.rsample((7,))
    torch.testing.assert_close(q.log_prob(z), q.log_prob(z.clone()))
    weights = [p for n, p in posterior.named_parameters() if "bias" not in n]
    by_noise, by_solving = (
        torch.autograd.grad((q.log_prob(v) + z.sum(-1)).sum(), weights, retain_graph=True) for v in (z, z.clone())
    )
    for a, b in zip(by_noise, by_solving, strict=True):
        torch.testing.assert_close(a, b)
    # a triangle whose inverse holds 3^39: solving in float32 is off by orders of magnitude
    tril = torch.eye(40) + 3 * torch.ones(40, 40).tril(-1)
    p = CholeskyNormal(torch.zeros(40), scale_tril=tril, validate_args=False)
    with seeded(0):
        log_prob = p.log_prob(p.rsample((100,)))
    # -(chi^2_40 + 40 log 2 pi) / 2: mean -56.8, sd 4.5
    assert float((log_prob + 56.76).abs().max()) < 6 * 4.5


def test_householder_is_a_rotated_normal() -> None:
    posterior = make("householder", dim=4)
    q = posterior(features(3))
    torch.testing.assert_close(q.mean, posterior.head(features(3))[0])
    with seeded(0):
        z = q.rsample((DRAWS,))
    error = (z.mean(0) - q.mean) / (z.std(0) / DRAWS**0.5)
    assert float(error.detach().abs().max()) < Z_LIMIT


@pytest.mark.parametrize("dim", [2, 3, 10])
def test_power_spherical_has_its_mean_and_entropy(dim: int) -> None:
    q = make("power-spherical", dim=dim)(features())
    with seeded(0):
        z = q.rsample((DRAWS,))
    for draws, expected in ((z, q.mean), (-q.log_prob(z), q.entropy())):
        error = (draws.mean(0) - expected) / (draws.std(0) / DRAWS**0.5)
        assert float(error.detach().abs().max()) < Z_LIMIT


def test_power_spherical_draws_are_differentiable_in_the_concentration() -> None:
    from pyro_vae.posteriors.power_spherical import PowerSpherical

    loc = torch.tensor([0.6, 0.0, -0.8], dtype=torch.float64)
    kappa = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    with seeded(0):
        cosine = (PowerSpherical(loc, kappa).rsample((DRAWS,)) * loc).sum(-1)
    (estimate,) = torch.autograd.grad(cosine.mean(), kappa)
    (exact,) = torch.autograd.grad((PowerSpherical(loc, kappa).mean * loc).sum(), kappa)
    # per-draw gradients are bounded by 1 here: their mean has an sd below 1 / sqrt(DRAWS)
    assert float((estimate - exact).abs()) < Z_LIMIT / DRAWS**0.5


@pytest.mark.parametrize("name", RELAXED)
def test_a_relaxation_scores_as_the_discrete_guide_and_hardens(name: str) -> None:
    soft, hard = make(name).train(), make(name).eval()
    points = support(name)[0]
    f = features()
    torch.testing.assert_close(soft(f).log_prob(points), hard(f).log_prob(points))
    assert soft(f).base_dist.has_rsample
    assert not hard(f).base_dist.has_rsample
    torch.testing.assert_close(kl_divergence(soft(f), hard(f)), torch.zeros((), dtype=torch.float64))
    soft.temperature = 1e-3
    with seeded(0):
        z = soft(f).rsample((DRAWS,))
    error = (z.mean(0) - hard(f).mean) / (z.std(0) / DRAWS**0.5)
    assert float(error.detach().abs().max()) < Z_LIMIT
    soft.temperature, soft.straight_through = 0.5, True
    with seeded(0):
        z = soft(f).rsample((100,))
    assert bool(((z - z.round()).abs() < 1e-12).all())
    assert z.requires_grad


@pytest.mark.parametrize("name", ["bernoulli", "categorical", *RELAXED])
def test_importance_weights_of_a_discrete_latent_agree_with_enumeration(name: str) -> None:
    prior = "bernoulli" if name in of_kind("Boolean") else "categorical:classes=3"
    vae: Any = build(
        "mlp", "diagonal", (5,), latent_dim=2, prior=prior, posterior=name, decoder="linear", encoder="linear"
    )
    vae = shaken(vae)
    with seeded(0):
        x = torch.randn(4, 5).gt(0).double()
    z = support(name)[0]
    joint = vae.prior(x).log_prob(z).unsqueeze(-1) + vae.likelihood(vae.decoder(z.unsqueeze(1))).log_prob(x)
    result = pv.log_likelihood(vae.train(), x, num_samples=DRAWS)
    assert result.states == len(z)  # few enough to be summed, and not drawn
    torch.testing.assert_close(result.log_likelihood, joint.logsumexp(0).detach(), rtol=0, atol=1e-9)
    assert not result.mc_se.any()
    with seeded(1), evaluating(vae):
        drawn = estimate(draw_terms(vae, x, num_samples=DRAWS).log_weight)
    error = (drawn.log_likelihood - result.log_likelihood) / drawn.mc_se
    assert float(error.abs().max()) < Z_LIMIT


@pytest.mark.parametrize("name", RELAXED)
def test_a_relaxed_guide_takes_the_analytic_kl(name: str) -> None:
    prior = "bernoulli" if name in of_kind("Boolean") else "categorical:classes=3"
    vae: Any = build(
        "mlp", "diagonal", (5,), latent_dim=2, prior=prior, posterior=name, decoder="linear", encoder="linear"
    )
    with seeded(0):
        _, surrogate = AnalyticELBO()(vae, torch.ones(3, 5))
    assert gradients(vae.posterior, surrogate) == []


@pytest.mark.parametrize("name", scoring("impossible", "sequential"))
def test_importance_weights_score_a_flows_own_draws(name: str) -> None:
    vae: Any = build("mlp", "diagonal", (5,), latent_dim=3, posterior=name, decoder="linear", encoder="linear")
    with seeded(0), torch.no_grad():
        terms = draw_terms(vae, torch.ones(3, 5), num_samples=50)
    assert bool(torch.isfinite(terms.log_weight).all())


def test_categorical_latents_need_a_prior_of_their_shape() -> None:
    with pytest.raises(UserError, match="latent_dim, classes"):
        build("mlp", "diagonal", (5,), posterior="categorical")


@pytest.mark.parametrize("objective", ["stl", "dreg", "wake-sleep"])
def test_a_planar_flow_is_not_trained_by_what_scores_its_draws_anew(objective: str) -> None:
    program = pv.build("mlp", "planar", (4,), latent_dim=2)
    with pytest.raises(pv.UserError, match="can score none but those that it has just drawn: use elbo or iwae"):
        pv.fit(program, torch.ones(20, 4), epochs=1, objective=objective, compile="off")


@torch.no_grad()
def test_components_of_a_mixture_begin_alike() -> None:
    """Their codes are one, and chance alone parts them; a component of another family is as it was drawn."""
    with seeded(0):
        guide: Any = pv.build("mlp", "ensemble", (8,), latent_dim=2)
        means = torch.stack([part.mean for part in guide.q(torch.rand(50, 8)).components])
        several: Any = Mixture((3,), (2,), of=["diagonal-normal", "full-rank-normal"], components=3)
    assert 0 < float((means - means[0]).std()) < 0.3 * float(means[0].std(0).mean())
    first, _, third = (next(part.parameters()) for part in several.each)
    assert 0 < float((first - third).abs().max()) < 0.2 * float(first.abs().max())
