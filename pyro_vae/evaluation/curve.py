"""The importance-weighted bound as a function of the number of samples: has it levelled off?

    L_K = E log (1/K) sum_k w_k,   L_1 = ELBO <= L_2 <= ... <= log p(x)

One set of S log-weights gives all of it: cut into S // K groups of K, each group gives one L_K. A bound that still rises
with K at the end is not log p(x). Burda, Grosse & Salakhutdinov 2016, https://arxiv.org/abs/1509.00519, theorem 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.errors import UserError, tell
from pyro_vae.evaluation.blind import require_weights
from pyro_vae.evaluation.draws import Draws
from pyro_vae.evaluation.estimators import estimate
from pyro_vae.evaluation.importance import block_shape
from pyro_vae.evaluation.methods import ImportanceSampling
from pyro_vae.evaluation.proven import blind_spots
from pyro_vae.evaluation.result import UnreliableEstimateWarning
from pyro_vae.programs.door import admitted, door
from pyro_vae.programs.summing import states_of
from pyro_vae.programs.trace import Program
from pyro_vae.programs.walk import Walk


@dataclass(frozen=True, eq=False)
class BoundCurve:
    """The bound at several K, in nats, float64 on the CPU.

    Attributes:
        num_samples: the values of K ``(P,)``: powers of two, and all samples.
        bound: L_K per image, averaged over groups ``(P, N)``.
        mc_se: its standard error over redrawn samples ``(P, N)``: over groups where there are eight or more, else by
            the jackknife of the whole set.
    """

    num_samples: Tensor
    bound: Tensor
    mc_se: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean over images ``(P,)``."""
        return self.bound.mean(1)

    @property
    def mean_se(self) -> Tensor:
        """Monte Carlo error of :attr:`mean` ``(P,)``, the images fixed."""
        return self.mc_se.square().sum(1).sqrt() / self.bound.shape[1]

    @property
    def last_rise(self) -> float:
        """How much the mean bound still rises from half of the samples to all, in nats."""
        return float(self.mean[-1] - self.mean[-2]) if len(self.num_samples) > 1 else math.nan


MANY_GROUPS = 8  # fewer do not tell their own spread


def curve(log_weight: Tensor) -> BoundCurve:
    """The bound at K = 1, 2, 4, ... of log-weights ``(num_samples, batch)``.

    Groups are disjoint, so their L_K are independent: the mean has S // K of them to average over.

    Example:
        >>> import torch
        >>> from pyro_vae.evaluation.curve import curve
        >>> found = curve(torch.randn(100, 3))
        >>> found.num_samples.tolist(), found.bound.shape
        ([1, 2, 4, 8, 16, 32, 50, 100], torch.Size([8, 3]))
    """
    log_weight = log_weight.detach().cpu().double()
    total = log_weight.shape[0]
    if log_weight.dim() != 2 or total < 1:
        raise UserError(f"expected log-weights (num_samples, batch), got {tuple(log_weight.shape)}")
    sizes = sorted(
        {k for k in (2**i for i in range(total.bit_length())) if k < total / 2} | {max(1, total // 2), total}
    )
    whole = estimate(log_weight)
    bounds, errors = [], []
    for size in sizes:
        groups = total // size
        parts = log_weight[: groups * size].reshape(groups, size, -1).logsumexp(1) - math.log(size)
        bounds.append(parts.mean(0))
        errors.append(parts.std(0) / math.sqrt(groups) if groups >= MANY_GROUPS else whole.mc_se)
    return BoundCurve(torch.tensor(sizes), torch.stack(bounds), torch.stack(errors))


@door(records=True)
def bound_curve(
    program: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    num_samples: int = 5000,
    seed: int = 0,
    chunk_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> BoundCurve:
    """The bound of every row of x as a function of K.

    Args:
        program: any Program.
        x: data ``(N, *event)`` as the program sees it.
        y: what a conditional program is conditioned on, ``(N, ...)``.
        num_samples: the largest K.
        seed: of the draws: with the seed, K and chunk size of ``log_likelihood`` the curve is made of the same blocks.
        chunk_size: images times samples in one pass, as in ``log_likelihood``.
        progress: called with the number of images after every block.

    Returns:
        The curve per image, and its mean.

    Warns:
        UnreliableEstimateWarning: the program has latents that the guide's draws tell nothing of (discrete ones, or beyond the
            guide's support): the curve levels off below log p(x).
    """
    if num_samples < 2:
        raise UserError(f"expected num_samples of at least 2 for a curve, got {num_samples}")
    traces = admitted()
    require_weights(traces)
    tell(blind_spots(program, x, y, traces, len(x) * num_samples), UnreliableEstimateWarning)
    how = ImportanceSampling(num_samples, seed=seed, chunk_size=chunk_size)
    states = states_of(program, x)
    each = 1 if not states else len(next(iter(states.values())))
    images, samples = block_shape(x, num_samples, chunk_size, each)
    draws = Draws(program, how, samples)
    walk = Walk(program, x, y, rows=images, draws=samples, progress=progress)
    for block in walk:
        with block:
            walk.keep(curve(torch.cat([part[0] for part in draws(block, num_samples, walk.draws)])))
    parts = walk.gathered()
    return BoundCurve(
        parts[0].num_samples,
        torch.cat([part.bound for part in parts], 1),
        torch.cat([part.mc_se for part in parts], 1),
    )
