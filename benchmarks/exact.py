"""Models whose log p(x) and posterior are known, as Programs: what the library's instruments are held against.

Each is an ordinary Pyro program in float32, as users run them. The exact answers are computed in float64, of the very numbers
that the float32 parameters hold. Linear and Gaussian ones stand here, the others in exact_others.py.
"""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.networks.heads import positive_inverse
from pyro_vae.posteriors.full_rank_normal import MIN_SCALE
from pyro_vae.seeding import generator

Latents = dict[str, Tensor]


def rotated(dim: int, latent_dim: int, scale: float, seed: int = 0) -> Tensor:
    """Weights ``(dim, latent_dim)`` of independent normals: the posterior's coordinates are correlated."""
    random = generator("exact: weights", seed)
    return scale * torch.randn(dim, latent_dim, generator=random, dtype=torch.float64)


def orthogonal(dim: int, latent_dim: int, scale: float, seed: int = 0) -> Tensor:
    """Weights ``(dim, latent_dim)`` with orthogonal columns: the posterior's coordinates are independent."""
    columns, _ = torch.linalg.qr(rotated(dim, latent_dim, 1.0, seed))
    return scale * math.sqrt(dim) * columns


def normal_cdf(value: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The normal distribution function."""
    return torch.special.ndtr((value.double() - loc) / scale)


class Exact(nn.Module):
    """A Program with the truth beside it; ``x`` is ``(N, *event)`` in float32, the truth float64.

    Attributes:
        event_shape: of one datum.
        conditional: whether the program is ``model(x, y)``: then ``labels`` makes the y.
    """

    event_shape: tuple[int, ...] = ()
    conditional = False

    def log_px(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Log p(x), ``(N,)``."""
        raise NotImplementedError

    def joint(self, num: int, seed: int = 0) -> tuple[Latents, Tensor]:
        """Exact draws of latents and data, ``(num, *latent)`` by site and ``(num, *event)``."""
        raise NotImplementedError

    def posterior_draw(self, x: Tensor, seed: int = 0) -> Latents:
        """An exact draw of p(z | x) for each row, ``(N, *latent)`` by site."""
        raise NotImplementedError

    def pit(self, z: Latents, x: Tensor) -> Tensor:
        """The exact posterior's distribution function at latents ``(..., N, *latent)``, unit by unit: ``(..., N, D)``.

        Uniform on (0, 1), each unit by itself, if and only if the latents are draws from p(z | x).
        """
        raise NotImplementedError

    def draw(self, num: int, seed: int = 0) -> Tensor:
        """Data from the model, ``(num, *event)``."""
        return self.joint(num, seed)[1]

    def labels(self, num: int) -> Tensor | None:
        """What a conditional program is conditioned on, ``(num, ...)``."""
        return None


def _randn(name: str, seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(f"exact: {name}", seed), dtype=torch.float64)


class LinearGaussian(Exact):
    """p(z) = N(0, I), p(x | z) = N(W z + b, diag(noise^2)): probabilistic PCA, or factor analysis with noises that differ.

    Args:
        weight: W ``(dim, latent_dim)``.
        noise: one scale, or one of each element ``(dim,)``.
        guide: ``full``, the exact posterior's correlations; ``diagonal``, the best diagonal normal (that of the
            smallest KL(q || p)).
        width: of the guide, in units of those scales.
        shift: of the guide's mean, in units of its scales.
        factor: c of a ``pyro.factor`` -c |z|^2 / 2 of the model, whose integral is known; 0 for none.
    """

    def __init__(
        self,
        weight: Tensor,
        noise: float | Tensor,
        *,
        guide: str = "full",
        width: float = 1.0,
        shift: float = 0.0,
        factor: float = 0.0,
    ) -> None:
        super().__init__()
        dim, self.latent_dim = weight.shape
        self.event_shape, self.factor = (dim,), factor
        self.weight = nn.Parameter(weight.float())
        self.bias = nn.Parameter(_randn("bias", 0, dim).float())
        self.noise = nn.Parameter(torch.as_tensor(noise, dtype=torch.float64).expand(dim).float().clone())
        w, self.variance = self.weight.detach().double(), self.noise.detach().double() ** 2
        precision = (1 + factor) * torch.eye(self.latent_dim, dtype=torch.float64) + w.T @ (w / self.variance[:, None])
        self.precision, self.covariance = precision, torch.linalg.inv(precision)
        tril = torch.linalg.cholesky(self.covariance)
        if guide == "diagonal":
            tril = precision.diagonal().rsqrt().diag()
        self.diagonal = guide == "diagonal"
        self.register_buffer("gain", (self.covariance @ w.T / self.variance).float())
        self.register_buffer("tril", (width * tril).float())
        self.register_buffer("shift", (shift * tril.sum(1)).float())
        self.width = width

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(self.weight[0]), 1.0).to_event(1))
            if self.factor:
                pyro.factor("tilt", -0.5 * self.factor * z.square().sum(-1))
            pyro.sample("x", dist.Normal(z @ self.weight.T + self.bias, self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            loc = (x - self.bias) @ self.gain.T + self.shift
            if self.diagonal:
                pyro.sample("z", dist.Normal(loc, self.tril.diagonal()).to_event(1))
            else:
                pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=self.tril))

    def _centred(self, x: Tensor) -> Tensor:
        return x.double() - self.bias.detach().double()

    def log_px(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        w, scale = self.weight.detach().double(), 1 / (1 + self.factor)
        covariance = scale * w @ w.T + self.variance.diag()
        normal = torch.distributions.MultivariateNormal(torch.zeros(len(w), dtype=torch.float64), covariance)
        return normal.log_prob(self._centred(x)) + 0.5 * self.latent_dim * math.log(scale)

    def joint(self, num: int, seed: int = 0) -> tuple[Latents, Tensor]:
        z = _randn("latents", seed, num, self.latent_dim) / math.sqrt(1 + self.factor)
        noise = _randn("noise", seed, num, *self.event_shape) * self.variance.sqrt()
        return {"z": z.float()}, (z @ self.weight.detach().double().T + self.bias.detach().double() + noise).float()

    def mean(self, x: Tensor) -> Tensor:
        """The posterior's mean ``(N, D)``."""
        w = self.weight.detach().double()
        return self._centred(x) @ (w / self.variance[:, None]) @ self.covariance

    def posterior_draw(self, x: Tensor, seed: int = 0) -> Latents:
        noise = _randn("posterior", seed, len(x), self.latent_dim)
        return {"z": (self.mean(x) + noise @ torch.linalg.cholesky(self.covariance).T).float()}

    def pit(self, z: Latents, x: Tensor) -> Tensor:
        return normal_cdf(z["z"], self.mean(x), self.covariance.diagonal().sqrt())

    def elbo(self, x: Tensor) -> Tensor:
        """The guide's ELBO of each row, ``(N,)``: log p(x) - KL(q || p(z | x)) of two normals."""
        tril = self.tril.double()
        shift = self.gain.double() @ self._centred(x).T + self.shift.double()[:, None] - self.mean(x).T
        quadratic = (shift * (self.precision @ shift)).sum(0)
        trace = (self.precision * (tril @ tril.T)).sum()
        kl = trace - self.latent_dim - torch.logdet(self.precision) - 2 * tril.diagonal().log().sum()
        return self.log_px(x) - 0.5 * (kl + quadratic)

    @property
    def diagonal_gap(self) -> float:
        """KL from the best diagonal normal to the posterior, in nats: the approximation gap of that family."""
        return 0.5 * float(self.precision.diagonal().log().sum() - torch.logdet(self.precision))


class MissingElements(LinearGaussian):
    """A linear-Gaussian model some of whose data are masked: y ``(N, dim)``, True where x counts; p(x) is that of what counts.

    Args:
        weight, noise, width: as above.
        rows: mask whole rows, by ``poutine.mask``, rather than elements, by the distribution's own mask.
    """

    conditional = True

    def __init__(self, weight: Tensor, noise: float | Tensor, *, width: float = 1.0, rows: bool = False) -> None:
        super().__init__(weight, noise, width=width)
        self.rows = rows

    def labels(self, num: int) -> Tensor:
        """Half of the elements, or of the rows, at random but always the same for the same place."""
        if self.rows:
            return (torch.arange(num) % 2 == 0).unsqueeze(1).expand(num, *self.event_shape)
        random = generator("exact: mask")
        kinds = torch.rand(50, *self.event_shape, generator=random) < 0.5
        return kinds[torch.arange(num) % 50]

    def model(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(self.weight[0]), 1.0).to_event(1))
            element = dist.Normal(z @ self.weight.T + self.bias, self.noise)
            if self.rows:
                with pyro.poutine.mask(mask=y[:, 0]):
                    pyro.sample("x", element.to_event(1), obs=x)
            else:
                pyro.sample("x", element.mask(y).to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor) -> None:
        gain = self.weight / self.noise[:, None] ** 2
        precision = torch.eye(self.latent_dim) + torch.einsum("nd,di,dj->nij", y.to(x), gain, self.weight)
        loc = torch.linalg.solve(precision, ((x - self.bias) * y) @ gain)
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.MultivariateNormal(loc, precision_matrix=precision / self.width**2))

    def log_px(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        w, seen = self.weight.detach().double(), (self.labels(len(x)) if y is None else y).double()
        outer = seen[:, :, None] * seen[:, None, :]
        # what is masked is made independent of all else, with a variance of 1 and a value of 0
        covariance = outer * (w @ w.T + self.variance.diag()) + torch.diag_embed(1 - seen)
        normal = torch.distributions.MultivariateNormal(torch.zeros(len(w), dtype=torch.float64), covariance)
        return normal.log_prob(seen * self._centred(x)) + 0.5 * math.log(2 * math.pi) * (1 - seen).sum(1)

    def posterior_draw(self, x: Tensor, seed: int = 0) -> Latents:
        raise NotImplementedError


class Hierarchy(Exact):
    """Two layers: p(u) = N(0, I), p(z | u) = N(A u, s^2 I), p(x | z) = N(B z, t^2 I); the guide goes up, q(z | x) q(u | z).

    Args:
        upper: A ``(D, E)``, and ``lower``: B ``(dim, D)``.
        between, noise: the scales s and t.
        width: of the guide, in units of the exact conditional posteriors' scales.
    """

    def __init__(self, upper: Tensor, lower: Tensor, between: float, noise: float, *, width: float = 1.0) -> None:
        super().__init__()
        self.upper, self.lower = nn.Parameter(upper.float()), nn.Parameter(lower.float())
        self.between, self.noise, self.width = float(torch.tensor(between)), float(torch.tensor(noise)), width
        self.event_shape = (len(lower),)
        a, b = self.upper.detach().double(), self.lower.detach().double()
        one = lambda n: torch.eye(n, dtype=torch.float64)  # noqa: E731
        self.marginal = a @ a.T + self.between**2 * one(len(a))
        self.cov_z = torch.linalg.inv(torch.linalg.inv(self.marginal) + b.T @ b / self.noise**2)
        self.gain_z = self.cov_z @ b.T / self.noise**2
        self.cov_u = torch.linalg.inv(one(a.shape[1]) + a.T @ a / self.between**2)  # given z
        self.gain_u = self.cov_u @ a.T / self.between**2
        self.total_u = self.cov_u + self.gain_u @ self.cov_z @ self.gain_u.T  # given x
        for name, value in (("z", self.cov_z), ("u", self.cov_u)):
            self.register_buffer(f"tril_{name}", (width * torch.linalg.cholesky(value)).float())
        self.register_buffer("map_z", self.gain_z.float())
        self.register_buffer("map_u", self.gain_u.float())

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            u = pyro.sample("u", dist.Normal(torch.zeros_like(self.upper[0]), 1.0).to_event(1))
            z = pyro.sample("z", dist.Normal(u @ self.upper.T, self.between).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.lower.T, self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.MultivariateNormal(x @ self.map_z.T, scale_tril=self.tril_z))
            pyro.sample("u", dist.MultivariateNormal(z @ self.map_u.T, scale_tril=self.tril_u))

    def log_px(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        b = self.lower.detach().double()
        covariance = b @ self.marginal @ b.T + self.noise**2 * torch.eye(len(b), dtype=torch.float64)
        zero = torch.zeros(len(b), dtype=torch.float64)
        return torch.distributions.MultivariateNormal(zero, covariance).log_prob(x.double())

    def joint(self, num: int, seed: int = 0) -> tuple[Latents, Tensor]:
        a, b = self.upper.detach().double(), self.lower.detach().double()
        u = _randn("upper", seed, num, a.shape[1])
        z = u @ a.T + self.between * _randn("middle", seed, num, len(a))
        x = z @ b.T + self.noise * _randn("noise", seed, num, len(b))
        return {"u": u.float(), "z": z.float()}, x.float()

    def posterior_draw(self, x: Tensor, seed: int = 0) -> Latents:
        above, below = (
            _randn("posterior of u", seed, len(x), len(self.cov_u)),
            _randn("of z", seed, len(x), len(self.cov_z)),
        )
        z = x.double() @ self.gain_z.T + below @ torch.linalg.cholesky(self.cov_z).T
        u = z @ self.gain_u.T + above @ torch.linalg.cholesky(self.cov_u).T
        return {"u": u.float(), "z": z.float()}

    def pit(self, z: Latents, x: Tensor) -> Tensor:
        mean = x.double() @ self.gain_z.T
        of_z = normal_cdf(z["z"], mean, self.cov_z.diagonal().sqrt())
        of_u = normal_cdf(z["u"], mean @ self.gain_u.T, self.total_u.diagonal().sqrt())
        return torch.cat([of_u, of_z], -1)


def declared(
    weight: Tensor, noise: float, guide: str = "linear-full-rank", width: float = 1.0
) -> tuple[Any, LinearGaussian]:
    """The library's own ``ppca`` with these weights, its guide set to what :class:`LinearGaussian` has: (program, truth).

    Args:
        weight, noise, width: of the model and the guide, as in :class:`LinearGaussian`.
        guide: ``linear-full-rank``, or ``linear`` for a diagonal one.
    """
    diagonal = guide == "linear"
    truth = LinearGaussian(weight, noise, guide="diagonal" if diagonal else "full", width=width)
    vae = pv.build("ppca", guide, truth.event_shape, latent_dim=truth.latent_dim, seed=0)
    with torch.no_grad():
        vae.likelihood.head.map.weight.copy_(truth.weight)
        vae.likelihood.head.map.bias.copy_(truth.bias)
        vae.likelihood.raw_scale.fill_(positive_inverse(noise, vae.likelihood.min_scale))
        tril, head = truth.tril, vae.posterior.head.map
        floor = 1e-6 if diagonal else MIN_SCALE
        scales = torch.tensor([positive_inverse(float(v), floor) for v in tril.diagonal()])
        head.weight.copy_(torch.cat([truth.gain, torch.zeros_like(truth.gain)]))
        head.bias.copy_(torch.cat([-truth.gain @ truth.bias, scales]))
        if not diagonal:
            vae.posterior.below.map.weight.zero_()
            vae.posterior.below.map.bias.copy_(tril[tuple(torch.tril_indices(len(tril), len(tril), -1))])
    return vae, truth
