"""Pixels that nobody saw, by the posterior of those that were seen.

    p(x_miss | x_obs) = E[p(x_miss | z) | x_obs],    p(z | x_obs) proportional to p(z) p(x_obs | z)

for likelihoods whose elements are independent given z. Chains go back and forth between z and x_miss: z is proposed
by the guide at the filled image and accepted by Metropolis and Hastings' rule, x_miss drawn from p(x_miss | z).
Without the rule this is the pseudo-Gibbs sampler of Rezende, Mohamed & Wierstra 2014,
https://arxiv.org/abs/1401.4082, appendix F; with it the chains have the right law whatever the guide: Mattei &
Frellsen 2018, https://arxiv.org/abs/1802.04826.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_vae.analysis.columns import impute_columns
from pyro_vae.data.record import Record
from pyro_vae.errors import UserError, warn
from pyro_vae.evaluation.blind import require_weights
from pyro_vae.evaluation.proven import blind_spots
from pyro_vae.evaluation.result import UnreliableEstimateWarning
from pyro_vae.programs.columns import elements
from pyro_vae.programs.contract import admit
from pyro_vae.programs.given import require_rows, require_y
from pyro_vae.programs.labels import needs_y
from pyro_vae.programs.latents import mean_of
from pyro_vae.programs.trace import (
    Program,
    Traces,
    evaluating,
    is_factor,
    is_random,
    isolated,
    latent_sites,
    latent_values,
    observation,
    run,
    to_program,
    y_to_program,
)
from pyro_vae.programs.values import check_conditions
from pyro_vae.seeding import derive_seed, seeded
from pyro_vae.signatures import checked

# Errors are from between chains, which start apart: slow chains are allowed for (those of an exact guide have an R-hat of 1.4
# where one element of six is seen), not chains that stay. Coverage is 0.95 where 1 % of images are above 2, 0.87 where 75 % are.
STAYS, MANY = 2.0, 0.05


class WithMissing(nn.Module):
    """A Program of which only some elements of x count, as a conditional one: y is where x was observed, ``(N, *event)``, 1 or 0.

    Everything that takes a Program takes it: ``pv.log_likelihood(WithMissing(p), x, seen)`` is log p(x_obs), and
    ``pv.posterior(WithMissing(p), x, seen, source="nuts")`` draws from p(z | x_obs). The guide sees x as it is: fill
    what is missing with something plausible (:func:`impute` does); importance weights and chains set right what the
    filling got wrong.

    Raises:
        UserError: when it is run, for a likelihood whose elements are not independent.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        if needs_y(program):
            raise UserError("a conditional program with missing pixels is not supported: its y is taken")
        self.program = program
        self.event_shape = getattr(program, "event_shape", None)

    def model(self, x: Tensor, seen: Tensor) -> None:
        """p(z) p(x_obs | z)."""
        with _Masked(seen.to(dtype=torch.bool)):
            self.program.model(x)

    def guide(self, x: Tensor, seen: Tensor) -> None:
        """q(z | x)."""
        self.program.guide(x)


class _Masked(Messenger):
    """Leave elements out of the log-density of the observed site."""

    def __init__(self, seen: Tensor) -> None:
        super().__init__()
        self.seen = seen

    def _pyro_sample(self, msg: Any) -> None:
        if is_random(msg) and msg["is_observed"] and not is_factor(msg):
            inner, axes = elements(msg["fn"])
            if inner.batch_shape[len(inner.batch_shape) - axes :].numel() * len(self.seen) != self.seen.numel():
                raise UserError(
                    f"the elements of {msg['name']!r} stand in a plate of their own, where WithMissing cannot tell them apart: "
                    "make it an event axis with .to_event(n)"
                )
            seen = self.seen.reshape(len(self.seen), *msg["fn"].event_shape)
            msg["fn"] = dist.MaskedDistribution(inner, seen).to_event(axes)


