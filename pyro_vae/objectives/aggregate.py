"""Objectives that look at the guide over a whole minibatch: free bits, total correlation, and maximum mean discrepancy."""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from pyro_vae.errors import UserError
from pyro_vae.objectives.base import Objective
from pyro_vae.objectives.particles import draw
from pyro_vae.programs.contract import Program, isolated, latent_sites
from pyro_vae.programs.latents import sample_latents_like
from pyro_vae.registry import register


@register("objectives", "free-bits")
class FreeBits(Objective):
    """loss = -E_q log p(x | z) + sum_g max(free, E_x KL_g): no pressure on a group of latents that costs less than ``free`` nats.

    The groups are the coordinates of each latent site where both q and p factorise over them, and the whole site otherwise. The
    reported loss is minus the ELBO, without the floor. Kingma et al. 2016, https://arxiv.org/abs/1606.04934, section C.8.

    Args:
        free: nats per group, on average over the minibatch.
    """

    formula = "-E_q log p(x | z) + sum_g max(free, E_x KL_g)"
    compares_images = True

    def __init__(self, *, free: Annotated[float, Field(ge=0)] = 0.1) -> None:
        self.free = free

    def __call__(
        self, program: Program, x: Tensor, y: Tensor | None = None, step: Tensor | int = 0
    ) -> tuple[Tensor, Tensor]:
        """Minus the ELBO, and the floored loss."""
        particles = draw(program, x, y, 1, reparameterized="free-bits")
        with isolated():
            traces = particles.traces()
            terms = traces.terms(1, len(x))
            floored = torch.zeros((), dtype=x.dtype, device=x.device)
            for name, site in latent_sites(traces.guide).items():
                q, p, z = site["fn"], traces.model.nodes[name]["fn"], site["value"]
                if factorised(q) is not None and factorised(p) is not None:
                    kl = factorised(q).log_prob(z) - factorised(p).log_prob(z)
                    groups = kl.expand(1, len(x), *z.shape[2:]).flatten(2).mean((0, 1))
                else:
                    groups = (q.log_prob(z) - p.log_prob(z)).expand(1, len(x)).mean().reshape(1)
                floored = floored + groups.clamp(min=self.free).sum()
        loss = -terms.log_weight.mean()
        return loss.detach(), floored - terms.log_likelihood.mean()


@register("objectives", "tc")
class TotalCorrelation(Objective):
    """loss = -ELBO + (beta - 1) TC(q(z)), TC = KL(q(z) || prod_d q(z_d)), estimated on the minibatch: beta-TCVAE.

    The aggregate posterior q(z) = E_x q(z | x) is estimated by minibatch-weighted sampling over ``num_data`` training images;
    the estimate is biased, as in the paper. One latent site whose guide factorises over coordinates. The reported loss is minus
    the ELBO.
    Chen et al. 2018, https://arxiv.org/abs/1802.04942.

    Args:
        beta: the weight of the total correlation; 1 is the ELBO.
        num_data: the number of training images.
    """

    formula = "-ELBO + (beta - 1) KL(q(z) || prod_d q(z_d))"
    compares_images = True

    def __init__(
        self, *, beta: Annotated[float, Field(ge=0)] = 6.0, num_data: Annotated[int, Field(ge=1)] = 50_000
    ) -> None:
        self.beta, self.num_data = beta, num_data

    def __call__(
        self, program: Program, x: Tensor, y: Tensor | None = None, step: Tensor | int = 0
    ) -> tuple[Tensor, Tensor]:
        """Minus the ELBO, and the loss with the total correlation."""
        particles = draw(program, x, y, 1, reparameterized="tc")
        sites = latent_sites(particles.drawn)
        site = next(iter(sites.values()))
        base = factorised(site["fn"])
        if len(sites) != 1 or base is None or len(site["fn"].event_shape) != 1:
            raise UserError(
                f"the objective 'tc' needs one latent site whose guide factorises over its coordinates, not {list(sites)} with "
                f"{type(site['fn']).__name__}; use the posterior diagonal-normal"
            )
        with isolated():
            terms = particles.traces().terms(1, len(x))
            # log q(z_i | x_j) for every pair, by coordinate: (batch i, batch j, D)
            pairs = base.expand((1, len(x), site["value"].shape[-1])).log_prob(site["value"].squeeze(0).unsqueeze(1))
        weight = math.log(len(x) * self.num_data)
        joint = pairs.sum(-1).logsumexp(1) - weight
        marginals = (pairs.logsumexp(1) - weight).sum(-1)
        loss = -terms.log_weight.mean()
        return loss.detach(), loss + (self.beta - 1) * (joint - marginals).mean()


@register("objectives", "mmd")
class MaximumMeanDiscrepancy(Objective):
    """loss = -E_q log p(x | z) + (1 - alpha) KL + (alpha + weight - 1) MMD(q(z), p(z)): InfoVAE.

    The discrepancy of the aggregate posterior and the prior under the kernel exp(-|z - z'|^2 / D), summed over latent sites,
    estimated on the minibatch. The reported loss is minus the ELBO. Zhao, Song & Ermon 2019, https://arxiv.org/abs/1706.02262.

    Args:
        alpha: how much of the mutual information I(x; z) is kept from the KL; 0 and ``weight`` 1 give the ELBO, 1 no KL at all.
        weight: lambda of the paper.
    """

    formula = "-E_q log p(x | z) + (1 - alpha) KL + (alpha + weight - 1) MMD(q(z), p(z))"
    compares_images = True

    def __init__(
        self, *, alpha: Annotated[float, Field(le=1)] = 0.0, weight: Annotated[float, Field(ge=0)] = 1000.0
    ) -> None:
        self.alpha, self.weight = alpha, weight

    def __call__(
        self, program: Program, x: Tensor, y: Tensor | None = None, step: Tensor | int = 0
    ) -> tuple[Tensor, Tensor]:
        """Minus the ELBO, and the loss with the discrepancy."""
        particles = draw(program, x, y, 1, reparameterized="mmd")
        with isolated():
            terms = particles.traces().terms(1, len(x))
        prior = sample_latents_like(program, x, y)
        discrepancy = torch.zeros((), dtype=x.dtype, device=x.device)
        for name, site in latent_sites(particles.drawn).items():
            discrepancy = discrepancy + mmd(site["value"].squeeze(0).flatten(1), prior[name].flatten(1))
        kl = (terms.log_guide - terms.log_prior).mean()
        surrogate = -terms.log_likelihood.mean() + (1 - self.alpha) * kl
        return -terms.log_weight.mean().detach(), surrogate + (self.alpha + self.weight - 1) * discrepancy


def factorised(fn: Any) -> Any:
    """The distribution of single coordinates of an event whose coordinates are independent, or None."""
    while type(fn).__name__ == "MaskedDistribution":
        fn = fn.base_dist
    base: Any = getattr(fn, "base_dist", None)
    if type(fn).__name__ != "Independent" or len(base.event_shape) != 0:
        return None
    return base


def mmd(a: Tensor, b: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of two samples ``(n, D)``, unbiased (Gretton et al. 2012)."""

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        square = u.square().sum(-1)[:, None] + v.square().sum(-1) - 2 * u @ v.T
        return (-square.clamp(min=0) / u.shape[-1]).exp()

    def within(u: Tensor) -> Tensor:
        n = len(u)
        return (kernel(u, u).sum() - n) / (n * max(1, n - 1))

    return within(a) + within(b) - 2 * kernel(a, b).mean()
