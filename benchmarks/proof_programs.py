"""Programs for the proof of weights: right ones, and ones with a fault of a size that is known. See instruments_proof.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from exact import Hierarchy, LinearGaussian, MissingElements, declared, rotated
from exact_others import BetaBinomial, GammaPoisson, HeavyTails, MixedLatents, Mixture, OneNormal
from torch import Tensor, nn

import pyro_vae as pv


class Line(nn.Module):
    """z ~ N(0, 1), x | z ~ N(z, 1), with a site for z and a guide that are handed over as functions of x."""

    event_shape = (1,)

    def __init__(self, guide: Callable[[Tensor], Any], prior: Callable[[Tensor], Any] | None = None) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))
        self.of_guide, self.of_prior = guide, prior or (lambda x: dist.Normal(0 * x[:, 0].detach(), 1.0))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.of_prior(x.new_zeros(x.shape)))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.of_guide(x))


class Known(nn.Module):
    """A mixture of three normals whose class y is known in some rows, where both sides mask it; or the guide alone does."""

    event_shape = (1,)

    def __init__(self, both: bool = True) -> None:
        super().__init__()
        self.both, self.mu = both, nn.Parameter(torch.tensor([-2.0, 0.0, 2.0]))

    def model(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            fn = dist.Categorical(x.new_tensor([0.2, 0.3, 0.5]).expand(len(x), 3))
            k = pyro.sample("k", fn.mask(y < 0) if self.both else fn)
            z = pyro.sample("z", dist.Normal(self.mu[torch.where(y < 0, k, y.clamp(min=0))], 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            fn = dist.Categorical(logits=-0.25 * (x - self.mu) ** 2)
            k = pyro.sample("k", fn.mask(y < 0))
            pyro.sample("z", dist.Normal((x[:, 0] + self.mu[torch.where(y < 0, k, y.clamp(min=0))]) / 2, 0.75))


class Missing(LinearGaussian):
    """Missing entries are NaN, which model and guide handle themselves."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(self.weight[0]), 1.0).to_event(1))
            seen = dist.Normal(z @ self.weight.T + self.bias, self.noise)
            pyro.sample("x", seen.mask(~x.isnan()).to_event(1), obs=x.nan_to_num(0.0))

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            loc = (x.nan_to_num(0.0) - self.bias) @ self.gain.T
            pyro.sample("z", dist.Normal(loc, 1.2 * self.tril.diagonal()).to_event(1))


class Off(dist.Normal):
    """A normal whose log_prob is off by a constant, everywhere or where its mean is ``only``, or by a tilt a tanh(z)."""

    constant, only, tilt = 0.0, None, 0.0

    def log_prob(self, value: Tensor) -> Tensor:
        found = super().log_prob(value) + self.tilt * torch.tanh(value)
        return found + self.constant * (torch.ones(()) if self.only is None else (self.loc == self.only).float())


def off(**how: Any) -> Callable[[Tensor], Any]:
    """The exact posterior of :class:`Line`, scored wrongly."""
    kind = type("Off", (Off,), how)
    return lambda x: kind(x[:, 0] / 2, math.sqrt(0.5))


