"""Fits that have degenerated, by name: here and nowhere else, for whoever trains, evaluates or reports.

    no active unit      Var_x(E_q[u | x]) <= 0.01 for every unit u, and another row's latents explain a datum as well as its own
    a model without z   log p(x | z) is the same for every z of the prior
    samples all alike   the mean of p(x | z) varies over the prior by less than 1e-4 of the variance of the data
    a negative KL       E_q[log q(z | x) - log p(z)] < 0, which no two densities have
    an ignored mark     infer={"enumerate": ...} at a site that the objective draws

Lucas et al. 2019, Don't blame the ELBO! A linear VAE perspective on posterior collapse, https://arxiv.org/abs/1911.02469.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_vae.evaluation.activity import Activity, unit_activity
from pyro_vae.precision import wide
from pyro_vae.programs.columns import layout_of
from pyro_vae.programs.latents import mean_of
from pyro_vae.programs.states import is_enumerable, joint_states
from pyro_vae.programs.trace import (
    Program,
    Traces,
    isolated,
    latent_sites,
    latent_values,
    observation,
    run,
    sum_log_prob,
    trace,
)
from pyro_vae.programs.walk import Block, Walk, at_once
from pyro_vae.seeding import derive_seed, seeded

AT_THE_PRIOR = 0.1  # nats of KL, below which a guide that does not look at x is called collapsed
ALIKE = 1e-4  # of the variance of the data
ROUNDING = 1e-5  # of a log-likelihood: what the order of sums may do to it
DRAWS, ROWS = 4, 64  # of z from the prior, and for how many rows
KL_DRAWS, FEW_ROWS = 2, 128
SURE = 4.0  # standard errors
FEWEST = 20  # data: of fewer, no variance is told


class DegenerateFitWarning(UserWarning):
    """A fit has degenerated: the latents tell nothing of the data, or nothing is made of them."""


def degenerate(
    program: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    activity: Activity | None = None,
    kl: float | None = None,
    seed: int = 0,
) -> list[str]:
    """What has degenerated in a fit: a line each, with the figure, what it means and the remedy; none for a sound one.

    Args:
        program: any Program.
        x: training data ``(N, *event)``; of fewer than 20 rows nothing is said.
        y: what a conditional program is conditioned on, ``(N, ...)``.
        activity: of the units over these data, where it is known.
        kl: in nats per datum, where it is known and was held to theory (an evaluation does so); else it is estimated and held.
        seed: of the draws; torch's generators are put back.

    Example:
        >>> import pyro_vae as pv
        >>> degenerate(pv.build("ppca", "linear", (3,), latent_dim=2), 3 * torch.randn(50, 3))
        []
    """
    if len(x) < FEWEST:
        return []
    found: list[str] = []
    drawn = _prior(program, x[:ROWS], None if y is None else y[:ROWS], seed)
    if drawn is None:  # no latents
        return []
    if kl is None or not math.isfinite(kl):
        kl, negative = _kl(program, x[:FEW_ROWS], None if y is None else y[:FEW_ROWS], seed)
        found += negative
    activity = unit_activity(program, x, y, seed=seed) if activity is None else activity
    idle = inactive(activity, kl)
    if idle is not None and _told_apart(program, x[:FEW_ROWS], None if y is None else y[:FEW_ROWS], seed):
        idle = None  # by spreads, or by many units a little each
    return [*found, *(line for line in (unused(*drawn), idle) if line is not None)]


def inactive(activity: Activity, kl: float) -> str | None:
    """A line where no unit is active: collapsed to the prior, or the same for every x and away from it."""
    if activity.without_mean or not activity.names or bool(activity.active.any()):
        return None
    none = f"none of {len(activity.names)} units is active: the guide says the same whatever x is"
    if abs(kl) < AT_THE_PRIOR:
        return (
            f"{none}, and has collapsed to the prior (KL {kl:.2g} nats); use KL warm-up or free bits, or a weaker decoder, or "
            "train longer"
        )
    return (
        f"{none}, and stands away from the prior: its KL of {kl:.4g} nats tells nothing of x and is lost from the ELBO; train "
        "longer, with a smaller step size, or rescale the data"
    )


def unused(likelihood: Tensor, varies: float | None) -> str | None:
    """A line where the model makes the same of every z.

    Args:
        likelihood: log p(x | z) ``(draws, batch)``, z from the prior.
        varies: the variance of the mean of p(x | z) over the prior, as a share of that of the data, where it is known.
    """
    spread = likelihood.amax(0) - likelihood.amin(0)
    if bool((spread <= ROUNDING * likelihood.abs().amax(0).clamp(min=1.0)).all()):
        return (
            "the model makes nothing of its latents: log p(x | z) is the same for every z of the prior, and samples are all "
            "alike; see that p(x | z) is computed from z, and that no weight on the way is stuck at 0"
        )
    if varies is not None and varies < ALIKE:
        return (
            f"samples are all alike: over the prior, the mean of p(x | z) varies by {varies:.1g} of the variance of the data; "
            "train longer, or see whether the latents or the decoder have collapsed"
        )
    return None


def ignored_marks(traces: Traces, objective: Any) -> str | None:
    """A line where sites are marked to be summed over, and the objective draws them."""
    both = {**latent_sites(traces.model), **latent_sites(traces.guide)}
    sites = {n: s for n, s in both.items() if s["infer"].get("enumerate") and is_enumerable(s["fn"])}
    if objective.enumerates or not sites:
        return None
    summed = len(latent_sites(traces.model)) == 1 and joint_states(sites) is not None
    remedy = "train with the objective enumerated-elbo, or" if summed else "sum them out in the model, or"
    return (
        f'the sites {", ".join(map(repr, sites))} are marked infer={{"enumerate": ...}}, and the objective {objective} draws '
        f"them: the mark changes nothing; {remedy} leave the mark out"
    )


def _prior(program: Program, x: Tensor, y: Tensor | None, seed: int) -> tuple[Tensor, float | None] | None:
    """Log p(x | z) ``(draws, N)`` with z from the prior, and by what share of the data's variance means vary over it."""
    walk = Walk(program, x, y, rows=at_once("information"))
    for block in walk:
        with block:
            walk.keep(_of_prior(block, seed))
    parts = [part for part in walk.gathered() if part is not None]
    if not parts:
        return None
    variances = torch.cat([variance for _, variance in parts])
    values = x.detach().reshape(len(x), -1).cpu().double()
    mean = values.nanmean(0)
    of_data = float((values - mean).square().nanmean()) if len(x) > 1 else 0.0
    varies = float(variances.mean()) / of_data if of_data > 0 and bool(torch.isfinite(variances).all()) else None
    return torch.cat([likelihood for likelihood, _ in parts], 1), varies


