"""Programs that nobody declared: what the library must take as it takes its own."""

from __future__ import annotations

from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn


def mlp(*widths: int) -> nn.Sequential:
    """Dense layers with tanh between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class TwoLayers(nn.Module):
    """z2 ~ N(0, I), z1 | z2 ~ N(f(z2), I), x | z1 ~ N(g(z1), s^2), s learned; x is flat: ``(N, D)``."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.f, self.g = mlp(2, 8, 3), mlp(3, 8, dim)
        self.up1, self.up2 = mlp(dim, 8, 6), mlp(3, 8, 4)
        self.log_scale = nn.Parameter(torch.tensor(-0.5))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            zero = x.new_zeros(2)
            z2 = pyro.sample("z2", dist.Normal(zero, zero + 1).to_event(1))
            loc = self.f(z2)
            z1 = pyro.sample("z1", dist.Normal(loc, torch.ones_like(loc)).to_event(1))
            pyro.sample("x", dist.Normal(self.g(z1), self.log_scale.exp()).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            loc, raw = self.up1(x).chunk(2, -1)
            z1 = pyro.sample("z1", dist.Normal(loc, nn.functional.softplus(raw)).to_event(1))
            loc, raw = self.up2(z1).chunk(2, -1)
            pyro.sample("z2", dist.Normal(loc, nn.functional.softplus(raw)).to_event(1))


class PyroExample(nn.Module):
    """As in Pyro's tutorial on the VAE: ``pyro.module`` calls, a plate without dim, a parameter-shaped prior."""

    def __init__(self, dim: int = 6, z_dim: int = 2) -> None:
        super().__init__()
        self.encoder, self.decoder, self.z_dim = mlp(dim, 8, 2 * z_dim), mlp(z_dim, 8, dim), z_dim

    def model(self, x: Tensor) -> Tensor:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc = x.new_zeros(torch.Size((x.shape[0], self.z_dim)))
            z_scale = x.new_ones(torch.Size((x.shape[0], self.z_dim)))
            z = pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))
            loc_img = self.decoder(z).sigmoid()
            pyro.sample("x", dist.Bernoulli(loc_img).to_event(1), obs=x)
        return loc_img

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(z_loc, raw.exp()).to_event(1))


class WithPyroParam(PyroModule):
    """A PyroModule whose observation scale is a constrained ``PyroParam``."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(dim, 8, 4), mlp(2, 8, dim)
        self.scale = PyroParam(torch.tensor(0.7), constraint=constraints.positive)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            zero = x.new_zeros(2)
            z = pyro.sample("z", dist.Normal(zero, zero + 1).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.scale).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


class Conditional(nn.Module):
    """p(z) p(x | z, y), q(z | x, y), y a class number ``(N,)``."""

    def __init__(self, dim: int = 6, classes: int = 3) -> None:
        super().__init__()
        self.classes = classes
        self.encoder, self.decoder = mlp(dim + classes, 8, 4), mlp(2 + classes, 8, dim)

    def with_class(self, tensor: Tensor, y: Tensor) -> Tensor:
        one_hot = nn.functional.one_hot(y.long(), self.classes).to(tensor.dtype)
        return torch.cat([tensor, one_hot.expand(*tensor.shape[:-1], self.classes)], -1)

    def model(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            zero = x.new_zeros(x.shape[0], 2)
            z = pyro.sample("z", dist.Normal(zero, zero + 1).to_event(1))
            logits = self.decoder(self.with_class(z, y)).reshape(*z.shape[:-1], *x.shape[1:])
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(x.dim() - 1), obs=x)

    def guide(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            loc, raw = self.encoder(self.with_class(x.flatten(1), y)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


class DiscreteLatent(nn.Module):
    """z ~ Bernoulli(pi)^3, x | z ~ N(g(z), 0.5^2): a latent without a reparameterization."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.encoder, self.decoder, self.prior = mlp(dim, 8, 3), mlp(3, 8, dim), nn.Parameter(torch.zeros(3))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Bernoulli(logits=self.prior).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))


class KnownWeights(nn.Module):
    """p(z) = N(0, 1), q(z) = N(0, scale^2), x independent of z: p(x) is known, and so is the spread of the weights."""

    def __init__(self, scale: float = 1.0, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            zero = x.new_zeros(self.dim)
            pyro.sample("z", dist.Normal(zero, zero + 1).to_event(1))
            pyro.sample("x", dist.Normal(zero.new_zeros(x.shape[1]), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(self.dim), self.scale).to_event(1))
