"""Annealed importance sampling: log p(x) where the guide is too narrow for importance weighting to notice.

    log p(x) >= E log (1/C) sum_c w_c,   w_c the weight of a chain from the prior to the posterior; see :mod:`.anneal`

Neal 2001, https://arxiv.org/abs/physics/9803008; Wu, Burda, Salakhutdinov & Grosse 2017, https://arxiv.org/abs/1611.04273.
"""

from __future__ import annotations

import math
import warnings
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_vae.errors import UserError, tell
from pyro_vae.evaluation.anneal import Checkpoint, Progress, run
from pyro_vae.evaluation.estimators import estimate
from pyro_vae.evaluation.importance import log_likelihood
from pyro_vae.evaluation.methods import Annealing, taking
from pyro_vae.evaluation.result import ROUNDED, LogLikelihood, UnreliableEstimateWarning, digits
from pyro_vae.evaluation.subsets import of_columns
from pyro_vae.programs.columns import layout_of
from pyro_vae.programs.door import door
from pyro_vae.programs.given import require_rows
from pyro_vae.programs.trace import Program
from pyro_vae.seeding import derive_seed

GUIDE_DRAWS = 128  # per image, for the reconstruction, the KL and a bound that annealing must not fall below
FEW_CHAINS = 8  # fewer give a jackknife error that is itself off by more than a quarter
WITNESSES = 16  # images at most that are annealed from the prior beside a start at the guide
AT_EDGE = 1e-3  # of the draws: about as many nats
GOOD_ACCEPTANCE = (0.4, 0.9)


