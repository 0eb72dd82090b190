"""Objectives that look at the guide over a whole minibatch: free bits, total correlation, and maximum mean discrepancy."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from pyro_vae.errors import UserError
from pyro_vae.objectives.base import LAST_STEP, Objective
from pyro_vae.objectives.elbo import Steps
from pyro_vae.objectives.particles import Particles, draw
from pyro_vae.programs.coordinates import coordinate_log_prob
from pyro_vae.programs.functional import OfProgram
from pyro_vae.programs.latents import sample_latents_like
from pyro_vae.programs.masks import counted
from pyro_vae.programs.trace import Program, Traced, innermost, isolated, latent_sites, log_probs
from pyro_vae.registry import register


class Aggregate(Objective):
    """An objective whose reported loss is minus the ELBO, and whose surrogate has a term of the whole minibatch beside it."""

    compares_images = True

    def value(self, program: Program, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The surrogate, which is what is minimised."""
        return self(program, x, y, LAST_STEP)[1].detach()


@register("objectives", "free-bits")
class FreeBits(Aggregate):
    """loss = -E_q log p(x | z) + sum_l w_l sum_g max(free, E_x KL_g): no pressure on a group that costs less than ``free`` nats.

    The groups are the coordinates of each latent site where both q and p factorise over them, and the whole site otherwise, or
    where ``per`` is layer. w_l is 1, and in a warm-up the share of it that is over; with ``balance`` also proportional to
    (0.01 + abs E_x KL_l) / n_l there, of mean 1 over the layers l of n_l units, so that layers that carry little for their size
    are left to grow. The reported loss is minus the ELBO, without floor and weights. Kingma et al. 2016,
    https://arxiv.org/abs/1606.04934, section C.8; KL balancing: Vahdat et al. 2018, https://arxiv.org/abs/1802.04920, section H,
    and Vahdat & Kautz 2020, https://arxiv.org/abs/2007.03898, appendix A, which prints n_l above the line for below it, as its
    author says (https://github.com/NVlabs/NVAE/issues/26).

    Args:
        free: nats per group, on average over the minibatch.
        per: what a group is: a unit, or a layer (a latent site).
        warmup_steps: the number of optimizer steps over which the weight of the KL rises from 0 to 1.
        balance: whether layers are balanced while it rises.
    """

    formula = "-E_q log p(x | z) + sum_l w_l sum_g max(free, E_x KL_g)"

    def __init__(
        self,
        *,
        free: Annotated[float, Field(ge=0)] = 0.1,
        per: Literal["unit", "layer"] = "unit",
        warmup_steps: Steps = 0,
        balance: bool = False,
    ) -> None:
        if balance and not warmup_steps:
            raise UserError("free-bits balances layers in a warm-up: give warmup_steps beside balance")
        self.free, self.per, self.warmup_steps, self.balance = free, per, warmup_steps, balance

    def __call__(
        self, program: Program, x: Tensor, y: Tensor | None = None, step: Tensor | int = 0
    ) -> tuple[Tensor, Tensor]:
        """Minus the ELBO, and the floored loss."""
        particles = draw(program, x, y, 1, reparameterized="free-bits")
        with isolated():
            traces = particles.traces
            both = [(traced, log_probs(traced, scale=True)) for traced in (traces.guide, traces.model)]
            elbo, observed = _elbo_and_observed(particles, *both)
            layers = []
            for name in latent_sites(traces.guide):
                # an auxiliary site of the guide has no prior
                sites = [(traced.nodes[name], found[name]) for traced, found in both if name in found]
                layers.append((*self._floored(sites, len(x)), sites[0][0]["fn"].event_shape.numel()))
        return -elbo.mean().detach(), -observed.mean() + self._weighed(layers, step)

    def _weighed(self, layers: list[tuple[Tensor, Tensor, int]], step: Tensor | int) -> Tensor:
        """The floored KL of all layers, by their weights at a step; beside it their KL without a floor, and their units."""
        total: Any = sum(value for value, *_ in layers)
        if not layers or not self.warmup_steps:
            return total
        kl = torch.stack([value for value, *_ in layers])
        done = ((torch.as_tensor(step, dtype=kl.dtype, device=kl.device) + 1) / self.warmup_steps).clamp(max=1.0)
        weight = done
        if self.balance:
            carried = torch.stack([value for _, value, _ in layers]).detach().abs()
            share = (0.01 + carried) / kl.new_tensor([float(count) for *_, count in layers])
            weight = torch.where(done < 1, done * share / share.mean(), done)
        return (weight * kl).sum()

    def _floored(self, sites: list[tuple[Any, Tensor]], batch: int) -> tuple[Tensor, Tensor]:
        """The KL of a site's groups, masked and scaled, each on average over the minibatch: floored and not, added up."""
        terms: list[Any] = [log_prob.reshape(1, -1) for _, log_prob in sites]
        if self.per == "unit" and all(factorised(site["fn"]) is not None for site, _ in sites):
            terms = [coordinate_log_prob(site, sites[0][0]["value"], scale=True) for site, _ in sites]
        kl = terms[0] - terms[1] if len(terms) > 1 else terms[0]
        groups = kl.expand(1, batch, *kl.shape[2:]).reshape(batch, -1).mean(0)
        # no KL is below 0, and a floor of 0 is none: an estimate below it is chance
        return (groups.clamp(min=self.free) if self.free > 0 else groups).sum(), groups.sum()


