"""The laws of every registered prior, likelihood and posterior, in float64, away from their start.

Normalises; sample and density agree; gradients reach every parameter; sample axes broadcast; save and load; repr;
options. A block opts out only by what it declares: a posterior that cannot score what it did not draw.
"""

from __future__ import annotations

import math
import typing
from typing import Any

import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from densities import bits, line, one_hots, plane, shaken, sphere
from small import small
from torch import Tensor, nn

from pyro_vae import registry
from pyro_vae.errors import UserError
from pyro_vae.seeding import generator, seeded

KINDS = ("priors", "likelihoods", "posteriors")
BLOCKS = [(kind, name) for kind in KINDS for name in registry.names(kind)]
FEATURES, EVENT = (3,), (4,)
DRAWS = 20_000
SHAKEN = 0.1  # noise on every parameter: away from the symmetries of the start, yet smooth enough for a grid to resolve

every_block = pytest.mark.parametrize(("kind", "name"), BLOCKS)


class Guide(nn.Module):
    """A density of z for the priors that are made of the guide."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.map = nn.Linear(EVENT[0], dim)

    def forward(self, x: Tensor) -> Any:
        loc = 2 * self.map(x)
        return dist.Normal(loc, 0.7 * torch.ones_like(loc), validate_args=False).to_event(1)


class Block:
    """A block of ``dim`` coordinates with the distribution that it makes, one for every row of ``features``."""

    def __init__(self, kind: str, name: str, dim: int, seed: int = 0) -> None:
        self.kind, self.name, self.cls = kind, name, registry.get(kind, name)
        cls: Any = self.cls
        options = small(kind, name)
        declared = cls.support if kind != "likelihoods" else None
        self.sphere = "sphere" in repr(declared).lower()
        dim = 3 if self.sphere else dim
        with seeded(seed):
            if kind == "likelihoods":
                self.shape: tuple[int, ...] = (dim,)
                self.module: Any = cls(FEATURES, self.shape, **options)
            elif kind == "posteriors":
                self.shape = (dim, 3) if "OneHot" in repr(declared) else (dim,)
                self.module = cls(FEATURES, self.shape, **options)
            else:
                self.shape = cls.latent_shape_of(dim, **options)
                self.module = cls(self.shape, *([EVENT] if cls.needs_event_shape else []), **options)
        with seeded(2):
            self.guide = Guide(self.shape[0]).double()
        shaken(self.module, SHAKEN, seed=seed + 1).eval()

    def at(self, features: Tensor) -> Any:
        """The distribution for ``features`` ``(*leading, 3)``; a prior has one for all."""
        if self.kind == "priors":
            return self.module(features.new_zeros(5, *EVENT), self.guide)
        return self.module(features)

    def one(self) -> Any:
        """One distribution, of batch shape ``()``."""
        return self.at(torch.tensor([0.3, -0.6, 0.9], dtype=torch.float64))

    def space(self, distribution: Any, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Points ``(n, *event)`` of the support and the volumes they stand for, ``(n,)``."""
        dim, kind = self.shape[0], repr(getattr(self.module, "support", None)).lower()
        ones = lambda x: torch.ones(len(x), dtype=torch.float64)  # noqa: E731
        if self.sphere:
            return sphere(1000)
        if "onehot" in kind:
            points = one_hots(dim, self.shape[1])
            return points, ones(points)
        if "boolean" in kind:
            return bits(dim), ones(bits(dim))
        if "lattice" in kind or "integer" in kind:
            count = self.module.levels if "lattice" in kind else {1: 3000, 2: 300}[dim]
            values = torch.arange(count, dtype=torch.float64) / (count - 1 if "lattice" in kind else 1)
            points = torch.cartesian_prod(*[values] * dim).reshape(-1, dim)
            return points, ones(points)
        t, w = line(40_001) if dim == 1 else plane(301)
        t, w = t.reshape(-1, dim), w.reshape(-1)
        if "interval" in kind:
            t, w = t[(t.abs() < 30).all(-1)], w[(t.abs() < 30).all(-1)]
            x = t.sigmoid()
            return x, w * (x * (1 - x)).prod(-1)
        middle = drawn.median(0).values
        spread = (drawn.quantile(0.75, 0) - drawn.quantile(0.25, 0)).clamp(min=1e-6)
        return middle + spread * t / 2, w * (spread / 2).prod()


