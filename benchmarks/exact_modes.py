"""Probabilistic PCA of |z|: a posterior of two modes, known, under a mixture of guides. See exact.py."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from exact import Exact, Latents, _randn
from torch import Tensor, nn

from pyro_vae.posteriors.equal_mixture import EqualMixture


class TwoModes(Exact):
    """z ~ N(0, 1), x | z ~ N(w |z|, noise^2 I): p(z | x) is N(m, s^2) of the model of z itself, cut at 0 and mirrored.

    The guide is a mixture of four normals: one at each mode, of ``width`` and 1.5 ``width`` times s, one about zero, one
    beyond the upper mode. Their mean weights differ, so that stratified draws have a smaller error than independent ones.
    """

    def __init__(self, weight: tuple[float, ...] = (1.0, 0.6, -0.8), noise: float = 0.9, width: float = 1.25) -> None:
        super().__init__()
        self.event_shape, self.noise, self.width = (len(weight),), noise, width
        self.weight = nn.Parameter(torch.tensor(weight))
        precision = 1 + self.weight.detach().double().square().sum() / noise**2
        self.scale = float(precision.rsqrt())

    def place(self, x: Tensor) -> Tensor:
        """m ``(N,)``, in float64."""
        return x.double() @ self.weight.detach().double() * (self.scale / self.noise) ** 2

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.abs().unsqueeze(-1) * self.weight, self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        m, s = self.place(x).to(x.dtype).clamp(min=0), self.width * self.scale
        parts = [(m, s), (-m, 1.5 * s), (torch.zeros_like(m), 2 * s), (m + 2 * s, s)]
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", EqualMixture([dist.Normal(loc, scale) for loc, scale in parts]))

    def log_px(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        w = self.weight.detach().double()
        covariance = torch.outer(w, w) + self.noise**2 * torch.eye(len(w), dtype=torch.float64)
        whole = torch.distributions.MultivariateNormal(w.new_zeros(len(w)), covariance).log_prob(x.double())
        return whole + math.log(2) + torch.special.log_ndtr(self.place(x) / self.scale)

    def joint(self, num: int, seed: int = 0) -> tuple[Latents, Tensor]:
        z, noise = _randn("two modes: z", seed, num), _randn("two modes: x", seed, num, len(self.weight))
        x = z.abs().unsqueeze(-1) * self.weight.detach().double() + self.noise * noise
        return {"z": z.float()}, x.float()

    def pit(self, z: Latents, x: Tensor) -> Tensor:
        """Of |z|: chains stay in the mode that they start in, and how many start where is the guide's to say."""
        below, m = torch.special.ndtr(-self.place(x) / self.scale), self.place(x)
        return ((torch.special.ndtr((z["z"].double().abs() - m) / self.scale) - below) / (1 - below)).unsqueeze(-1)
