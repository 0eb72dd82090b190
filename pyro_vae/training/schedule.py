"""The learning rate at every step, in closed form: a run that is resumed, or a graph, needs nothing but the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from pyro_vae.errors import UserError
from pyro_vae.training.optimizers import ADAMS
from pyro_vae.training.settings import SCHEDULES, Settings

BELOW, LEAST = 25.0, 1e4  # the first rate of one cycle is the highest over BELOW, the last that over LEAST
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
    2018, https://arxiv.org/abs/1708.07120; Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983). For the others see
    :data:`pyro_vae.training.settings.SCHEDULES`.

    Args:
        settings: which schedule, the highest rate, the optimizer.
        total_steps: of the whole run.
        function: of the number of steps taken, the rate of the next; of a schedule of the user's own.
    """

    def __init__(self, settings: Settings, total_steps: int, function: Callable[[int], float] | None = None) -> None:
        self.lr, self.total_steps, self.function = settings.lr, total_steps, function
        name = settings.schedule.name
        self.name = name if name != "one-cycle" or total_steps > 3 else "constant"
        self.options: dict[str, Any] = {**SCHEDULES.get(name, {}), **settings.schedule.options}
        self.cycles_momentum = settings.optimizer.name in ADAMS and "betas" not in settings.optimizer.options

    def at(self, step: int) -> Rates:
        """The rates after ``step`` steps, with which the next one is taken."""
        if self.function is not None:
            return Rates(_asked(self.function, step), None)
        if self.name == "one-cycle":
            return self._one_cycle(step)
        part = step / self.total_steps
        warm = min(1.0, (step + 1) / (self.options["warmup"] * self.total_steps)) if self.options.get("warmup") else 1.0
        if self.name == "cosine":
            factor = _between(1.0, self.options["final"], part)
        elif self.name == "exponential":
            factor = self.options["final"] ** part
        elif self.name == "stages":
            factor = self.options["decay"] ** _stage(part, self.options["number"], self.options["growth"])
        else:
            factor = 1.0
        return Rates(self.lr * factor * warm, None)

    def _one_cycle(self, step: int) -> Rates:
        peak = self.options["rise"] * (self.total_steps + 1) - 1
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


def _asked(function: Callable[[int], float], step: int) -> float:
    """What a function of the user's says, if it is a rate."""
    try:
        lr = float(function(step))
    except (TypeError, ValueError) as error:
        raise UserError(f"schedule({step}): expected a learning rate, a number; {error}") from error
    if not 0 <= lr < math.inf:
        raise UserError(f"schedule({step}) = {lr}: expected a learning rate of at least 0")
    return lr


def _stage(part: float, number: int, growth: float) -> int:
    """Which of so many stages, each ``growth`` times as long as the one before it, a part of the whole lies in."""
    lengths = [growth**i for i in range(number)]
    ends = [sum(lengths[: i + 1]) / sum(lengths) for i in range(number)]
    return next((i for i, end in enumerate(ends) if part < end), number - 1)


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