def scored(kind: str, name: str) -> None:
    if getattr(registry.get(kind, name), "scoring", "cheap") == "impossible":
        pytest.skip(f"{name} declares that it cannot score what it did not draw")


def draws(distribution: Any, n: int, seed: int = 0) -> Tensor:
    with seeded(seed), torch.no_grad():
        return distribution.sample((n,))


@pytest.mark.parametrize("dim", [1, 2])
@every_block
def test_the_density_integrates_to_one(kind: str, name: str, dim: int) -> None:
    scored(kind, name)
    block = Block(kind, name, dim)
    one = block.one()
    points, volumes = block.space(one, draws(one, 1000))
    with torch.no_grad():
        pieces = zip(points.split(200_000), volumes.split(200_000), strict=True)
        mass = sum(float((one.log_prob(p).exp() * v).sum()) for p, v in pieces)
    assert mass == pytest.approx(1.0, abs=2e-4)


@every_block
def test_draws_follow_the_density(kind: str, name: str) -> None:
    # A chi-square test over at most 20 cells of equal probability: a false alarm in 1e-4 of seeds.
    scored(kind, name)
    block = Block(kind, name, 1)
    if block.sphere:
        pytest.skip("the sphere is three-dimensional: held by the next law")
    one = block.one()
    x = draws(one, DRAWS)
    points, volumes = block.space(one, x)
    with torch.no_grad():
        mass = one.log_prob(points).exp() * volumes
    value = lambda p: (p.flatten(1) * torch.arange(1, p[0].numel() + 1)).sum(-1)  # noqa: E731, of one coordinate itself
    order = value(points).argsort()
    position, cumulative = value(points)[order], mass[order].cumsum(0)
    cell = torch.unique((cumulative * 20 - 1e-9).floor().clamp(0, 19), return_inverse=True)[1]
    expected = torch.zeros(int(cell.max()) + 1, dtype=torch.float64).index_add_(0, cell, mass[order])
    # a draw falls into the cell of the grid point nearest to it
    right = torch.searchsorted(position, value(x).contiguous()).clamp(1, len(position) - 1)
    nearer = (value(x) - position[right - 1]) < (position[right] - value(x))
    observed = torch.bincount(cell[torch.where(nearer, right - 1, right)], minlength=len(expected)).double()
    if len(expected) == 1:
        return
    keep = expected * DRAWS > 5
    statistic = ((observed - expected * DRAWS).square() / (expected * DRAWS))[keep].sum()
    assert float(observed[~keep].sum()) < 30
    assert float(statistic) < scipy.stats.chi2.ppf(1 - 1e-4, int(keep.sum()) - 1)


@every_block
def test_draws_have_the_entropy_of_the_density(kind: str, name: str) -> None:
    # A z-test of E log p in two dimensions, |z| < 3.9: a false alarm in 1e-4 of seeds.
    scored(kind, name)
    block = Block(kind, name, 2)
    one = block.one()
    x = draws(one, DRAWS, seed=1)
    points, volumes = block.space(one, x)
    with torch.no_grad():
        log_prob = torch.cat([one.log_prob(p) for p in points.split(200_000)])
        mass = log_prob.exp() * volumes
        expected = float((mass * log_prob.clamp(min=-1e4)).sum())
        found = one.log_prob(x)
    deviation = float(found.std())
    assert abs(float(found.mean()) - expected) < 3.9 * deviation / DRAWS**0.5 + 1e-3 * max(deviation, 0.1)


@every_block
def test_gradients_reach_every_parameter(kind: str, name: str) -> None:
    block = Block(kind, name, 2)
    features = torch.randn(7, *FEATURES, generator=generator(0), dtype=torch.float64)
    distribution = block.at(features)
    with seeded(0):
        if kind == "posteriors" and block.module.reparameterized and distribution.has_rsample:
            x = distribution.rsample()
            loss = (
                distribution.log_prob(x).sum()
                + (x.sin() * torch.linspace(0.5, 1.5, x[0].numel()).reshape(x.shape[1:])).sum()
            )
        else:
            x = distribution.sample(() if distribution.batch_shape else (7,)).detach()
            loss = distribution.log_prob(x).mul(torch.linspace(0.5, 1.5, 7)).sum()
    if not any(p.requires_grad for p in block.module.parameters()):
        return
    loss.backward()
    without = [
        n for n, p in block.module.named_parameters()
        if p.requires_grad and (p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.any())
    ]  # fmt: skip
    assert without == []


