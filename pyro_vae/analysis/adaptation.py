"""Step sizes and scales, learned per image while the chains warm up.

The schedule is Stan's (reference manual, section on adaptation): a buffer for the step size alone, windows that
double in length, after each of which the scales are those of the draws in it, and a last buffer for the step size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_vae.precision import wide

FIRST, SMALLEST, LAST = 0.15, 25, 0.15  # the buffers as shares of the warm-up, and draws in the first window
PRIOR_DRAWS = 5  # the scales before a window count as much as so many draws of it


def windows(num_warmup: int) -> tuple[int, list[int], int]:
    """Draws in the first buffer, in each window, and in the last buffer; adds up to ``num_warmup``.

    >>> windows(400)
    (60, [25, 50, 205], 60)
    >>> windows(20)
    (20, [], 0)
    """
    first, last = round(FIRST * num_warmup), round(LAST * num_warmup)
    left = num_warmup - first - last
    if left < SMALLEST:
        return num_warmup, [], 0
    found, size = [], SMALLEST
    while left >= 3 * size:  # what is left would not hold the next one, twice as long
        found.append(size)
        left, size = left - size, 2 * size
    return first, [*found, left], last


class DualAveraging:
    """Log step sizes per image that bring the mean acceptance to its target.

    Nesterov's dual averaging, Hoffman & Gelman 2014, https://arxiv.org/abs/1111.4246, section 3.2. An image's
    iteration is over when as many of its trajectories have ended as it has chains: a trajectory under way still has
    the step it began with, and to answer each one alone would answer late, and swing.

    Args:
        step: to begin with ``(batch,)``.
        target_accept: mean acceptance of a trajectory's points.
    """

    GAMMA, T0, KAPPA = 0.05, 10.0, 0.75

    def __init__(self, step: Tensor, target_accept: float) -> None:
        self.target_accept = target_accept
        self.mu = (10 * step).log()
        self.log_step, self.log_average = step.log(), step.log()
        self.error, self.count = torch.zeros_like(step), torch.zeros_like(step)
        self.sum, self.number = torch.zeros_like(step), torch.zeros_like(step)

    def __call__(self, acceptance: Tensor, ended: Tensor) -> Tensor:
        """The step sizes ``(batch,)`` after trajectories ``(chains, batch)``, of which those that ``ended`` count."""
        self.sum = self.sum + torch.where(ended, acceptance, 0.0).sum(0)
        self.number = self.number + ended.sum(0)
        some = self.number >= len(ended)
        mean = self.sum / self.number.clamp(min=1)
        self.sum, self.number = self.sum.masked_fill(some, 0), self.number.masked_fill(some, 0)
        self.count = self.count + some
        weight = 1 / (self.count + self.T0)
        error = (1 - weight) * self.error + weight * (self.target_accept - mean)
        log_step = self.mu - self.count.sqrt() / self.GAMMA * error
        share = self.count.clamp(min=1) ** -self.KAPPA
        average = share * log_step + (1 - share) * self.log_average
        self.error = torch.where(some, error, self.error)
        self.log_step = torch.where(some, log_step, self.log_step)
        self.log_average = torch.where(some, average, self.log_average)
        return self.log_step.exp()

    @property
    def step(self) -> Tensor:
        """The averaged step sizes ``(batch,)``, for draws that count."""
        return self.log_average.exp()


def scales(draws: Tensor, before: Tensor) -> Tensor:
    """Standard deviations ``(batch, D)`` of draws ``(num, chains, batch, D)``, drawn a little towards those ``before``."""
    flat = wide(draws.flatten(0, 1))
    variance = flat.var(0)
    mixed = (len(flat) * variance + PRIOR_DRAWS * wide(before).square()) / (len(flat) + PRIOR_DRAWS)
    return mixed.sqrt().to(before)


def first_step(dim: int) -> float:
    """A step, in standard deviations, that is accepted on a Gaussian in ``dim`` dimensions."""
    return math.pow(dim, -0.25)
