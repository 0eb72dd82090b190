"""Log-likelihoods of some columns of a record, and of some given others.

    log p(x_A) = log int p(z) p(x_A | z) dz,        log p(x_A | x_B) = log p(x_A, x_B) - log p(x_B)

What is in neither is missing. The two terms of a conditional have a guide, and draws, of their own: their errors are independent
and add in quadrature. Draws that both share (:mod:`pyro_vae.evaluation.shared`) have the error of the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_vae.data.record import Record
from pyro_vae.errors import UserError, nearest
from pyro_vae.evaluation.result import LogLikelihood
from pyro_vae.programs.columns import Layout, packed
from pyro_vae.seeding import derive_seed


@dataclass(frozen=True, eq=False)
class ConditionalLogLikelihood(LogLikelihood):
    """Per-row log p(x_A | x_B) in nats, the difference of two estimates.

    ``ess`` is the smaller, ``khat`` the larger of the two; ``reconstruction`` and ``kl`` are NaN. A row of which nothing of A is
    present has log p = 0.

    Attributes:
        joint: log p(x_A, x_B).
        evidence: log p(x_B).
        error: how ``mc_se`` was computed: ``quadrature``, of independent draws, or ``delta``, of draws that both share.
    """

    joint: LogLikelihood = field(kw_only=True, repr=False)
    evidence: LogLikelihood = field(kw_only=True, repr=False)
    error: str = field(default="quadrature", kw_only=True)


def of_columns(
    estimate: Callable[..., LogLikelihood],
    program: Any,
    x: Tensor,
    y: Tensor | None,
    layout: Layout | None,
    of: Any,
    given: Any,
    seed: int,
    shared: Callable[..., Any] | None = None,
    **options: Any,
) -> LogLikelihood:
    """log p of the columns ``of`` given the columns ``given``, by a function that estimates log p(x).

    Args:
        estimate: takes program, x, y, seed and the options.
        program: the Program.
        x: a packed record.
        y: what a conditional program is conditioned on.
        layout: of the record; None of a tensor, which is refused.
        of: names of columns that are sites; all that are not in ``given`` where it is None.
        given: names of others.
        seed: of the draws.
        shared: estimates both terms by the same draws, and the error of their difference; None for draws of their own.
        options: of the estimate.
    """
    if layout is None:
        raise UserError("of and given are names of columns: expected data as a record, {'image': x, 'label': y}")
    sites = sorted(layout.sites)
    given = _names("given", given or (), sites)
    of = _names("of", [n for n in sites if n not in given] if of is None else of, sites)
    if not of or set(of) & set(given):
        raise UserError(
            f"expected of and given to name different columns among {', '.join(sites)}, got {of} and {given}"
        )
    record = layout.unpacked(x)
    covariates = [n for n in record if n not in sites]

    def part(names: list[str]) -> Tensor:
        return packed(program, record.only([*names, *covariates]), whole=True)

    def term(names: list[str], seed: int) -> LogLikelihood:
        return estimate(program, part(names), y, seed=seed, **options)

    if shared is not None:
        if not given:
            raise UserError("common draws are of log p(x_A | x_B): name the columns B, given=")
        both, other, error = shared(program, part([*of, *given]), part(given), y, of)
        return _difference(both, other, record, of, error)
    joint = term([*of, *given], seed)
    if not given:
        return joint
    evidence = term(given, derive_seed("what a conditional is given", seed))
    return _difference(joint, evidence, record, of)


def _difference(
    joint: LogLikelihood, evidence: LogLikelihood, record: Record, of: list[str], delta: Tensor | None = None
) -> LogLikelihood:
    present = torch.stack([record.present[n].reshape(len(record), -1).any(1) for n in of]).any(0).cpu()

    def where(value: Tensor, nothing: float = 0.0) -> Tensor:
        return torch.where(present, value, torch.full_like(value, nothing))

    value = where(joint.log_likelihood - evidence.log_likelihood)
    bias = where(joint.bias - evidence.bias)
    reach = [
        [(r.log_likelihood - r.bias - r.interval[:, 0]), (r.interval[:, 1] - r.log_likelihood + r.bias)]
        for r in (joint, evidence)
    ]
    low, high = where(reach[0][0].hypot(reach[1][1])), where(reach[0][1].hypot(reach[1][0]))
    error = joint.mc_se.hypot(evidence.mc_se)
    if delta is not None:  # as far as the two reach together, by what their common draws leave of it
        share = torch.where(error > 0, delta / error, torch.zeros_like(delta)).nan_to_num(nan=1.0)
        low, high, error = low * share, high * share, delta
    nothing = torch.full_like(value, torch.nan)
    return ConditionalLogLikelihood(
        log_likelihood=value,
        bias=bias,
        mc_se=where(error),
        ess=torch.minimum(joint.ess, evidence.ess),
        khat=where(torch.maximum(joint.khat, evidence.khat), -torch.inf),
        interval=torch.stack([value - bias - low, value - bias + high], 1),
        reconstruction=nothing,
        kl=nothing,
        num_samples=joint.num_samples,
        seed=joint.seed,
        chunk_size=joint.chunk_size,
        precision=joint.precision,
        noise=joint.noise,
        states=joint.states if joint.states and evidence.states else None,
        blind_spots=list(dict.fromkeys([*joint.blind_spots, *evidence.blind_spots])),
        forbidden=(*joint.forbidden, *evidence.forbidden),
        joint=joint,
        evidence=evidence,
        error="quadrature" if delta is None else "delta",
    )


def _names(what: str, names: Any, sites: list[str]) -> list[str]:
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in sites:
            raise UserError(f"{what}: {name!r} is no column that is a site of the model: {nearest(str(name), sites)}")
    return names
