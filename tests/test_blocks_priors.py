"""Laws that every prior keeps: it is normalised, draws agree with it, gradients reach its parameters."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import pytest
import torch
from densities import Z_LIMIT, bits, discrepancy, gradients, one_hots, plane, shaken, sphere
from torch import Tensor, nn

from pyro_vae import registry
from pyro_vae.errors import UserError
from pyro_vae.seeding import seeded
from pyro_vae.spec import build

EVENT = (4,)
PRIORS = registry.names("priors")
OPTIONS: dict[str, dict[str, Any]] = {
    "categorical": {"classes": 3},
    "gaussian-mixture": {"components": 3},
    "maf": {"layers": 2, "hidden": [8]},
    "spline-flow": {"layers": 2, "hidden": [8], "bins": 5, "bound": 3.0},
    "student-t": {"df": 3.0},
    "vamp": {"components": 3},
}


class Guide(nn.Module):
    """A guide for the VampPrior: N(A u, 0.7^2), or what is made of its mean."""

    def __init__(self, dim: int, full: bool = False) -> None:
        super().__init__()
        self.map, self.full = nn.Linear(EVENT[0], dim), full

    def forward(self, x: Tensor) -> Any:
        loc = 3 * self.map(x)
        if self.full:
            return dist.MultivariateNormal(loc, scale_tril=0.7 * torch.eye(loc.shape[-1], dtype=loc.dtype))
        return dist.Normal(loc, 0.7 * torch.ones_like(loc), validate_args=False).to_event(1)


def make(name: str, dim: int = 2) -> tuple[Any, Any, Tensor]:
    """A prior away from its start, a guide for it, and data for its dtype."""
    cls: Any = registry.get("priors", name)
    options = OPTIONS.get(name, {})
    shape = cls.latent_shape_of(dim, **options)
    with seeded(0):
        prior = shaken(cls(shape, *([EVENT] if cls.needs_event_shape else []), **options))
        return prior, shaken(Guide(dim)), torch.zeros(5, *EVENT, dtype=torch.float64)


def support(name: str) -> tuple[Tensor, Tensor]:
    """Points of the support and their weights; three latents on the sphere, else two."""
    kind = repr(registry.get("priors", name).support)  # type: ignore[attr-defined]
    if "Boolean" in kind:
        return bits(2), torch.ones(4, dtype=torch.float64)
    if "OneHot" in kind:
        return one_hots(2, 3), torch.ones(9, dtype=torch.float64)
    return sphere(200) if "phere" in kind else plane(401)


@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_is_normalised_and_its_draws_agree_with_it(name: str) -> None:
    points, weights = support(name)
    prior, guide, like = make(name, dim=points.shape[1])
    total, z = discrepancy(prior(like, guide), points, weights)
    assert total == pytest.approx(1.0, abs=2e-3 if points.shape[1] == 2 else 1e-6)
    assert z < Z_LIMIT


@pytest.mark.parametrize("name", PRIORS)
def test_gradients_reach_every_parameter_of_a_prior(name: str) -> None:
    prior, guide, like = make(name, dim=3)
    with seeded(1):
        z = prior(like, guide).sample((6, 5))
    # weighted, so that what is the same for every z does not cancel
    weight = torch.linspace(0.5, 2, 5, dtype=torch.float64)
    loss = (prior(like, guide).log_prob(z) * weight).sum() + 0 * sum(p.sum() for p in prior.parameters())
    if any(True for _ in prior.parameters()):
        assert gradients(prior, loss) == []


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_prior_takes_leading_axes_and_keeps_the_dtype(name: str, dtype: torch.dtype) -> None:
    prior, guide, like = make(name, dim=3)
    prior, guide, like = prior.to(dtype), guide.to(dtype), like.to(dtype)
    p = prior(like, guide)
    assert p.batch_shape in ((), (5,))
    with seeded(2):
        z = p.expand((5,)).sample((6,))
    assert z.shape == (6, 5, *prior.latent_shape)
    assert z.dtype == dtype
    log_prob = p.expand((6, 5)).log_prob(z)
    assert log_prob.shape == (6, 5)
    assert log_prob.dtype == dtype
    torch.testing.assert_close(log_prob[2, 3], p.log_prob(z[2, 3]))
    assert bool(p.support.check(z).all())
    assert prior.formula in repr(prior)


@pytest.mark.parametrize("full", [False, True])
def test_vamp_is_the_mean_of_the_guide_over_the_pseudo_inputs(full: bool) -> None:
    prior, _, like = make("vamp")
    with seeded(3):
        guide = shaken(Guide(2, full))
        z = torch.randn(7, 5, 2, dtype=torch.float64)
    q = guide(prior.pseudo_inputs.clamp(0, 1))
    expected = q.log_prob(z.unsqueeze(-2)).logsumexp(-1) - torch.tensor(3.0).log()
    torch.testing.assert_close(prior(like, guide).log_prob(z), expected)


def test_vamp_draws_from_every_component() -> None:
    prior, guide, like = make("vamp")
    with torch.no_grad():
        prior.pseudo_inputs.copy_(torch.eye(4, dtype=torch.float64)[:3])
        guide.map.weight.mul_(20)
    with seeded(0):
        z = prior(like, guide).sample((3000,))
    nearest = torch.cdist(z, guide(prior.pseudo_inputs).mean).argmin(-1).bincount(minlength=3)
    # 3000 draws, one third each: sd 26
    assert bool(((nearest - 1000).abs() < 4.5 * 26).all())


def test_vamp_starts_at_rows_of_the_data() -> None:
    with seeded(0):
        data = torch.rand(20, 2, 3)
    vae: Any = build("mlp", "diagonal", data, prior="vamp:components=6,start=data", decoder="linear", encoder="linear")
    u = vae.prior.pseudo_inputs.detach()
    distance = (u.flatten(1)[:, None] - data.flatten(1).clamp(0.01, 0.99)).abs().amax(-1)
    assert float(distance.amin(1).max()) < 1e-6
    assert len(set(distance.argmin(1).tolist())) == 6
    # more pseudo-inputs than rows: the rows come again
    build("mlp", "diagonal", data, prior="vamp:components=50,start=data", decoder="linear", encoder="linear")


def test_vamp_without_a_guide_is_an_error_that_says_so() -> None:
    prior, _, like = make("vamp")
    with pytest.raises(UserError, match="made of the guide"):
        prior(like)


def test_what_is_recommended_in_place_of_a_guide_that_vamp_cannot_use_can_be_built() -> None:
    options: dict[str, Any] = {"prior": "vamp:components=3", "decoder": "linear", "encoder": "linear", "latent_dim": 2}
    with pytest.raises(UserError, match="its own draws only") as refused:
        build("mlp", "diagonal", (4,), posterior="planar", **options)
    recommended = str(refused.value).rsplit("choose from ", 1)[1].split(", ")
    assert "diagonal-normal" in recommended
    for name in recommended:
        build("mlp", "diagonal", (4,), posterior=name, **options)


def test_vamp_scores_narrow_components_exactly_in_float32() -> None:
    prior, _, like = make("vamp")

    class Narrow(Guide):
        def forward(self, x: Tensor) -> Any:
            loc = 5 + 3 * self.map(x)
            return dist.Normal(loc, 1e-3 * torch.ones_like(loc), validate_args=False).to_event(1)

    with seeded(3):
        guide, wide = shaken(Narrow(2)).float(), Narrow(2).double()
        p = prior.float()(like.float(), guide)
        z = p.sample((50,))
    wide.load_state_dict({k: v.double() for k, v in guide.state_dict().items()})
    q = wide(prior.double().pseudo_inputs.clamp(0, 1))
    exact = q.log_prob(z.double().unsqueeze(-2)).logsumexp(-1) - torch.tensor(3.0).log()
    # means rounded to float32 at 5 are off by 2.4e-7, or 2.4e-4 of a scale
    torch.testing.assert_close(p.log_prob(z).double(), exact, atol=5e-3, rtol=0)


@pytest.mark.parametrize("name", ["bernoulli", "categorical"])
def test_a_discrete_prior_is_linear_in_a_relaxed_latent(name: str) -> None:
    prior, _, like = make(name)
    a, b = support(name)[0][[0, -1]]
    p = prior(like)
    torch.testing.assert_close(p.log_prob((a + b) / 2), (p.log_prob(a) + p.log_prob(b)) / 2)


def test_one_latent_has_no_sphere() -> None:
    with pytest.raises(UserError, match="at least 2"):
        make("hypersphere-uniform", dim=1)
