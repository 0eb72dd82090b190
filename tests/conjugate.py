"""A linear-Gaussian model in float64, whose posterior is known and correlated: the truth that posteriors are held against.

p(z) = N(0, I),   p(x | z) = N(W z, s^2 I):   p(z | x) = N(P^-1 W^T x / s^2, P^-1),   P = W^T W / s^2 + I
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.seeding import generator

NOISE = 0.7


class LinearGaussian(nn.Module):
    """With its exact posterior as the guide, its scale times ``scale``; or with the best diagonal guide.

    The diagonal guide has the exact mean and the exact marginal scales (as wide as a diagonal guide must be for
    importance weights).
    """

    def __init__(self, dim: int = 5, latent_dim: int = 3, *, diagonal: bool = False, scale: float = 1.0) -> None:
        super().__init__()
        weight = torch.randn(dim, latent_dim, generator=generator(5), dtype=torch.float64)
        self.weight = nn.Parameter(weight)
        self.latent_dim, self.diagonal, self.scale, self.event_shape = latent_dim, diagonal, scale, (dim,)

    def exact(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(N, D)`` and covariance ``(D, D)`` of p(z | x)."""
        weight = self.weight.detach()
        precision = weight.T @ weight / NOISE**2 + torch.eye(self.latent_dim, dtype=x.dtype)
        covariance = torch.linalg.inv(precision)
        return x @ weight @ covariance / NOISE**2, covariance

    def evidence(self, x: Tensor) -> Tensor:
        """Log p(x), ``(N,)``."""
        weight = self.weight.detach()
        covariance = weight @ weight.T + NOISE**2 * torch.eye(len(weight), dtype=x.dtype)
        return torch.distributions.MultivariateNormal(x.new_zeros(len(weight)), covariance).log_prob(x)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            zero = x.new_zeros(self.latent_dim)
            z = pyro.sample("z", dist.Normal(zero, zero + 1).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T, NOISE).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        mean, covariance = self.exact(x)
        with pyro.plate("data", x.shape[0], dim=-1):
            if self.diagonal:
                pyro.sample("z", dist.Normal(mean, self.scale * covariance.diagonal().sqrt()).to_event(1))
            else:
                pyro.sample("z", dist.MultivariateNormal(mean, covariance_matrix=self.scale**2 * covariance))


def data(num: int = 6) -> Tensor:
    """Data drawn from the model."""
    random = generator(6)
    z = torch.randn(num, 3, generator=random, dtype=torch.float64)
    noise = torch.randn(num, 5, generator=random, dtype=torch.float64)
    return z @ LinearGaussian().weight.detach().T + NOISE * noise
