"""Where the ELBO loses: in the family of the guide, or in the network that finds its member.

    log p(x) - ELBO(q)  =  [log p(x) - ELBO(q*)]  +  [ELBO(q*) - ELBO(q)]
    inference gap       =   approximation gap     +   amortization gap

with q* the best member of a family for this one image, found by gradient ascent.
Cremer, Li & Duvenaud 2018, Inference suboptimality in variational autoencoders, https://arxiv.org/abs/1801.03558.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_vae.errors import UserError, tell
from pyro_vae.evaluation import consistency
from pyro_vae.evaluation.free_normals import DIAGONAL_NORMAL, FreeNormals
from pyro_vae.evaluation.importance import log_likelihood as importance_weighted
from pyro_vae.evaluation.result import LogLikelihood
from pyro_vae.programs.ascent import ascend
from pyro_vae.programs.columns import given_columns, layout_of
from pyro_vae.programs.door import admitted, door
from pyro_vae.programs.freed import SAME_FAMILY as SAME_FAMILY
from pyro_vae.programs.freed import FreedGuide, free_guide
from pyro_vae.programs.trace import Program, draw_terms
from pyro_vae.programs.walk import Block, Walk, at_once, spans
from pyro_vae.seeding import derive_seed, seeded

FAST = 0.05  # the least rate of the faster ascent that tries to go on: raw parameters differ by about 1
LEAST_PROBE = 50  # steps
LEFT = 0.02  # nats per image that an ascent may leave without a warning
TOLD = 4.0  # standard errors from which on a difference is told: a false alarm in 30,000

# ELBO terms (num_draws, batch) in nats of so many reparameterized draws
Draws = Callable[[int], Tensor]


class NotConvergedWarning(UserWarning):
    """An ascent ended away from the best member of its family, so that a gap is not what it says."""


@dataclass(frozen=True, eq=False)
class InferenceGaps:
    """The gap between log p(x) and the ELBO in two parts; ``(N,)`` tensors in nats, float64, on the CPU.

    Attributes:
        log_likelihood: log p(x), and its standard error ``log_likelihood_se``.
        elbo_optimal: the ELBO of the best member of ``family`` per image, and its standard error ``elbo_optimal_se``.
        elbo: the guide's ELBO, and its standard error ``elbo_se``.
        family: over what the guide was optimised.
        rise, rise_se: by how much the mean of ``elbo_optimal`` rose where the ascent was continued to see whether it had arrived
            (half as many steps more, and not reported), and the standard error of that; at most about 0 where it had.
        forbidden: which ELBO lies above log p(x), though theory forbids it (:mod:`pyro_vae.evaluation.consistency`).
    """

    log_likelihood: Tensor
    log_likelihood_se: Tensor
    elbo_optimal: Tensor
    elbo_optimal_se: Tensor
    elbo: Tensor
    elbo_se: Tensor
    family: str
    rise: float = 0.0
    rise_se: float = 0.0
    forbidden: tuple[str, ...] = ()

    @property
    def approximation(self) -> Tensor:
        """log p(x) - ELBO(q*), ``(N,)``: what the family cannot express."""
        return self.log_likelihood - self.elbo_optimal

    @property
    def amortization(self) -> Tensor:
        """ELBO(q*) - ELBO(q), ``(N,)``: what the encoder misses.

        Negative by more than its error where the ascent has not converged, or where ``family`` is not the guide's own and the
        guide's is the richer one; a warning says so.
        """
        return self.elbo_optimal - self.elbo

    @property
    def approximation_se(self) -> float:
        """Monte Carlo error of the mean approximation gap."""
        return _mean_se(self.log_likelihood_se, self.elbo_optimal_se)

    @property
    def amortization_se(self) -> float:
        """Monte Carlo error of the mean amortization gap."""
        return _mean_se(self.elbo_optimal_se, self.elbo_se)

    @cached_property
    def warnings(self) -> list[str]:
        """What stands against the gaps, each a line with the figure, the cause and the remedy."""
        found = []
        lost = int((~torch.isfinite(self.elbo_optimal)).sum())
        if lost:
            found.append(
                f"{lost} of {len(self.elbo)} images have no finite ELBO after the ascent: it went astray; lower lr"
            )
        if self.rise > max(LEFT, TOLD * self.rise_se):
            found.append(
                f"the ascent has not converged: continued, the ELBO rose by {self.rise:.2g} +- {self.rise_se:.1g} nats per "
                "image, so that the approximation gap is too large, and the amortization gap too small, by at least that; raise "
                "num_steps, or lr"
            )
        worse = int((self.amortization < -(TOLD + 1) * torch.hypot(self.elbo_optimal_se, self.elbo_se)).sum())
        mean, se = float(self.amortization.mean()), self.amortization_se
        if worse or mean < -TOLD * se:
            other = f", or the guide is richer than {self.family}" if self.family == DIAGONAL_NORMAL else ""
            found.append(
                f"the ascent has not converged{other}: its ELBO is below the guide's own for {worse} of {len(self.elbo)} images, "
                f"and by {-mean:.2g} +- {se:.1g} nats on average, which is no amortization gap; raise num_steps, or change lr"
                + (", or read the sum of both gaps alone" if other else "")
            )
        return found

    def summary(self) -> dict[str, Any]:
        """Plain numbers for a table or JSON, in nats per image; what is undefined is None."""
        numbers = {
            "approximation_gap": float(self.approximation.mean()),
            "approximation_gap_se": self.approximation_se,
            "amortization_gap": float(self.amortization.mean()),
            "amortization_gap_se": self.amortization_se,
            "log_likelihood": float(self.log_likelihood.mean()),
            "elbo_optimal": float(self.elbo_optimal.mean()),
            "elbo": float(self.elbo.mean()),
            "rise": self.rise,
            "rise_se": self.rise_se,
        }
        plain: dict[str, Any] = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        return {
            **plain,
            "family": self.family,
            "num_data": len(self.elbo),
            "warnings": [*self.forbidden, *self.warnings],
        }

    def __str__(self) -> str:
        line = (
            f"inference gap {float((self.log_likelihood - self.elbo).mean()):.2f} nats = approximation "
            f"{float(self.approximation.mean()):.2f} +- {self.approximation_se:.1g} + amortization "
            f"{float(self.amortization.mean()):.2f} +- {self.amortization_se:.1g} (over {self.family})"
        )
        return "\n".join([line, *(f"warning: {w}" for w in (*self.forbidden, *self.warnings))])


@door(gradients=True, records=True)
def inference_gaps(
    program: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    log_likelihood: LogLikelihood | None = None,
    num_steps: int = 1000,
    num_draws: int = 16,
    num_final_draws: int = 1000,
    lr: float = 1e-2,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> InferenceGaps:
    """Split log p(x) - ELBO into approximation and amortization gaps.

    Where the guide draws its latents from posteriors of this library, made of x alone, their parameters are freed, per image, and
    start where the encoder puts them: every member of the family is in reach, also of those that the encoder cannot make of
    any x. For any other Program a diagonal normal on the unconstrained latents starts at the guide's moments: ``family`` says
    which. Both climb the ELBO by Adam, the rate falling to zero along a line. Weights are not touched. Log-densities are those of
    the importance weights: unscaled, masks applied.

    Whether the ascent has arrived is tried by going on from its end, twice by a quarter of the steps, at its first rate and at
    ten times that (0.05 at least): a rise is told in ``warnings``. An optimum that is local cannot be told from the best.

    Args:
        program: any Program with continuous latents that its guide reparameterizes.
        x: data ``(N, *event)`` as the program sees it.
        y: what a conditional program is conditioned on, ``(N, ...)``.
        log_likelihood: of the same x, by importance weighting or annealing; by default importance weighting with K = 5000.
        num_steps: steps of Adam.
        num_draws: draws per image and step.
        num_final_draws: draws per image of the ELBOs that are reported.
        lr: the rate at the start.
        seed: of the draws; torch's generators are put back.
        progress: called with the number of images after every block.

    Returns:
        The gaps per image, with errors.

    Raises:
        UserError: a posterior that is not reparameterized; discrete latents, by name; no rows; a column that the guide draws in
            some of the rows alone.
    """
    if min(num_steps, num_draws) < 1 or num_final_draws < 2:
        raise UserError("expected num_steps and num_draws of at least 1, and num_final_draws of at least 2")
    if log_likelihood is not None and not isinstance(log_likelihood, LogLikelihood):
        raise UserError(f"expected the result of log_likelihood of these images, got {type(log_likelihood).__name__}")
    if not 0 < lr < math.inf:
        raise UserError(f"expected lr above 0, got {lr}")
    layout, known = layout_of(program, x), given_columns(program, x)
    mixed = (
        []
        if layout is None
        else [c.name for c in layout.columns if c.missing != "no" and c.name in layout.guided & known]
    )
    if mixed:
        raise UserError(
            f"the guide draws the column {mixed[0]!r} in some rows, or elements, and is given it in others: an ascent frees one "
            "kind of rows; give those in which all of it is missing, or all of it present"
        )
    own = log_likelihood or importance_weighted(program, x, y, num_samples=5000, seed=seed)
    if len(own) != len(x):
        raise UserError(f"expected the log-likelihood of the same {len(x)} images, got {len(own)}")
    walk = Walk(program, x, y, rows=at_once("inference gaps"), progress=progress)
    for block in walk:
        with block, seeded(derive_seed("inference gaps", seed, block.first), block.x.device):
            walk.keep(_gaps(block, num_steps, num_draws, num_final_draws, lr))
    families, *columns = zip(*walk.gathered(), strict=True)
    optimal, optimal_se, rises, rise_ses, elbo, elbo_se = (torch.cat(column) for column in columns)
    probe = int(rises.mean(0).argmax())
    gaps = InferenceGaps(
        own.log_likelihood, own.mc_se, optimal, optimal_se, elbo, elbo_se, families[-1],
        float(rises.mean(0)[probe]), _mean_se(rise_ses[:, probe]),
        consistency.forbidden(consistency.of_gaps(elbo, optimal, own.log_likelihood - own.bias)),
    )  # fmt: skip
    consistency.tell(gaps.forbidden)
    tell(gaps.warnings, NotConvergedWarning)
    return gaps


def _gaps(block: Block, num_steps: int, num_draws: int, num_final_draws: int, lr: float) -> tuple[Any, ...]:
    """The family that is free, and three values, each with its error.

    They are the ELBO at the end of an ascent ``(batch,)``, its rises in further ones ``(batch, probes)``, and the guide's own.
    """
    program = block.walk.program
    free: FreedGuide | FreeNormals = free_guide(program, block.x, block.y) or FreeNormals(admitted(), block.x, block.y)
    before = _terms(
        lambda count: draw_terms(program, block.x, block.y, num_samples=count).log_weight, num_final_draws, num_draws
    )

    def elbo() -> Tensor:
        return free.log_weights(num_draws).mean(0).sum()

    def values() -> Tensor:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # the same noise at every place
            return _terms(free.log_weights, num_final_draws, num_draws)

    device = free.parameters[0].device
    ascend(elbo, free.parameters, num_steps, lr)
    found = values()
    end = [p.detach().clone() for p in free.parameters]
    rises = []
    for rate in (lr, max(10 * lr, FAST)):
        ascend(elbo, free.parameters, max(LEAST_PROBE, num_steps // 4), rate)
        rises.append(values())
        with torch.no_grad():
            for parameter, value in zip(free.parameters, end, strict=True):
                parameter.copy_(value)
    rise, rise_se = (torch.stack(t, -1) for t in zip(*(_mean_and_se(r - found) for r in rises), strict=True))
    return free.family, *_mean_and_se(found), rise, rise_se, *_mean_and_se(before)


def _terms(draws: Draws, count: int, chunk: int) -> Tensor:
    """ELBO terms of ``count`` draws ``(count, batch)``, float64, on the CPU."""
    with torch.no_grad():
        return torch.cat([draws(s.stop - s.start).cpu().double() for s in spans(count, max(chunk, 64))])


def _mean_and_se(terms: Tensor) -> tuple[Tensor, Tensor]:
    return terms.mean(0), terms.std(0) / math.sqrt(len(terms))


def _mean_se(*errors: Tensor) -> float:
    return float(sum(e.square().sum() for e in errors) ** 0.5) / len(errors[0])