@dataclass(frozen=True, eq=False)
class Imputation:
    """What the posterior says of missing elements; tensors are on the CPU.

    Attributes:
        mean: E[x | x_obs], with x itself where it was seen, ``(N, *event)``.
        mc_se: Monte Carlo standard error of that mean, from the spread between chains, ``(N, *event)``.
        draws: complete data, x_miss from p(x_miss | x_obs), one from each chain: ``(num_chains, N, *event)``.
        acceptance: mean acceptance of the guide's proposals, ``(N,)``; near 0, do not rely on the rest.
        rhat: of the means of p(x_miss | z) along the chains, ``(N,)``, over the missing elements together: chains that stay where
            they started differ by more than each of them moves. Gelman & Rubin 1992, https://doi.org/10.1214/ss/1177011136.
    """

    mean: Tensor
    mc_se: Tensor
    draws: Tensor
    acceptance: Tensor
    rhat: Tensor

    @property
    def warnings(self) -> list[str]:
        """Whether the chains have forgotten where they started, as far as they can tell."""
        stuck = float((~(self.rhat <= STAYS)).double().mean())
        if stuck <= MANY:
            return []
        return [
            f"the chains of {stuck:.1%} of {len(self.rhat)} images have not forgotten where they started (R-hat above {STAYS:g}, "
            f"acceptance {float(self.acceptance.mean()):.0%}): their draws are too wide and their errors too small; use a wider "
            "guide, or more rounds (num_rounds)"
        ]