@every_block
def test_sample_axes_broadcast(kind: str, name: str) -> None:
    block = Block(kind, name, 2)
    s, b = 3, 4
    features = torch.randn(s, b, *FEATURES, generator=generator(0), dtype=torch.float64)
    together = block.at(features)
    shape = torch.Size((s, b)) if kind != "priors" else torch.Size()
    assert together.event_shape == block.shape
    assert together.batch_shape in (shape, torch.Size()) if kind == "priors" else together.batch_shape == shape
    together = together.expand(torch.Size((s, b)))
    with seeded(0), torch.no_grad():
        x = together.sample()
    assert x.shape == (s, b, *block.shape)
    assert x.dtype == torch.float64
    assert together.log_prob(x).shape == (s, b)
    assert bool(together.support.check(x).all())
    if getattr(block.module, "scoring", "cheap") == "impossible":
        return
    whole = together.log_prob(x)
    for i in range(s):
        for j in range(b):
            torch.testing.assert_close(block.at(features[i, j]).log_prob(x[i, j]), whole[i, j], rtol=1e-9, atol=1e-9)
    if kind == "likelihoods":  # x stays (batch, *event) under the samples of z
        again = torch.stack([block.at(features[i]).log_prob(x[0]) for i in range(s)])
        torch.testing.assert_close(block.at(features).log_prob(x[0]), again, rtol=1e-9, atol=1e-9)


@every_block
def test_log_prob_is_deterministic_and_survives_saving(kind: str, name: str) -> None:
    first, other = Block(kind, name, 2), Block(kind, name, 2, seed=7)
    features = torch.randn(4, *FEATURES, generator=generator(0), dtype=torch.float64)
    other.module.load_state_dict(first.module.state_dict())
    for seed in (0, 1):
        a, b = first.at(features), other.at(features)
        x, y = draws(a.expand(torch.Size((4,))), 1, seed)[0], draws(b.expand(torch.Size((4,))), 1, seed)[0]
        assert torch.equal(x, y)
        if getattr(first.module, "scoring", "cheap") != "impossible":
            assert torch.equal(a.log_prob(x), a.log_prob(x))
            assert torch.equal(a.log_prob(x), b.log_prob(x))


@every_block
def test_it_says_what_it_is(kind: str, name: str) -> None:
    block = Block(kind, name, 2)
    text = repr(block.module)
    assert text.startswith(block.cls.__name__)
    assert block.module.formula in text
    assert ("p(x | z)" if kind == "likelihoods" else "p(z)" if kind == "priors" else "q(z | x)") in block.module.formula
    assert str(tuple(block.shape)) in text
    assert block.cls.__doc__
    options = registry.schema(kind, name).model_fields
    text = "".join(cls.__doc__ or "" for cls in block.cls.__mro__)
    missing = [option for option in options if f"{option}:" not in text]
    assert missing == [], "options that the docstring does not explain"


@every_block
def test_options_are_validated(kind: str, name: str) -> None:
    with pytest.raises(UserError, match="has no option 'nonsense'"):
        registry.validate(kind, name, {"nonsense": 1})
    for option, field in registry.schema(kind, name).model_fields.items():
        if not field.is_required():
            registry.validate(kind, name, {option: field.default})
        with pytest.raises(UserError, match=option):
            registry.validate(kind, name, {option + "_": 1})
        with pytest.raises(UserError, match=f"{option} = "):
            registry.validate(kind, name, {option: {"a": object()}})
        bounds = [m for m in field.metadata if hasattr(m, "ge") or hasattr(m, "gt")]
        if bounds and typing.get_origin(field.annotation) is None:
            low = bounds[0].ge if hasattr(bounds[0], "ge") else bounds[0].gt
            with pytest.raises(UserError, match=f"{option} = "):
                registry.validate(kind, name, {option: low - 1})
        if field.annotation is float:
            with pytest.raises(UserError, match=f"{option} = "):
                registry.validate(kind, name, {option: math.nan})


@every_block
def test_float32_is_close_to_float64(kind: str, name: str) -> None:
    scored(kind, name)
    block = Block(kind, name, 2)
    features = torch.randn(6, *FEATURES, generator=generator(0), dtype=torch.float64)
    distribution = block.at(features).expand(torch.Size((6,)))
    x = draws(distribution, 1)[0].float()
    exact = distribution.log_prob(x.double())
    block.module.float()
    block.guide.float()
    found = block.at(features.float()).log_prob(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=2e-3, atol=2e-3)
