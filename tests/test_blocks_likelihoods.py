"""Laws that every likelihood keeps: normalised, draws agree, gradients reach every parameter, nothing overflows."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.stats
import torch
from densities import DRAWS, Z_LIMIT, discrepancy, gradients, line, plane, shaken
from torch import Tensor

from pyro_vae import registry
from pyro_vae.likelihoods.continuous_bernoulli import TiltedUniform
from pyro_vae.likelihoods.discretized_logistic import LogisticLevel
from pyro_vae.likelihoods.lattice import lattice
from pyro_vae.likelihoods.low_rank_normal import Correlated
from pyro_vae.seeding import seeded

FEATURES, LEVELS = 4, 9
LIKELIHOODS = registry.names("likelihoods")
SQUARES = ["normal", "student-t", "low-rank-normal"]  # a location of 1e30 has no finite square in float32
ALPHA = 1e-4  # of a chi-square test


def family(name: str) -> Any:
    return registry.get("likelihoods", name)


def of_kind(*kinds: str) -> list[str]:
    return [name for name in LIKELIHOODS if family(name).data in kinds]


def make(name: str, event_shape: tuple[int, ...], features: tuple[int, ...] = (FEATURES,), **options: Any) -> Any:
    if family(name).data == "lattice":
        options = {"levels": LEVELS, **options}
    with seeded(0):
        return shaken(family(name)(features, event_shape, **options))


def features(*leading: int) -> Tensor:
    with seeded(5):
        return torch.randn(*leading, FEATURES, dtype=torch.float64)


def values(name: str, shape: tuple[int, ...], value: float | None = None) -> Tensor:
    """Data in the support of a likelihood, float64: random, or as near to one value as the support allows."""
    with seeded(1):
        u = torch.rand(shape, dtype=torch.float64) if value is None else torch.full(shape, value, dtype=torch.float64)
        kind = family(name).data
        if kind == "lattice":
            return (u * (LEVELS - 1)).round() / (LEVELS - 1)
        if kind == "unit":
            return u.clamp(2.0**-24, 1 - 2.0**-24)
        return u.round() if kind == "binary" else (9 * u).round() if kind == "count" else u


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in LIKELIHOODS),
    ("normal", {"scale": "decoder"}),
    ("laplace", {"scale": "decoder", "mean": "sigmoid"}),
    ("laplace", {"scale": "per-pixel"}),
    ("student-t", {"df": 3.0, "scale": 0.5}),
    ("low-rank-normal", {"covariance": "decoder", "rank": 2}),
    ("discretized-logistic", {"scale": "decoder"}),
    ("discretized-logistic", {"scale": "shared", "mean": "identity"}),
    ("poisson", {"library": 6.0}),
    ("negative-binomial", {"library": 6.0, "dispersion": "decoder"}),
    ("zero-inflated-negative-binomial", {"library": 6.0, "dispersion": "shared"}),
]
variants = pytest.mark.parametrize(
    ("name", "options"), VARIANTS, ids=["-".join([n, *map(str, o.values())]) for n, o in VARIANTS]
)


@variants
def test_a_likelihood_is_normalised_and_its_draws_agree_with_it(name: str, options: dict[str, Any]) -> None:
    p = make(name, (2,), **options)(features())
    kind = family(name).data
    if kind in ("binary", "lattice", "count"):
        top = {"binary": 1, "lattice": LEVELS - 1, "count": 400}[kind]
        axis = torch.arange(top + 1, dtype=torch.float64) / (top if kind == "lattice" else 1)
        points, weights = torch.cartesian_prod(axis, axis), torch.ones((top + 1) ** 2, dtype=torch.float64)
    elif kind == "unit":
        # denser towards the ends, where a beta density may have no bound
        t = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
        axis, width = t**4 / (t**4 + (1 - t) ** 4), 4 * (t * (1 - t)) ** 3 / (t**4 + (1 - t) ** 4) ** 2 / 400
        points, weights = torch.cartesian_prod(axis, axis), torch.cartesian_prod(width, width).prod(-1)
    else:
        points, weights = plane(600, scale=1.0)
    total, z = discrepancy(p, points, weights)
    assert total == pytest.approx(1.0, abs=2e-3)
    assert z < Z_LIMIT


@pytest.mark.parametrize("name", of_kind("binary", "lattice", "count"))
def test_draws_have_the_frequencies_of_a_discrete_likelihood(name: str) -> None:
    p = make(name, (1,))(features())
    scale = LEVELS - 1 if family(name).data == "lattice" else 1
    with seeded(0):
        drawn = (p.sample((DRAWS,)).squeeze(-1) * scale).round().long()
    mass = p.log_prob(torch.arange(drawn.max() + 1, dtype=torch.float64).unsqueeze(-1) / scale).detach().exp()
    seen = drawn.bincount(minlength=len(mass)).double()
    common = mass * DRAWS >= 5
    f_obs = torch.cat([seen[common], seen[~common].sum()[None]])
    f_exp = torch.cat([mass[common], (1 - mass[common].sum())[None]]) * DRAWS
    keep = f_exp > 1e-6
    assert float(((f_obs - f_exp) ** 2 / f_exp)[keep].sum()) < scipy.stats.chi2.ppf(
        1 - ALPHA, max(1, int(keep.sum()) - 1)
    )


SLOW = pytest.param("autoregressive-bernoulli", marks=pytest.mark.slow)  # drawn pixel by pixel


@pytest.mark.parametrize("name", [SLOW if name == "autoregressive-bernoulli" else name for name in LIKELIHOODS])
def test_the_mean_of_a_likelihood_is_the_mean_of_its_draws(name: str) -> None:
    p = make(name, (1, 2, 2), **({"df": 5.0} if name == "student-t" else {}))(features(3))
    with seeded(0):
        x = p.sample((DRAWS,))
    error = (x.mean(0) - p.mean) / (x.std(0) / DRAWS**0.5 + 1e-9)
    assert float(error.detach().abs().max()) < Z_LIMIT
    assert bool(p.support.check(x).all())


@variants
def test_gradients_reach_every_parameter_of_a_likelihood(name: str, options: dict[str, Any]) -> None:
    likelihood = make(name, (1, 2, 2), **options)
    x = values(name, (5, 1, 2, 2))
    weight = torch.linspace(0.5, 2, 5, dtype=torch.float64)
    assert gradients(likelihood, (likelihood(features(6, 5)).log_prob(x) * weight).sum()) == []


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_likelihood_takes_leading_axes_and_keeps_the_dtype(
    name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    likelihood = make(name, (1, 2, 3), **options).to(dtype)
    f, x = features(7, 5).to(dtype), values(name, (5, 1, 2, 3)).to(dtype)
    p = likelihood(f)
    assert (p.batch_shape, p.event_shape) == ((7, 5), (1, 2, 3))
    log_prob = p.log_prob(x)
    assert log_prob.shape == (7, 5)
    assert log_prob.dtype == dtype
    torch.testing.assert_close(log_prob[3, 2], likelihood(f[3, 2]).log_prob(x[2]), atol=1e-4, rtol=1e-5)
    with seeded(0):
        drawn = p.expand((7, 5)).sample()
    assert (drawn.shape, drawn.dtype) == ((7, 5, 1, 2, 3), dtype)
    assert p.support.is_discrete == (likelihood.data in ("binary", "lattice", "count"))


@variants
def test_a_likelihood_takes_a_map_of_features(name: str, options: dict[str, Any]) -> None:
    likelihood = make(name, (2, 4, 4), features=(3, 4, 4), **options).float()
    with seeded(0):
        p = likelihood(torch.randn(6, 3, 4, 4))
    assert bool(torch.isfinite(p.log_prob(values(name, (6, 2, 4, 4)).float())).all())


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("feature", [0.0, 1e-30, 1e4, -1e4, 1e30, -1e30])
def test_extreme_data_and_features_are_finite(name: str, value: float, feature: float) -> None:
    if abs(feature) > 1e4 and name in SQUARES:
        pytest.skip("a location of 1e30 has no finite square in float32")
    likelihood = make(name, (3,)).float()
    x = values(name, (2, 3), value).float()
    loss = likelihood(torch.full((2, FEATURES), feature)).log_prob(x)
    assert bool(torch.isfinite(loss).all())
    grads = torch.autograd.grad(loss.sum(), list(likelihood.parameters()), allow_unused=True)
    assert not any(bool(g.isnan().any()) for g in grads if g is not None)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_likelihood_starts_at_the_mean_image(name: str) -> None:
    options = {"levels": LEVELS} if family(name).data == "lattice" else {}
    with seeded(0):
        likelihood: Any = family(name)((FEATURES,), (3,), **options)
    mean = torch.tensor([0.2, 0.5, 0.9])
    likelihood.start_at(mean)
    if name in ("categorical", "discretized-logistic-mixture"):
        pytest.skip("every level has a bias of its own")
    p = likelihood(torch.zeros(FEATURES))
    tolerance = {"discretized-logistic": 0.1, "zero-inflated-negative-binomial": 0.15, "beta": 0.02}.get(name, 1e-3)
    torch.testing.assert_close(p.mean.detach(), mean, atol=tolerance, rtol=0)


@pytest.mark.parametrize("logit", [0.0, 1e-6, 0.0199, 0.0201, -0.5, 8.0, -40.0, 300.0])
def test_the_continuous_bernoulli_is_exact_for_every_logit(logit: float) -> None:
    p = TiltedUniform(torch.tensor(logit, dtype=torch.float64))
    # an exponential of rate |l| from one end: points as dense as it falls
    size = max(abs(logit), 1.0)
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000 * min(size, 60.0) / size
    y = 1 - t if logit > 0 else t
    mass = p.log_prob(y).exp() * (t[1] - t[0])
    assert float(mass.sum()) == pytest.approx(1.0, abs=1e-6)
    assert float((mass * y).sum()) == pytest.approx(float(p.mean), abs=1e-6)
    single = TiltedUniform(torch.tensor(logit)).log_prob(y.float()[::1000])
    torch.testing.assert_close(single.double(), p.log_prob(y.float().double())[::1000], atol=3e-5, rtol=1e-5)


def test_the_continuous_bernoulli_is_torchs_where_torchs_is_right() -> None:
    logits = torch.linspace(-8, 8, 41, dtype=torch.float64)
    x = torch.linspace(0, 1, 11, dtype=torch.float64).unsqueeze(-1)
    theirs = torch.distributions.ContinuousBernoulli(logits=logits, validate_args=False).log_prob(x)
    torch.testing.assert_close(TiltedUniform(logits).log_prob(x), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-4, 0.03, 10.0, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_discretized_logistic_sums_to_one_at_every_scale(scale: float, dtype: torch.dtype) -> None:
    loc = torch.tensor([0.0, 0.37, 1.0, 2.0], dtype=dtype)
    p = LogisticLevel(loc, torch.tensor(scale, dtype=dtype), 256)
    log_prob = p.log_prob(torch.arange(256, dtype=dtype).unsqueeze(-1))
    assert bool(torch.isfinite(log_prob).all())
    torch.testing.assert_close(log_prob.exp().sum(0), torch.ones(4, dtype=dtype), atol=2e-4, rtol=0)


def test_the_low_rank_normal_is_torchs() -> None:
    p = make("low-rank-normal", (1, 2, 3), rank=2)(features(5))
    x = values("low-rank-normal", (7, 5, 1, 2, 3))
    theirs = torch.distributions.LowRankMultivariateNormal(p.loc.flatten(1), p.factor, p.scale.square())
    torch.testing.assert_close(p.log_prob(x), theirs.log_prob(x.flatten(2)))


def test_the_low_rank_normal_keeps_its_digits_where_the_directions_are_long() -> None:
    with seeded(0):
        loc, factor, scale = torch.zeros(200), 30 * torch.randn(200, 3), torch.full((200,), 1e-2)
        p = Correlated(loc, factor, scale, 1)
        x = p.sample((20,))
    exact = Correlated(loc.double(), factor.double(), scale.double(), 1).log_prob(x.double())
    # Woodbury's difference is off by about |x / s|^2 * 6e-8 = 1e2 nats here
    assert float((p.log_prob(x).double() - exact).abs().max()) < 0.5


def test_the_lattice_holds_its_levels_in_float32_and_nothing_between() -> None:
    for levels in (2, 17, 256):
        on = torch.arange(levels) / (levels - 1)
        assert bool(lattice(levels).check(on).all())
        assert not bool(lattice(levels).check(on + 0.3 / (levels - 1)).any())
    assert not bool(lattice(256).check(torch.tensor([-1 / 255, 256 / 255, 0.5])).any())


@pytest.mark.parametrize("name", of_kind("unit", "real"))
def test_a_density_in_one_dimension_matches_its_draws(name: str) -> None:
    """Kolmogorov-Smirnov at level 1e-4, the distribution function summed from the density."""
    p = make(name, (1,))(features())
    if family(name).data == "unit":
        t = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
        axis, width = t**4 / (t**4 + (1 - t) ** 4), 4 * (t * (1 - t)) ** 3 / (t**4 + (1 - t) ** 4) ** 2 / 20_000
    else:
        axis, width = line(20_000, scale=1.0)
    cdf = (p.log_prob(axis.unsqueeze(-1)).detach().exp() * width).cumsum(0)
    with seeded(0):
        drawn = p.sample((DRAWS,)).squeeze(-1)
    below = cdf[torch.searchsorted(axis, drawn).clamp(max=len(axis) - 1)].sort().values
    assert float(scipy.stats.kstest(below.numpy(), "uniform").pvalue) > 1e-4