@checked
def impute(
    program: Program,
    x: Any,
    seen: Tensor | None = None,
    y: Tensor | None = None,
    *,
    num_chains: int = 16,
    num_rounds: int = 100,
    seed: int = 0,
    **options: Any,
) -> Any:
    """Fill the missing elements of x by the posterior of those seen.

    Of a record this is :func:`pyro_vae.analysis.columns.impute_columns`, with its options and its result.

    Args:
        program: any Program whose likelihood has independent elements and whose guide can score latents that it did
            not draw.
        x: data ``(N, *event)``; what stands where nothing was seen is not read.
        seen: bool ``(N, *event)`` or ``event``, True where x was observed.
        y: what a conditional program is conditioned on, ``(N, ...)``.
        num_chains: independent chains per image, each from a filling of its own.
        num_rounds: of proposing z and drawing x_miss; the first half is dropped.
        seed: of everything drawn; torch's generators are put back.
        options: of a record, ``num_samples`` and ``num_draws``.

    Returns:
        The conditional mean, with its error, and complete images.

    Raises:
        UserError: a likelihood whose elements are not independent given z, a guide that cannot score.

    Warns:
        UnreliableEstimateWarning: latents that the guide never proposes (beyond its support, discrete states): chains do not come
            there; chains that have not forgotten where they started.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.build("ppca", "linear", (3,), latent_dim=2)
        >>> impute(vae, torch.zeros(4, 3), torch.tensor([True, True, False])).mean.shape
        torch.Size([4, 3])
    """
    if isinstance(x, Mapping | Record):
        return impute_columns(program, x, y, seed=seed, **options)  # type: ignore[arg-type]
    if options:
        raise UserError(f"impute has no option {next(iter(options))!r} for a tensor: it is one of records")
    if num_chains < 2 or num_rounds < 2:
        raise UserError(f"expected at least 2 chains and 2 rounds, got {num_chains} and {num_rounds}")
    require_rows(x, program)
    require_y(program, len(x), y)
    if not isinstance(seen, Tensor) or seen.shape not in (x.shape, x.shape[1:]):
        got = tuple(seen.shape) if isinstance(seen, Tensor) else type(seen).__name__
        raise UserError(f"expected seen as a bool tensor {tuple(x.shape)} or {tuple(x.shape[1:])}, got {got}")
    x = to_program(program, x)
    seen = seen.to(x.device, torch.bool).expand(x.shape)
    event = (num_chains, *x.shape)
    wide = lambda t: t.expand(num_chains, *t.shape).flatten(0, 1)  # noqa: E731  # chains times images in one batch
    y = None if y is None else wide(y_to_program(program, y))
    known, mask = wide(x), wide(seen)
    filled = torch.where(mask, known, torch.zeros_like(known))
    traces = admit(program, filled[:2], None if y is None else y[:2], values=False)
    if y is not None:
        check_conditions(program, y[: len(x)], lambda rows: (filled[rows], y[rows]))
    elements(traces.model.nodes[observation(traces.model)]["fn"])
    require_weights(traces)
    own = sorted(set(latent_sites(traces.guide)) - set(latent_sites(traces.model)))
    if own:
        raise UserError(
            f"imputation needs a guide that can score latents that it did not draw, and its auxiliary site {own[0]!r} makes new "
            "ones at every filling: draw the latents themselves"
        )
    for message in blind_spots(program, filled, y, traces):
        warn(message, UnreliableEstimateWarning)
    total, accepted = torch.zeros(event, dtype=torch.float64), torch.zeros(num_chains, len(x), dtype=torch.float64)
    squares = torch.zeros(event, dtype=torch.float64)
    with evaluating(program), isolated(), seeded(derive_seed("imputation", seed), x.device):
        filled = torch.where(mask, known, _prior_draw(program, filled, y))
        z, _, fn = _pass(program, filled, y)
        filled = torch.where(mask, known, _rows(fn.sample(), fn, known))
        for index in range(num_rounds):
            try:
                _, weight, fn = _pass(program, filled, y, z)
            except NotImplementedError as error:
                raise UserError(
                    f"imputation needs a guide that can score latents that it did not draw: {error}"
                ) from None
            new, new_weight, new_fn = _pass(program, filled, y)
            change = torch.nan_to_num(new_weight - weight, nan=-torch.inf)
            accept = torch.rand_like(change).log() < change
            pick = lambda a, b, accept=accept: torch.where(accept.reshape(-1, *(1 for _ in a.shape[1:])), a, b)  # noqa: E731
            z = {n: pick(new[n][0], z[n][0]).unsqueeze(0) for n in z}
            drawn = pick(*(_rows(f.sample(), f, known) for f in (new_fn, fn)))
            filled = torch.where(mask, known, drawn)
            if index >= num_rounds // 2:
                mean = pick(*(_rows(mean_of(f), f, known) for f in (new_fn, fn)))
                total += (mean := mean.reshape(event).cpu().double())
                squares += mean.square()
                accepted += change.clamp(max=0).exp().reshape(accepted.shape).cpu().double()
    kept = num_rounds - num_rounds // 2
    means, hidden = total / kept, ~seen.cpu()
    within, between = (
        (t * hidden).flatten(1).sum(1) for t in ((squares / kept - means.square()).clamp(min=0).mean(0), means.var(0))
    )
    found = Imputation(
        mean=torch.where(hidden, means.mean(0).to(x.dtype), x.cpu()),
        mc_se=(means.std(0) / math.sqrt(num_chains) * hidden).to(x.dtype),
        draws=filled.reshape(event).cpu(),
        acceptance=accepted.mean(0) / kept,
        rhat=(1 + between / within).sqrt().nan_to_num(1.0, posinf=math.inf),
    )
    for message in found.warnings:
        warn(message, UnreliableEstimateWarning)
    return found


def _pass(
    program: Program, x: Tensor, y: Tensor | None, z: dict[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], Tensor, Any]:
    """Latents, drawn from the guide unless they are given, log p(x, z) - log q(z | x) ``(batch,)``, and p(x | z)."""
    guide = run(program.guide, x, y, num_samples=1, at=z)
    model = run(program.model, x, y, num_samples=1, at=guide)
    weight = Traces(model, guide).terms(1, len(x)).log_weight[0]
    return latent_values(guide, 1, len(x)), weight, model.nodes[observation(model)]["fn"]


def _prior_draw(program: Program, x: Tensor, y: Tensor | None) -> Tensor:
    """Data drawn from the model, shaped like x."""
    model = run(program.model, x, y)
    fn = model.nodes[observation(model)]["fn"]
    return _rows(fn.sample(), fn, x)


def _rows(value: Tensor, fn: Any, x: Tensor) -> Tensor:
    """A value of p(x | z) for one sample of each row, shaped like x."""
    return value.expand(1, len(x), *fn.event_shape).reshape(x.shape)