@door(gradients=True, records=True)
@taking(Annealing)
def annealed_log_likelihood(
    program: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    of: Any = None,
    given: Any = None,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
    **annealing: Any,
) -> LogLikelihood:
    """log p(x) of every row of x, by annealed importance sampling.

    Each chain passes through ``num_distributions`` densities between the prior (or the guide) and the posterior, with one HMC
    trajectory in each. Step sizes, per image and temperature, are adapted to ``target_accept`` in a preliminary run
    of a tenth of the length, and then fixed. The cost is num_chains * num_distributions * num_leapfrog gradients per image,
    and an eighth more.

    The work is cut into fixed blocks of images, each seeded from (seed, first image). Dropout is off. Latents that are
    constrained are moved on the real line; discrete ones are refused by name, but for those of a record that are few enough to be
    summed over.

    Args:
        program: any Program with continuous latents, on its device.
        x: data ``(N, *event)`` as the program sees it (binarized, if its likelihood is).
        y: what a conditional program is conditioned on, ``(N, ...)``.
        of, given: names of columns of a record, as in :func:`~pyro_vae.evaluation.importance.log_likelihood`.
        annealing: the options of :class:`~pyro_vae.evaluation.methods.Annealing`.
        progress: called with images' worth of work done, a fraction at a time; adds up to N.
        checkpoint: where to keep unfinished work twice a minute, and to find it: the result is the same to the bit.

    Returns:
        Per-image estimates ``(N,)`` in nats, their jackknife error over chains, and the measured acceptance.

    Raises:
        UserError: discrete latents, latents on a set without a bijection to the real line; x outside the support.

    Example:
        >>> import torch, pyro_vae as pv
        >>> from pyro_vae.evaluation.ais import annealed_log_likelihood
        >>> vae = pv.build("ppca", "linear", (3,), latent_dim=2)
        >>> result = annealed_log_likelihood(vae, torch.zeros(4, 3), num_distributions=20)
        >>> result.log_likelihood.shape, result.num_samples
        (torch.Size([4]), 16)
    """
    how = Annealing(**annealing)
    if of is not None or given is not None:
        options = {**vars(how), "progress": progress}
        layout, seed = layout_of(program, x), options.pop("seed")
        return of_columns(annealed_log_likelihood, program, x, y, layout, of, given, seed, **options)
    bound = guide_bound(program, x, y, how.seed)
    other = witness = None
    if how.start == "guide":  # whose own weights see what it sees: a few images are annealed from the prior as well
        rows = torch.linspace(0, len(x) - 1, min(len(x), max(4, len(x) // 10), WITNESSES)).long()
        chains = replace(how, start="prior", seed=derive_seed("annealing: witness", how.seed))
        with suppress(UserError):  # of a prior without draws; what is wrong with the program is said below
            other = estimate(run(program, x[rows], None if y is None else y[rows], chains).log_weight)
    weights = run(program, x, y, how, progress=progress, checkpoint=checkpoint)
    found = estimate(weights.log_weight)
    if other is not None:
        witness = torch.stack(
            [other.log_likelihood - found.log_likelihood[rows], other.mc_se.hypot(found.mc_se[rows])], 1
        )
    result = AnnealedLogLikelihood(
        **{**vars(found), "khat": torch.full_like(found.khat, torch.nan)},
        reconstruction=bound.reconstruction,
        kl=bound.kl,
        num_samples=how.num_chains,
        seed=how.seed,
        chunk_size=weights.chunk_size,
        acceptance=weights.acceptance,
        step_size=weights.step_size,
        importance_bound=bound.log_likelihood,
        importance_bound_se=bound.mc_se,
        num_distributions=how.num_distributions,
        num_leapfrog=how.num_leapfrog,
        start=how.start,
        edge=weights.edge,
        rounding_error=bound.rounding_error,
        witness=witness,
    )
    tell(result.warnings, UnreliableEstimateWarning)
    return result


@dataclass(frozen=True, eq=False)
class AnnealedLogLikelihood(LogLikelihood):
    """Per-image log p(x) by annealing, in nats; tensors are ``(N,)``, float64, on the CPU.

    ``num_samples`` is the number of chains, ``ess`` the effective number of them, ``khat`` NaN (too few weights for a tail),
    ``interval`` NaN for fewer than 25 chains;
    ``reconstruction`` and ``kl`` are means over 128 draws from the guide.

    Attributes:
        acceptance: mean acceptance probability of an image's trajectories.
        step_size: of the leapfrog steps at the posterior, in units of the unconstrained latents.
        importance_bound: the importance-weighted bound of those 128 draws, which lies below log p(x) in expectation; its
            standard error is ``importance_bound_se``.
        num_distributions: intermediate distributions.
        num_leapfrog: leapfrog steps in each.
        start: ``"prior"`` or ``"guide"``.
        witness: of a start at the guide, how many nats more chains from the prior find of some images, and the error of that,
            ``(images, 2)``: the guide's own weights would see no more than it does.
        edge: the share of an image's chains whose start cannot be told from the edge of a latent's support.
    """

    acceptance: Tensor
    step_size: Tensor
    importance_bound: Tensor
    importance_bound_se: Tensor
    num_distributions: int
    num_leapfrog: int
    start: str
    method: str = "ais"
    edge: Tensor | None = field(default=None, kw_only=True)
    witness: Tensor | None = field(default=None, kw_only=True)
    least_samples: ClassVar[int] = FEW_CHAINS

    @cached_property
    def warnings(self) -> list[str]:
        """What stands against the number: each a line with the figure, the cause and the remedy."""
        found = []
        lost = int((~torch.isfinite(self.log_likelihood)).sum())
        if lost:
            found.append(
                f"{lost} of {len(self)} images have no finite log p(x): no chain from the {self.start} came to latents under "
                "which the model allows them; use more intermediate distributions"
            )
        if self.few_samples:
            found.append(
                f"{self.num_samples} chains are too few to tell the error of their mean: use at least {FEW_CHAINS}"
            )
        elif (single := float((self.ess < 2).to(torch.float64).mean())) > 0.01:
            found.append(
                f"for {single:.1%} of {len(self)} images one of {self.num_samples} chains holds most of the weight: log p(x) is "
                f"likely underestimated; use more intermediate distributions than {self.num_distributions}"
            )
        low, high = GOOD_ACCEPTANCE
        accepted = float(self.acceptance.mean())
        if not low <= accepted <= high:
            found.append(
                f"the trajectories were accepted {accepted:.0%} of the time, outside {low:.0%} to {high:.0%}: the step sizes of "
                "the preliminary run do not fit; use more intermediate distributions"
            )
        if self.edge is not None and (edge := float(self.edge.mean())) > AT_EDGE:
            found.append(
                f"{edge:.1%} of the draws of the {self.start} cannot be told from the edge of a latent's support in its numbers: "
                f"log p(x) may be about {edge:.2g} nats too low; use larger concentrations (0.2 or more), or float64 on a CPU"
            )
        below = float((self.importance_bound - self.log_likelihood).mean())
        error = math.hypot(self.nll_mc_se, float(self.importance_bound_se.square().sum().sqrt()) / len(self))
        if below > max(3 * error, ROUNDED):
            found.append(
                f"importance weighting from the guide finds {below:.2g} nats more than annealing did: the chains have not come "
                f"to the posterior; use more intermediate distributions than {self.num_distributions}, or start='guide'"
            )
        if self.witness is not None:
            more, error = float(self.witness[:, 0].mean()), float(self.witness[:, 1].norm()) / len(self.witness)
            if more > max(3 * error, ROUNDED):
                found.append(
                    f"chains from the prior find {more:.2g} +- {error:.1g} nats more than those from the guide, of "
                    f"{len(self.witness)} images: the guide is too narrow, or misses a mode; use start='prior'"
                )
        return found

    def summary(self) -> dict[str, Any]:
        """Plain numbers for a table or JSON; what is undefined is None."""
        return {
            **super().summary(),
            "method": self.method,
            "acceptance": float(self.acceptance.mean()),
            "num_distributions": self.num_distributions,
            "num_leapfrog": self.num_leapfrog,
            "start": self.start,
        }

    def __str__(self) -> str:
        lines = [
            f"NLL {digits(self.nll, self.nll_total_se)} +- {self.nll_mc_se:.2g} (Monte Carlo) +- {self.nll_data_se:.2g} (data) "
            f"nats per image, N = {len(self)}",
            f"annealed from the {self.start}: {self.num_samples} chains, {self.num_distributions} distributions, "
            f"{self.num_leapfrog} leapfrog steps, accepted {float(self.acceptance.mean()):.0%}; ESS median "
            f"{float(self.ess.median()):.1f}",
        ]
        return "\n".join([*lines, *(f"warning: {w}" for w in self.warnings)])

    def __repr__(self) -> str:
        return f"<AnnealedLogLikelihood: {self}>"


def guide_bound(program: Program, x: Tensor, y: Tensor | None, seed: int) -> LogLikelihood:
    """What few draws from the guide say; checks the program and the data on the way."""
    require_rows(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)
        return log_likelihood(program, x, y, num_samples=GUIDE_DRAWS, seed=seed)