@register("objectives", "tc")
class TotalCorrelation(Aggregate):
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
        site = next(iter(sites.values()), None)
        if site is None or len(sites) != 1 or factorised(site["fn"]) is None or len(site["fn"].event_shape) != 1:
            found = "none" if site is None else f"{list(sites)} with {type(site['fn']).__name__}"
            raise UserError(
                f"the objective 'tc' needs one latent site whose guide factorises over its coordinates, not {found}; use the "
                "posterior diagonal-normal"
            )
        _require_unmasked("tc", sites)
        with isolated():
            loss = -particles.log_weight().mean()
            # log q(z_i | x_j) for every pair, by coordinate: (batch i, batch j, D)
            pairs: Any = coordinate_log_prob(site, site["value"].squeeze(0).unsqueeze(1))
            pairs = pairs.expand(len(x), len(x), -1)
        weight = math.log(len(x) * self.num_data)
        joint = pairs.sum(-1).logsumexp(1) - weight
        marginals = (pairs.logsumexp(1) - weight).sum(-1)
        return loss.detach(), loss + (self.beta - 1) * (site["scale"] * (joint - marginals)).mean()


@register("objectives", "mmd")
class MaximumMeanDiscrepancy(Aggregate):
    """loss = -E_q log p(x | z) + (1 - alpha) KL + (alpha + weight - 1) MMD(q(z), p(z)): InfoVAE.

    The discrepancy of the aggregate posterior and the prior under the kernel exp(-|z - z'|^2 / D), summed over latent sites,
    estimated on the minibatch. The reported loss is minus the ELBO. Zhao, Song & Ermon 2019, https://arxiv.org/abs/1706.02262.

    Args:
        alpha: how much of the mutual information I(x; z) is kept from the KL; 0 and ``weight`` 1 give the ELBO, 1 no KL at all.
        weight: lambda of the paper.
    """

    formula = "-E_q log p(x | z) + (1 - alpha) KL + (alpha + weight - 1) MMD(q(z), p(z))"

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
            traces = particles.traces
            found = ((traced, log_probs(traced, scale=True)) for traced in (traces.guide, traces.model))
            log_weight, observed = _elbo_and_observed(particles, *found)
        # aside, for no statistics of a BatchNorm are of draws of the prior
        prior = OfProgram(program, lambda p: sample_latents_like(p, x, y)).stopped()
        discrepancy = torch.zeros((), dtype=x.dtype, device=x.device)
        sites = {name: site for name, site in latent_sites(particles.drawn).items() if name in prior}
        _require_unmasked("mmd", sites)
        for name, site in sites.items():
            both = (z.reshape(len(x), -1).to(x.dtype) for z in (site["value"], prior[name]))
            discrepancy = discrepancy + torch.as_tensor(site["scale"]).mean() * mmd(*both)
        kl = (observed - log_weight).mean()
        surrogate = -observed.mean() + (1 - self.alpha) * kl
        return -log_weight.mean().detach(), surrogate + (self.alpha + self.weight - 1) * discrepancy


def _elbo_and_observed(
    particles: Particles, guide: tuple[Traced, dict[str, Tensor]], model: tuple[Traced, dict[str, Tensor]]
) -> tuple[Tensor, Tensor]:
    """The terms of the ELBO, of traces and their log-densities, and the part of what is observed: x, and factors of either."""
    ours, theirs = (particles.total(found.values()) for _, found in (model, guide))
    seen, given = (
        particles.total(term for name, term in found.items() if traced.nodes[name]["is_observed"])
        for traced, found in (model, guide)
    )
    return ours - theirs, seen - given


def _require_unmasked(objective: str, sites: dict[str, Any]) -> None:
    """:class:`UserError` where a latent is masked in some rows: the draws of a batch are no sample of one law then."""
    for name, site in sites.items():
        mask = counted(site)
        if mask is not None and not bool(mask.all()):
            raise UserError(
                f"the objective {objective!r} compares the draws of a batch with each other, and the latent {name!r} is masked "
                "in some rows or elements; use elbo or free-bits"
            )


def factorised(fn: Any) -> Any:
    """The distribution of single coordinates of an event whose coordinates are independent, or None."""
    inner = innermost(fn)
    return None if inner.event_shape or not fn.event_shape else inner


def mmd(a: Tensor, b: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of two samples ``(n, D)``, unbiased (Gretton et al. 2012)."""

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        square = u.square().sum(-1)[:, None] + v.square().sum(-1) - 2 * u @ v.T
        return (-square.clamp(min=0) / u.shape[-1]).exp()

    def within(u: Tensor) -> Tensor:
        n = len(u)
        return (kernel(u, u).sum() - n) / (n * max(1, n - 1))

    return within(a) + within(b) - 2 * kernel(a, b).mean()
