"""Hierarchies of linear maps and normals as they are declared, and what they are in closed form.

    z_L ~ N(0, I),   z_l | z_{l+1} ~ N(A_l z_{l+1} + b_l, diag s_l^2),   x | z_1 ~ N(W z_1 + c, s_0^2 I)

All of (x, z_1, ..., z_L) is one multivariate normal: its log-density, log p(x) and p(z | x) are those of blocks of its mean
and covariance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import pyro_vae as pv
from pyro_vae.networks.heads import positive
from pyro_vae.seeding import generator


def build(units: list[int], inference: str, dim: int, seed: int = 0) -> Any:
    """A declared program of linear maps in float64 with random weights, its scales no functions of anything."""
    options: dict[str, Any] = {"name": "hierarchical", "below": units[:-1], "inference": inference, "hidden": []}
    vae = pv.build(
        {"program": options, "latent_dim": units[-1], "likelihood": "normal", "decoder": "linear"},
        {"encoder": "linear"},
        (dim,),
        seed=seed,
    ).double()
    random = generator(seed)
    with torch.no_grad():
        for p in vae.parameters():
            p.copy_(0.7 * torch.randn(p.shape, generator=random, dtype=torch.float64))
        for normal in (*vae.priors, *vae.posteriors, vae.posterior):
            normal.head.map.weight.chunk(2)[1].zero_()
        vae.likelihood.raw_scale.fill_(0.1)
    return vae


def halves(normal: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and bias of the mean of a :class:`DiagonalNormal`, and its scales."""
    weight, bias = normal.head.map.weight.chunk(2)[0], normal.head.map.bias.chunk(2)
    return weight, bias[0], positive(bias[1])


def joint(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and covariance of (z_L, ..., z_1, x), a function of the program's parameters."""
    layers = [halves(normal) for normal in reversed(list(vae.priors))]
    likelihood = vae.likelihood
    noise = positive(likelihood.raw_scale, likelihood.min_scale).expand(likelihood.head.map.bias.shape)
    layers.append((likelihood.head.map.weight, likelihood.head.map.bias, noise))
    top = vae.prior.latent_shape[0]
    mean, covariance = torch.zeros(top).double(), torch.eye(top).double()
    for weight, bias, scale in layers:
        below = weight @ mean[-weight.shape[1] :] + bias
        cross = weight @ covariance[-weight.shape[1] :]
        own = cross[:, -weight.shape[1] :] @ weight.T + scale.square().diag()
        mean = torch.cat([mean, below])
        covariance = torch.cat([torch.cat([covariance, cross.T], 1), torch.cat([cross, own], 1)])
    return mean, covariance


def given(mean: Tensor, covariance: Tensor, wanted: slice, seen: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, bias and covariance of the block ``wanted`` given the block ``seen``."""
    weight = torch.linalg.solve(covariance[seen, seen], covariance[seen, wanted]).T
    return weight, mean[wanted] - weight @ mean[seen], covariance[wanted, wanted] - weight @ covariance[seen, wanted]


def log_evidence(vae: Any, x: Tensor) -> Tensor:
    """Log p(x), ``(N,)``."""
    mean, covariance = joint(vae)
    dim = x.shape[1]
    return MultivariateNormal(mean[-dim:], covariance[-dim:, -dim:]).log_prob(x)


def drawn(vae: Any, rows: int, seed: int = 5) -> Tensor:
    """Rows of the model's own x."""
    mean, covariance = (t.detach() for t in joint(vae))
    dim = vae.event_shape[0]
    noise = torch.randn(rows, dim, generator=generator(seed), dtype=torch.float64)
    return mean[-dim:] + noise @ torch.linalg.cholesky(covariance[-dim:, -dim:]).T


def _set(normal: Any, weight: Tensor, bias: Tensor, variance: Tensor) -> None:
    """Make a :class:`DiagonalNormal` N(weight f + bias, variance), of one unit."""
    raw = torch.log(torch.expm1(variance.sqrt() - 1e-6))
    normal.head.map.weight.copy_(torch.cat([weight, torch.zeros_like(weight)]))
    normal.head.map.bias.copy_(torch.cat([bias, raw.reshape(1)]))


@torch.no_grad()
def make_exact(vae: Any) -> None:
    """Give the guide of a program of one unit a layer the weights with which q(z | x) = p(z | x)."""
    mean, covariance = joint(vae)
    depth, dim = len(vae.priors) + 1, vae.event_shape[0]
    x, place = slice(depth, depth + dim), lambda i: slice(depth - 1 - i, depth - i)  # of layer i from below
    up, top = [*vae.posteriors, vae.posterior], depth - 1
    if vae.inference == "bottom-up":
        for i, normal in enumerate(up):
            weight, bias, variance = given(mean, covariance, place(i), place(i - 1) if i else x)
            _set(normal, weight, bias, variance)
        return
    weight, bias, variance = given(mean, covariance, place(top), x)
    _set(vae.posterior, weight, bias, variance)
    for i in range(top):
        if vae.inference == "top-down":  # the state of layer i given x and the next
            order = torch.tensor([*range(depth, depth + dim), depth - 2 - i, depth - 1 - i])
            m, c = mean[order], covariance[order][:, order]
            _set(up[i], *given(m, c, slice(dim + 1, dim + 2), slice(0, dim + 1)))
        else:  # p(x | z_i) as a normal of z_i
            weight, bias, noise = given(mean, covariance, x, place(i))
            precision = weight.T @ torch.linalg.solve(noise, weight)
            row = torch.linalg.solve(noise, weight).T / precision
            _set(up[i], row, -row @ bias, 1 / precision)
