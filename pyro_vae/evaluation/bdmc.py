"""Bidirectional Monte Carlo: log p(x) between a lower and an upper bound, on data simulated from the model.

    z*, x ~ p(z) p(x | z):   z* is an exact draw from the posterior of x, where the chains back can start

    log (1/C) sum_c w_c   <=   log p(x)   <=   -log (1/C) sum_c 1 / v_c       (each in expectation)

with w the weights of chains forward and v those of chains backward, over the same fixed kernels. The gap bounds the error of
annealing on such data; on real data it says as much as these resemble them.

Grosse, Ghahramani & Adams 2015, https://arxiv.org/abs/1511.02543; Grosse, Ancha & Roy 2016, https://arxiv.org/abs/1606.02275;
Wu, Burda, Salakhutdinov & Grosse 2017, https://arxiv.org/abs/1611.04273.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pyro_vae.errors import UserError
from pyro_vae.evaluation import consistency
from pyro_vae.evaluation.anneal import Checkpoint, Progress, run
from pyro_vae.evaluation.estimators import estimate
from pyro_vae.evaluation.methods import Annealing, taking
from pyro_vae.programs.door import door
from pyro_vae.programs.latents import decode, sample_latents
from pyro_vae.programs.trace import Program
from pyro_vae.seeding import derive_seed


@door(data=False, joint="bidirectional Monte Carlo")
@taking(Annealing)
def bidirectional(
    program: Program,
    num_images: int = 20,
    y: Tensor | None = None,
    *,
    event_shape: tuple[int, ...] | None = None,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
    **annealing: Any,
) -> BidirectionalBounds:
    """Sandwich log p(x) on images simulated from the model.

    Args:
        program: any Program with continuous latents; its model is sampled from.
        num_images: N.
        y: for a conditional program, what to condition on, ``(N, ...)``.
        annealing: the options of :class:`~pyro_vae.evaluation.methods.Annealing`; chains run forward and back, and the seed is of
            the data too.
        event_shape: of one datum, where the program does not say it as ``program.event_shape``.
        progress: called with images' worth of work done; adds up to N.
        checkpoint: where to keep and find unfinished work.

    Returns:
        Lower and upper bounds per image.

    Warns:
        InconsistentResultWarning: an upper bound below the lower one, by more than chance does once in 10,000 times.

    Raises:
        UserError: discrete latents, by name; ``start="guide"`` with a guide that cannot score other latents than its own; a
            model with a ``pyro.factor``, whose draws of p(z) p(x | z) are no exact draws from the posterior.

    Example:
        >>> import pyro_vae as pv
        >>> from pyro_vae.evaluation.bdmc import bidirectional
        >>> vae = pv.build("ppca", "linear", (3,), latent_dim=2)
        >>> bounds = bidirectional(vae, 4, num_distributions=20)
        >>> bounds.lower.shape, bounds.mean_gap < 1
        (torch.Size([4]), True)
    """
    if num_images < 1:
        raise UserError(f"expected num_images of at least 1, got {num_images}")
    how = Annealing(**annealing)
    seed = how.seed
    exact = sample_latents(
        program, num_images, y, event_shape=event_shape, seed=derive_seed("bidirectional: latents", seed)
    )
    x = decode(program, exact, y, mean=False, event_shape=event_shape, seed=derive_seed("bidirectional: data", seed))
    # chains of their own: annealing of real images with this seed draws other numbers
    chains = replace(how, seed=derive_seed("bidirectional: chains", seed))
    weights = run(program, x, y, chains, exact=exact, progress=progress, checkpoint=checkpoint)
    forward = estimate(weights.log_weight)
    reverse = estimate(-_present(weights.reverse_log_weight))
    bounds = BidirectionalBounds(
        lower=forward.log_likelihood,
        upper=-reverse.log_likelihood,
        lower_se=forward.mc_se,
        upper_se=reverse.mc_se,
        acceptance=weights.acceptance,
        reverse_acceptance=_present(weights.reverse_acceptance),
        x=x,
        num_chains=how.num_chains,
        num_distributions=how.num_distributions,
        num_leapfrog=how.num_leapfrog,
        start=how.start,
        seed=seed,
    )
    consistency.tell(bounds.warnings)
    return bounds


@dataclass(frozen=True, eq=False)
class BidirectionalBounds:
    """Stochastic bounds on log p(x) of simulated images, in nats; ``(N,)`` tensors in float64 on the CPU.

    Attributes:
        lower, upper: below and above log p(x) in expectation.
        lower_se, upper_se: jackknife errors over chains. The chains back share the draw that they start from:
            ``upper_se`` leaves its variation out, ``gap_se`` holds it.
        acceptance, reverse_acceptance: mean acceptance probability of the trajectories forward and back.
        x: the simulated images ``(N, *event)``.
        num_chains, num_distributions, num_leapfrog, start, seed: how they were annealed.
    """

    lower: Tensor
    upper: Tensor
    lower_se: Tensor
    upper_se: Tensor
    acceptance: Tensor
    reverse_acceptance: Tensor
    x: Tensor
    num_chains: int
    num_distributions: int
    num_leapfrog: int
    start: str
    seed: int

    def __len__(self) -> int:
        return len(self.lower)

    @property
    def gap(self) -> Tensor:
        """``upper - lower`` per image: at least 0 in expectation."""
        return self.upper - self.lower

    @property
    def mean_gap(self) -> float:
        """The mean gap in nats per image."""
        return float(self.gap.mean())

    @property
    def gap_se(self) -> float:
        """Standard error of the mean gap over images, chains and exact draws: sd(gap) / sqrt(N); NaN for one image."""
        return float(self.gap.std()) / math.sqrt(len(self)) if len(self) > 1 else math.nan

    @property
    def warnings(self) -> tuple[str, ...]:
        """What theory forbids of the bounds, a line each; none where there is nothing against them."""
        return consistency.forbidden(consistency.of_bounds(self.lower, self.upper))

    def summary(self) -> dict[str, Any]:
        """Plain numbers for a table or JSON; what is undefined is None."""
        numbers = {
            "bdmc_lower": float(self.lower.mean()),
            "bdmc_upper": float(self.upper.mean()),
            "bdmc_gap": self.mean_gap,
            "bdmc_gap_se": self.gap_se,
            "bdmc_acceptance": float(self.acceptance.mean()),
            "bdmc_reverse_acceptance": float(self.reverse_acceptance.mean()),
        }
        return {k: v if math.isfinite(v) else None for k, v in numbers.items()} | {"bdmc_num_images": len(self)}

    def __str__(self) -> str:
        return (
            f"log p(x) of {len(self)} simulated images between {float(self.lower.mean()):.2f} and "
            f"{float(self.upper.mean()):.2f} nats: gap {self.mean_gap:.2g} +- {self.gap_se:.2g}"
        )

    def __repr__(self) -> str:
        return f"<BidirectionalBounds: {self}>"


def _present(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise UserError("the kept work has no reverse chains: remove the checkpoint and begin again")
    return tensor
