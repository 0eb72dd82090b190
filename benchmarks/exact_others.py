"""More models whose log p(x) is known: discrete, positive and bounded latents, and heavy tails. See exact.py."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import scipy.stats
import torch
from exact import Exact, Latents, normal_cdf, rotated
from torch import Tensor, nn

from pyro_vae.seeding import derive_seed, generator

GRID = 4001  # points of the quadrature over one heavy-tailed latent


def _numpy(name: str, seed: int) -> np.random.Generator:
    return np.random.default_rng(derive_seed(f"exact: {name}", seed))


def _float(value: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


class Mixture(Exact):
    """c ~ Categorical, x | c ~ N(m_c, noise^2 I): log p(x) is a sum over c.

    Args:
        components, dim: how many, in how many dimensions.
        noise: the scale of each.
        temper: of the guide, the exact posterior to that power: below 1 it is too spread.
    """

    def __init__(self, components: int = 4, dim: int = 2, noise: float = 1.0, temper: float = 0.5) -> None:
        super().__init__()
        self.event_shape, self.noise, self.temper = (dim,), noise, temper
        self.means = nn.Parameter(rotated(components, dim, 1.5, seed=3).float())
        self.logits = nn.Parameter(torch.linspace(-0.7, 0.7, components))

    def _scores(self, x: Tensor, means: Tensor, logits: Tensor) -> Tensor:
        """Log p(x, c), ``(N, components)``."""
        normal = torch.distributions.Normal(means, self.noise)
        return logits.log_softmax(-1) + normal.log_prob(x.unsqueeze(-2)).sum(-1)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            c = pyro.sample("c", dist.Categorical(logits=self.logits))
            pyro.sample("x", dist.Normal(self.means[c], self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("c", dist.Categorical(logits=self.temper * self._scores(x, self.means, self.logits)))

    def log_px(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self._scores(x.double(), self.means.detach().double(), self.logits.detach().double()).logsumexp(-1)

    def joint(self, num: int, seed: int = 0) -> tuple[Latents, Tensor]:
        random = generator("exact: mixture", seed)
        c = torch.multinomial(self.logits.detach().softmax(-1), num, replacement=True, generator=random)
        noise = torch.randn(num, *self.event_shape, generator=random)
        return {"c": c}, self.means.detach()[c] + self.noise * noise


class MixedLatents(Mixture):
    """A mixture with a continuous latent below the discrete one: c, then z | c ~ N(m_c, I), then x | z ~ N(z, noise^2 I)."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            c = pyro.sample("c", dist.Categorical(logits=self.logits))
            z = pyro.sample("z", dist.Normal(self.means[c], 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        variance = 1 / (1 + self.noise**-2)
        with pyro.plate("data", x.shape[0], dim=-1):
            c = pyro.sample("c", dist.Categorical(logits=self.temper * self._scores(x, self.means, self.logits)))
            loc = variance * (self.means[c] + x / self.noise**2)
            pyro.sample("z", dist.Normal(loc, 1.2 * math.sqrt(variance)).to_event(1))

    def _scores(self, x: Tensor, means: Tensor, logits: Tensor) -> Tensor:
        normal = torch.distributions.Normal(means, math.sqrt(1 + self.noise**2))
        return logits.log_softmax(-1) + normal.log_prob(x.unsqueeze(-2)).sum(-1)

    def joint(self, num: int, seed: int = 0) -> tuple[Latents, Tensor]:
        found, below = super().joint(num, seed)
        above = torch.randn(num, *self.event_shape, generator=generator("exact: between", seed))
        return found, below + above  # of which the parts are never looked at


class GammaPoisson(Exact):
    """z_d ~ Gamma(a, b), x_(d, j) ~ Poisson(z_d), j = 1 ... m: positive latents, the posterior Gamma(a + sum_j x, b + m).

    Args:
        latent_dim, count: D and m.
        shape, rate: a and b.
        spread: the guide is the posterior with both parameters divided by that: above 1 it is wider.
    """

    def __init__(
        self, latent_dim: int = 2, count: int = 2, shape: float = 3.0, rate: float = 1.0, spread: float = 1.3
    ) -> None:
        super().__init__()
        self.event_shape, self.a, self.b, self.spread = (latent_dim, count), shape, rate, spread

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            a = x.new_full(self.event_shape[:1], self.a)
            z = pyro.sample("z", dist.Gamma(a, self.b).to_event(1))
            rate = z.unsqueeze(-1).expand(*z.shape, self.event_shape[1])
            pyro.sample("x", dist.Poisson(rate).to_event(2), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            a, b = (self.a + x.sum(-1)) / self.spread, (self.b + self.event_shape[1]) / self.spread
            pyro.sample("z", dist.Gamma(a, b).to_event(1))

    def _posterior(self, x: Tensor) -> tuple[np.ndarray, float]:
        return self.a + x.double().sum(-1).numpy(), self.b + self.event_shape[1]

    def log_px(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x = x.double()
        total, m = x.sum(-1), self.event_shape[1]
        a, b = torch.tensor(self.a, dtype=torch.float64), torch.tensor(self.b, dtype=torch.float64)
        per_unit = torch.lgamma(a + total) - torch.lgamma(a) + a * b.log() - (a + total) * (b + m).log()
        return (per_unit - torch.lgamma(x + 1).sum(-1)).sum(-1)

    def joint(self, num: int, seed: int = 0) -> tuple[Latents, Tensor]:
        random = _numpy("gamma", seed)
        z = random.gamma(self.a, 1 / self.b, (num, self.event_shape[0]))
        return {"z": _float(z)}, _float(random.poisson(z[:, :, None], (num, *self.event_shape)))

    def posterior_draw(self, x: Tensor, seed: int = 0) -> Latents:
        a, b = self._posterior(x)
        return {"z": _float(_numpy("gamma posterior", seed).gamma(a, 1 / b))}

    def pit(self, z: Latents, x: Tensor) -> Tensor:
        a, b = self._posterior(x)
        return torch.from_numpy(scipy.stats.gamma.cdf(z["z"].numpy(), a, scale=1 / b))


class BetaBinomial(Exact):
    """z_d ~ Beta(a, b), x_d ~ Binomial(n, z_d): latents in the unit interval, the posterior Beta(a + x, b + n - x).

    Args:
        latent_dim, trials: D and n.
        alpha, beta: a and b.
        spread: the guide is the posterior with both parameters divided by that: above 1 it is wider.
    """

    def __init__(
        self, latent_dim: int = 2, trials: int = 4, alpha: float = 3.0, beta: float = 2.0, spread: float = 1.3
    ) -> None:
        super().__init__()
        self.event_shape, self.trials, self.a, self.b, self.spread = (latent_dim,), trials, alpha, beta, spread

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            a = x.new_full(self.event_shape, self.a)
            z = pyro.sample("z", dist.Beta(a, self.b).to_event(1))
            pyro.sample("x", dist.Binomial(self.trials, probs=z).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            a, b = (self.a + x) / self.spread, (self.b + self.trials - x) / self.spread
            pyro.sample("z", dist.Beta(a, b).to_event(1))

    def log_px(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        found = scipy.stats.betabinom.logpmf(x.double().numpy(), self.trials, self.a, self.b)
        return torch.from_numpy(found).sum(-1)

    def joint(self, num: int, seed: int = 0) -> tuple[Latents, Tensor]:
        random = _numpy("beta", seed)
        z = random.beta(self.a, self.b, (num, *self.event_shape))
        return {"z": _float(z)}, _float(random.binomial(self.trials, z))

    def _posterior(self, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        found = x.double().numpy()
        return self.a + found, self.b + self.trials - found

    def posterior_draw(self, x: Tensor, seed: int = 0) -> Latents:
        return {"z": _float(_numpy("beta posterior", seed).beta(*self._posterior(x)))}

    def pit(self, z: Latents, x: Tensor) -> Tensor:
        return torch.from_numpy(scipy.stats.beta.cdf(z["z"].numpy(), *self._posterior(x)))


class HeavyTails(Exact):
    """z_d ~ Student t, x_d ~ N(z_d, noise^2); or z_d ~ N(0, 1), x_d ~ Student t around z_d: by quadrature, unit by unit.

    Args:
        latent_dim: D.
        where: what has the heavy tails, the ``prior`` or the ``likelihood``.
        freedom: its degrees of freedom.
        noise: the scale of x given z.
        width: of the guide, a Student t at the posterior's mean, in units of the posterior's scale.
    """

    def __init__(
        self, latent_dim: int = 2, where: str = "prior", freedom: float = 4.0, noise: float = 1.0, width: float = 1.2
    ) -> None:
        super().__init__()
        self.event_shape, self.heavy_prior, self.freedom = (latent_dim,), where == "prior", freedom
        self.noise, self.width = noise, width
        # the guide's mean and scale are looked up on a grid of x, the quadrature's own moments
        z = torch.linspace(-60, 60, GRID, dtype=torch.float64)
        self.grid, self.step = z, float(z[1] - z[0])
        at = torch.linspace(-12, 12, 481, dtype=torch.float64)
        log_joint = self._log_joint(at)
        weight = (log_joint - log_joint.logsumexp(-1, keepdim=True)).exp()
        mean = weight @ z
        scale = (weight @ z.square() - mean.square()).sqrt()
        self.register_buffer("means", mean.float())
        self.register_buffer("scales", (width * scale).float())

    def _log_joint(self, x: Tensor) -> Tensor:
        """Log p(x, z) of elements ``(n,)`` on the grid, ``(n, GRID)``, in float64."""
        z = self.grid
        student = torch.distributions.StudentT(torch.tensor(self.freedom, dtype=torch.float64))
        normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
        prior, error = (student, normal) if self.heavy_prior else (normal, student)
        return prior.log_prob(z) + error.log_prob((x.double()[:, None] - z) / self.noise) - math.log(self.noise)

    def model(self, x: Tensor) -> None:
        zero = x.new_zeros(self.event_shape)
        student, normal = dist.StudentT(self.freedom, zero, 1.0), dist.Normal(zero, 1.0)
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", (student if self.heavy_prior else normal).to_event(1))
            seen = dist.Normal(z, self.noise) if self.heavy_prior else dist.StudentT(self.freedom, z, self.noise)
            pyro.sample("x", seen.to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        place = ((x.clamp(-12, 12) + 12) / 24 * 480).round().long()
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.StudentT(self.freedom, self.means[place], self.scales[place]).to_event(1))

    def log_px(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        per_unit = self._log_joint(x.reshape(-1)).logsumexp(-1) + math.log(self.step)
        return per_unit.reshape(x.shape).sum(-1)

    def joint(self, num: int, seed: int = 0) -> tuple[Latents, Tensor]:
        random = _numpy("student", seed)
        shape = (num, *self.event_shape)
        student, normal = random.standard_t(self.freedom, shape), random.standard_normal(shape)
        z, error = (student, normal) if self.heavy_prior else (normal, student)
        return {"z": _float(z)}, _float(z + self.noise * error)

    def _cumulative(self, x: Tensor) -> Tensor:
        """The posterior's distribution function at the grid's points, of elements ``(n,)``: ``(n, GRID)``."""
        mass = self._log_joint(x).softmax(-1)
        return mass.cumsum(-1) - 0.5 * mass

    def posterior_draw(self, x: Tensor, seed: int = 0) -> Latents:
        flat, found = x.reshape(-1), []
        uniform = _numpy("student posterior", seed).uniform(size=len(flat))
        for row, u in zip(self._cumulative(flat).numpy(), uniform, strict=True):
            found.append(np.interp(u, row, self.grid.numpy()))
        return {"z": _float(np.array(found)).reshape(x.shape)}

    def pit(self, z: Latents, x: Tensor) -> Tensor:
        value = z["z"].double()
        flat = value.reshape(-1, x.numel()).numpy()
        rows = self._cumulative(x.reshape(-1)).numpy()
        found = [np.interp(flat[:, i], self.grid.numpy(), row) for i, row in enumerate(rows)]
        return torch.from_numpy(np.stack(found, -1)).reshape(value.shape)


class OneNormal(Exact):
    """One latent, z ~ N(0, 1), x ~ N(z, 1), and a guide N(x / 2 + shift, width^2 / 2): every E log of K weights by quadrature.

    The log-weight is a polynomial of degree two in the noise of the guide.
    """

    event_shape = (1,)

    def __init__(self, width: float = 1.3, shift: float = 0.3) -> None:
        super().__init__()
        self.width, self.shift = width, shift

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.Normal(x / 2 + self.shift, self.width * math.sqrt(0.5)).to_event(1))

    def log_px(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return torch.distributions.Normal(0.0, math.sqrt(2)).log_prob(x.double()).sum(-1)

    def joint(self, num: int, seed: int = 0) -> tuple[Latents, Tensor]:
        random = _numpy("one normal", seed)
        z = random.standard_normal((num, 1))
        return {"z": _float(z)}, _float(z + random.standard_normal((num, 1)))

    def pit(self, z: Latents, x: Tensor) -> Tensor:
        return normal_cdf(z["z"], x.double() / 2, torch.tensor(math.sqrt(0.5)))

    def log_ratio(self, noise: Tensor) -> Tensor:
        """Log w - log p(x) at noises of the guide, whatever x."""
        at = self.shift + self.width * math.sqrt(0.5) * noise
        return -at.square() + 0.5 * noise.square() + math.log(self.width)

    def bound(self, num_samples: int) -> float:
        """E log (1/K) sum_k w_k - log p(x), by E log S = integral of (exp(-t) - E[exp(-t S)]) / t over t."""
        noise, mass = np.polynomial.hermite_e.hermegauss(160)
        ratio = np.exp(self.log_ratio(torch.from_numpy(noise)).numpy())
        log_t = np.linspace(-45, 25, 20_001)
        transform = (np.exp(-np.exp(log_t)[:, None] * ratio / num_samples) * mass / mass.sum()).sum(-1)
        return float(np.trapezoid(np.exp(-np.exp(log_t)) - transform**num_samples, log_t))
