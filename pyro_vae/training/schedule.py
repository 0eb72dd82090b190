"""The learning rate at every step, in closed form: a run that is resumed, or a graph, needs nothing but the step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from pyro_vae.training.settings import Settings

WARM = 0.3  # of the steps of one cycle, in which the rate rises
BELOW, LEAST = 25.0, 1e4  # the first rate is the highest over BELOW, the last that over LEAST
MOMENTA = 0.95, 0.85  # Adam's first beta at the lowest and at the highest rate
AVERAGED_STEPS = 16  # the most steps between two updates of the moving average
MEMORIES = 50  # how many such waits the average's memory holds at least


class Rates(NamedTuple):
    """The learning rate, and Adam's first beta; None where it stays what it is."""

    lr: float
    beta1: float | None


class Schedule:
    """The rates at every step of a run.

    One cycle and cosine annealing are those of ``torch.optim.lr_scheduler.OneCycleLR`` and ``CosineAnnealingLR`` (Smith & Topin
    2018, https://arxiv.org/abs/1708.07120; Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983).

    Args:
        settings: which schedule, the highest rate, the optimizer.
        total_steps: of the whole run.
    """

    def __init__(self, settings: Settings, total_steps: int) -> None:
        self.lr, self.total_steps = settings.lr, total_steps
        self.name = settings.schedule if settings.schedule != "one-cycle" or total_steps > 3 else "constant"
        self.cycles_momentum = settings.optimizer in ("adam", "adamw", "adamax")

    def at(self, step: int) -> Rates:
        """The rates after ``step`` steps, with which the next one is taken."""
        if self.name == "constant":
            return Rates(self.lr, None)
        if self.name == "cosine":
            return Rates(_between(self.lr, 0.0, step / self.total_steps), None)
        peak = WARM * (self.total_steps + 1) - 1
        low, high = MOMENTA
        first = self.lr / BELOW
        if step <= peak:
            lr, beta1 = _between(first, self.lr, step / peak), _between(low, high, step / peak)
        else:
            part = (step - peak) / (self.total_steps - peak)
            lr, beta1 = _between(self.lr, first / LEAST, part), _between(high, low, part)
        return Rates(lr, beta1 if self.cycles_momentum else None)

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Give an optimizer the rates of its next step."""
        lr, beta1 = self.at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
            if beta1 is not None:
                group["betas"] = (beta1, group["betas"][1])


def share_of_newest(average: float | None, step: int) -> float:
    """The share of the weights after ``step`` steps in their moving average; 0 where it waits for further steps.

    The decay per step is ``average``, less over the first steps; so that an update costs little, one decays for up to
    ``AVERAGED_STEPS`` steps at once, a small part of the average's memory.
    """
    if average is None:
        return 0.0
    decay = min(average, (1 + step) / (10 + step))
    every = 1
    while every < AVERAGED_STEPS and 2 * every * MEMORIES * (1 - decay) <= 1:
        every *= 2
    return 0.0 if step % every else 1 - decay**every


def _between(a: float, b: float, part: float) -> float:
    """From a to b along half a cosine."""
    return b + (a - b) / 2 * (1 + math.cos(math.pi * part))
