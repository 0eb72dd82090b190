"""A 95 % interval for log p(x) from importance weights: a mean of positive numbers whose largest may not have been drawn.

With T = (w - p(x)) / s, w the mean of the weights and s its standard error, the skewness of weights makes T lean to the left: a
sample without large weights has a small mean *and* a small error. Student's t of T, made symmetric by Hall's cubic
transformation and turned back,

    p(x) in  w - s h(+-t),   h(y) = 3/q [(1 + q (y - q/6))^(1/3) - 1],   q = skewness of the weights / sqrt(K),

cures what the sample shows (Hall 1992, On the removal of skewness by transformation, Journal of the Royal Statistical Society B
54, 221-228; its first term is that of Johnson 1978, https://doi.org/10.1080/01621459.1978.10480051). What the sample does not
show is a tail heavier than its Pareto k says. From k = 1/2 on the variance of the weights is infinite, and a law that looks
lighter may be one of these: t of the *upper* end is therefore raised by 2.5 times what k and two of its errors, k + 2 (1 + k) /
sqrt(M), exceed 0.4 by, up to 0.9; M is the weights that k is found from, and (1 + k) / sqrt(M) the error of a maximum of their
likelihood (Smith 1987, https://doi.org/10.1214/aos/1176350499). Evenly filled noise lessens the error of the mean, and not as
much that of its tail: where it is g times smaller than that of independent draws, t is raised by g^(1/3) times as much.

The *lower* end never lies more than log 40 below log w, by Markov's inequality: P(w >= 40 p(x)) <= 1/40 for any weights.

Coverage, by simulation of weights whose mean is known (tests/test_interval.py):

- where k is good, 93.7 to 98.1 % at 100 and 1,000 draws, over at least 2,000 intervals a cell and 22 laws (lognormal with sigma
  of 0.3 to 1.6, Pareto tails with k of 0.2 to 0.5, guides too narrow and too wide in 1 to 10 dimensions, bounded ones; random
  and Sobol noise). At 25 and 50 draws 96 to 99 %, but 52 % where weights have two values, at 25.
- at a true k of 0.2 to 0.7 and 100 to 10,000 draws, 93.9 to 98.2 % of all, 93.7 to 98.6 % where k looks good (the table is in
  docs/evaluation.md). With a raise of 2.5 / sqrt(M), whatever k, it was 80 to 90 % where a true k of 0.7 looked good.
- weights of 1, and of 200 with probability 0.002: nothing tells of these before one is drawn, and no interval can hold more than
  1 - 0.998^K. It holds 17.7 % (of 18.1) at K = 100, 86.9 (86.5) at 1,000, 95.7 (100) at 10,000.

Bias-corrected and +- 1.96 errors: 77 to 96 %. The estimate itself is unbiased to 0.08 of its errors for those laws; but of images
most of which have a bad k, the few whose k looks good have missed large weights, and are too low by up to 0.8 errors at K = 100.
The interval allows for it, and no estimate can.
"""

from __future__ import annotations

import math

import torch
from scipy import stats
from torch import Tensor

LEVEL = 0.95
FEWEST = 25  # draws; of fewer no interval covers without knowing the law of the weights
LIGHT, HEAVY = 0.4, 0.9  # what k may be, to two of its errors: from where on, and up to where, t is raised
RAISED = 2.5  # by so much of itself for each unit of k
NORMAL = float(stats.norm.ppf((1 + LEVEL) / 2))
MARKOV = math.log(2 / (1 - LEVEL))


def interval(
    log_mean: Tensor, relative_se: Tensor, skewness: Tensor, khat: Tensor, ess: Tensor, num_samples: int, units: int
) -> Tensor:
    """The ends ``(batch, 2)`` of the 95 % interval of log p(x), in nats.

    Args:
        log_mean: log of the mean weight ``(batch,)``.
        relative_se: standard error of the mean weight, as a share of it.
        skewness: of the weights.
        khat: their Pareto k; NaN where the largest are all equal, and taken for 0.
        ess: effective sample size (sum w)^2 / sum w^2; t has as many degrees of freedom, less one.
        num_samples: K; of fewer than 25 the ends are NaN.
        units: groups of draws that are independent of each other; fewer than K for evenly filled noise, whose t has one degree
            of freedom less than that, if it is fewer.
    """
    if num_samples < FEWEST:
        return torch.full((*log_mean.shape, 2), math.nan, dtype=log_mean.dtype, device=log_mean.device)
    freedom = (ess.clamp(max=units) - 1).clamp(min=1).cpu().numpy()
    t = torch.from_numpy(stats.t.ppf((1 + LEVEL) / 2, freedom)).to(log_mean)
    k = khat.to(log_mean).nan_to_num(0.0, posinf=HEAVY, neginf=-1.0)
    k = k + 2 * (1 + k) / math.sqrt(tail_length(num_samples))
    raised = 1 + RAISED * (k.clamp(LIGHT, HEAVY) - LIGHT)
    if units < num_samples:
        independent = ((num_samples / ess - 1) / num_samples).clamp(min=0).sqrt()
        raised = 1 + (raised - 1) * (independent / relative_se).clamp(min=1).pow(1 / 3)
    q = skewness / math.sqrt(num_samples)
    q = torch.where(q.abs() < 1e-6, torch.full_like(q, 1e-6), q)
    lower = (-relative_se * _hall(t, q)).clamp(min=-1).log1p()
    upper = (-relative_se * _hall(-t * raised, q)).log1p()
    return torch.stack([log_mean + lower.clamp(min=-MARKOV), log_mean + upper], -1)


def tail_length(num_samples: int) -> float:
    """Weights that Pareto k is found from (Vehtari et al. 2024, https://arxiv.org/abs/1507.02646, section 3.2.3)."""
    return min(0.2 * num_samples, 3 * math.sqrt(num_samples))


def _hall(y: Tensor, q: Tensor) -> Tensor:
    cube = 1 + q * (y - q / 6)
    return 3 / q * (cube.sign() * cube.abs().pow(1 / 3) - 1)