def _of_prior(block: Block, seed: int) -> tuple[Tensor, Tensor] | None:
    program = block.walk.program
    with isolated(), seeded(derive_seed("z of the prior and data", seed, block.first), block.x.device):
        traced = run(program.model, block.x, block.y, num_samples=DRAWS)
        if not latent_sites(traced):
            return None
        likelihood = wide(sum_log_prob(traced, DRAWS, len(block), latent=False)).cpu()
        fn = traced.nodes[observation(traced)]["fn"]
        means = wide(mean_of(fn)).cpu()
    # plates inside of the rows', or columns of different units
    if means.dim() - fn.event_dim > 2 or layout_of(program, block.x) is not None:
        return likelihood, torch.full((len(block),), torch.nan)
    means = means.expand(DRAWS, len(block), *fn.event_shape)
    return likelihood, means.reshape(DRAWS, len(block), -1).var(0).mean(-1)


def _kl(program: Program, x: Tensor, y: Tensor | None, seed: int) -> tuple[float, list[str]]:
    """KL(q(z | x) || p(z)) in nats per datum, and what is to be said of it where it is negative."""
    from pyro_vae.evaluation import consistency  # which is seconds of scipy, and not for every training

    walk, sound = Walk(program, x, y, rows=at_once("information")), True
    for block in walk:
        with block, isolated(), seeded(derive_seed("KL of a fit", seed, block.first), block.x.device):
            traces = trace(program, block.x, block.y, num_samples=KL_DRAWS)
            terms = traces.terms(KL_DRAWS, len(block))
            sound = consistency.latents_have_densities(traces)
            rounding = 8 * torch.finfo(terms.log_prior.dtype).eps * (terms.log_guide.abs() + terms.log_prior.abs())
            walk.keep(tuple(wide(t).mean(0).cpu() for t in (terms.log_guide - terms.log_prior, rounding)))
    kl, rounding = (torch.cat([part[i] for part in walk.gathered()]) for i in (0, 1))
    claims = consistency.of_kl(kl, torch.full_like(kl, KL_DRAWS), rounding) if sound else []
    return float(kl.mean()), list(consistency.forbidden(claims))


def _told_apart(program: Program, x: Tensor, y: Tensor | None, seed: int) -> bool:
    """Whether its own latents explain a datum better than those of another row, by four standard errors."""
    walk = Walk(program, x, y, rows=at_once("information"))
    for block in walk:
        with block, isolated(), seeded(derive_seed("latents of another row", seed, block.first), block.x.device):
            traces, size = trace(program, block.x, block.y, num_samples=KL_DRAWS), len(block)
            others = {n: v.roll(size // 2, 1) for n, v in latent_values(traces.guide, KL_DRAWS, size).items()}
            swapped = run(program.model, block.x, block.y, num_samples=KL_DRAWS, at=others)
            pair = (sum_log_prob(traced, KL_DRAWS, size, latent=False) for traced in (traces.model, swapped))
            walk.keep(tuple(wide(t).mean(0).cpu() for t in pair))
    own, other = (torch.cat([part[i] for part in walk.gathered()]) for i in (0, 1))
    gain = own - other
    return bool(gain.mean() > SURE * gain.std() / math.sqrt(len(gain)))