class Twofold(nn.Module):
    """x tells |z|, z near 4 or near -4 with probabilities 1 - p and p, and the guide draws one of the two; so where y = 1."""

    event_shape = (1,)

    def __init__(self, mass: float, every: int = 1) -> None:
        super().__init__()
        self.mass, self.every, self.unused = mass, every, nn.Parameter(torch.zeros(()))

    def model(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            p = torch.where(y > 0, self.mass, 0.0)
            weights = dist.Categorical(torch.stack([1 - p, p], -1))
            z = pyro.sample("z", dist.MixtureSameFamily(weights, dist.Normal(x.new_tensor([4.0, -4.0]), 0.5)))
            pyro.sample("x", dist.Normal(z.abs().unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal((16 + x[:, 0]) / 5, 1.05 * 5**-0.5))

    def labels(self, num: int) -> Tensor:
        return (torch.arange(num) % self.every == 0).long()


class Flow(Line):
    """z = mean + sd a of an auxiliary a, its Jacobian said; or |a|."""

    def __init__(self, said: float, folded: bool = False) -> None:
        super().__init__(lambda x: None, (lambda x: dist.HalfNormal(1 + x[:, 0])) if folded else None)
        self.said, self.folded = said, folded

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(0 * x[:, 0], 1.0), infer={"is_auxiliary": True})
            z = a.abs() if self.folded else x[:, 0] / 2 + math.sqrt(0.5) * (a + self.said * a**3 / 3)
            jacobian = 0 * a if self.folded else math.log(math.sqrt(0.5)) + 0 * a
            pyro.sample("z", dist.Delta(z, log_density=-jacobian))


def _vae(prior: str, posterior: str, likelihood: str = "normal") -> Any:
    return pv.build("mlp", posterior, (4,), latent_dim=2, prior=prior, likelihood=likelihood, seed=0,
                    **{"decoder.hidden": [8], "encoder.hidden": [8]})  # fmt: skip


RIGHT: dict[str, Callable[[], Any]] = {
    "PPCA, exact guide": lambda: LinearGaussian(rotated(6, 4, 0.55, 2), 0.6),
    "PPCA, guide 0.6 times as wide": lambda: LinearGaussian(rotated(6, 2, 0.55, 2), 0.6, width=0.6),
    "PPCA, guide 0.8 times as wide": lambda: LinearGaussian(rotated(6, 4, 0.55, 2), 0.6, width=0.8),
    "PPCA, guide 1.5 times as wide": lambda: LinearGaussian(rotated(6, 4, 0.55, 2), 0.6, width=1.5),
    "PPCA, diagonal guide": lambda: LinearGaussian(rotated(6, 4, 0.55, 2), 0.6, guide="diagonal"),
    "PPCA, 20 latents": lambda: LinearGaussian(rotated(30, 20, 0.3, 1), 1.0, width=1.1),
    "ppca of ours": lambda: declared(rotated(6, 3, 0.5, 1), 0.7, width=1.2)[0],
    "masked elements": lambda: MissingElements(rotated(6, 3, 0.6, 4), 0.7, width=1.2),
    "masked rows": lambda: MissingElements(rotated(6, 3, 0.6, 4), 0.7, width=1.2, rows=True),
    "missing entries": lambda: Missing(rotated(6, 2, 0.6, 4), 0.7),
    "two layers": lambda: Hierarchy(rotated(3, 2, 0.8, 5), rotated(6, 3, 0.7, 6), 0.8, 0.6, width=1.2),
    "discrete, exact guide": lambda: Mixture(temper=1.0),
    "discrete, spread guide": lambda: Mixture(temper=0.5),
    "discrete above continuous": lambda: MixedLatents(),
    "class known in some rows": lambda: Known(),
    "positive latents": lambda: GammaPoisson(),
    "latents in (0, 1)": lambda: BetaBinomial(),
    "heavy-tailed prior": lambda: HeavyTails(),
    "one latent, off centre": lambda: OneNormal(),
    "mixture prior of ours, untrained": lambda: _vae("gaussian-mixture", "full-rank"),
}

FAULTY: dict[str, tuple[Callable[[], Any], float]] = {
    "constant of 0.1, all rows": (lambda: Line(off(constant=0.1)), 0.99),
    "constant of 0.5, one row of 100": (lambda: Line(off(constant=0.5, only=data_of(Line(off()))[0][7, 0] / 2)), 0.99),
    "shape: tanh of 1, all rows": (lambda: Line(off(tilt=1.0)), 0.99),
    "shape: tanh of 0.5, all rows": (lambda: Line(off(tilt=0.5)), 0.0),
    "shape: tanh of 0.1, all rows": (lambda: Line(off(tilt=0.1)), 0.0),
    "mask on one side": (lambda: Known(both=False), 0.99),
    "a point in some rows": (lambda: Line(lambda x: dist.Normal(1 + x[:, 0] / 2, torch.where(x[:, 0] > 2, 1e-8, 0.75))), 0.99),
    "Jacobian of another map": (lambda: Flow(0.3), 0.99),
    "two-to-one map": (lambda: Flow(0.0, folded=True), 0.99),
    "missed mass of 0.1, all rows": (lambda: Twofold(0.1), 0.99),
    "missed mass of 0.5, 20 % of rows": (lambda: Twofold(0.5, every=5), 0.99),
    "missed mass of 0.02, all rows": (lambda: Twofold(0.02), 0.0),
    "missed mass of 0.5, 5 % of rows": (lambda: Twofold(0.5, every=20), 0.0),
    "narrower support": (lambda: Line(lambda x: dist.TransformedDistribution(
        dist.Uniform(0 * x[:, 0], 1 + 0 * x[:, 0]), [dist.transforms.AffineTransform(-1.5, 3.0)])), 0.99),
}  # fmt: skip


def data_of(program: Any, num: int = 100) -> tuple[Tensor, Tensor | None]:
    """Rows of data like the model's, and what it is conditioned on."""
    labels = getattr(program, "labels", None)
    y = None if labels is None else labels(num)
    if isinstance(program, Known):
        y = torch.tensor([0, -1, 1, -1, 2, -1])[torch.arange(num) % 6]
    x = pv.sample(program, num, y, event_shape=tuple(program.event_shape), seed=1)
    if isinstance(program, Missing):
        x = torch.where(torch.arange(x.numel()).reshape(x.shape) % 7 == 3, torch.nan, x)
    return x, y
