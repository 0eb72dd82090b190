"""A small exact program in many shapes, and the doors of the library through which data come."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.analysis.imputation import impute
from pyro_vae.analysis.mcmc import sample_chains

ROWS = 6


class Base(nn.Module):
    """z ~ N(0, I) in two dimensions, x | z ~ N(W z, I), in whatever shape a test asks for; the guide is the posterior."""

    def __init__(self, shape: tuple[int, ...] = (4,)) -> None:
        super().__init__()
        self.shape, size = shape, math.prod(shape)
        generator = torch.Generator().manual_seed(0)
        draw = lambda *s: nn.Parameter(torch.randn(*s, generator=generator, dtype=torch.float64))  # noqa: E731
        self.encoder, self.decoder = draw(size, 2), draw(2, size)

    def likelihood(self, loc: Tensor) -> Any:
        """Of the decoder's output ``(*leading, size)``."""
        return dist.Normal(loc.unflatten(-1, self.shape), 1.0).to_event(len(self.shape))

    def observed(self, x: Tensor) -> Tensor:
        return x

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", self.likelihood(z @ self.decoder), obs=self.observed(x))

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.posterior(x.flatten(1)))

    def posterior(self, x: Tensor) -> Any:
        """N(P^-1 W x, P^-1), P = W W^T + I, of flat x."""
        w = self.decoder
        covariance = torch.linalg.inv(w @ w.T + torch.eye(2, dtype=w.dtype))
        return dist.MultivariateNormal(x @ w.T @ covariance, covariance)


def rows(*shape: int, n: int = ROWS) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def made(name: str, shape: tuple[int, ...] = (4,), **functions: Any) -> Any:
    return type(name, (Base,), functions)(shape)


DOORS: dict[str, Callable[[Any, Tensor], Any]] = {
    "fit": lambda p, x: pv.fit(p, x, steps=1),
    "log_likelihood": lambda p, x: pv.log_likelihood(p, x, num_samples=30),
    "bound_curve": lambda p, x: pv.bound_curve(p, x, num_samples=30),
    "encode": lambda p, x: pv.encode(p, x),
    "reconstruct": lambda p, x: pv.reconstruct(p, x),
    "posterior": lambda p, x: pv.posterior(p, x, num_samples=5),
    "annealing": lambda p, x: pv.annealed_log_likelihood(p, x, num_distributions=5),
    "gaps": lambda p, x: pv.inference_gaps(p, x, num_steps=1, num_final_draws=2),
    "information": lambda p, x: pv.latent_information(p, x),
    "chains": lambda p, x: sample_chains(p, x, num_samples=2, num_warmup=2),
    "impute": lambda p, x: impute(p, x, torch.ones(x.shape[1:], dtype=torch.bool), num_rounds=2),
}
