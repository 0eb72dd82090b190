"""What every objective is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from pyro_vae.programs.trace import Program

LAST_STEP = 2**53  # after every schedule


class Objective(ABC):
    """A loss to be minimised over the parameters of a program."""

    formula: ClassVar[str]
    compares_images: ClassVar[bool] = False  # whether the loss is no mean over images, so that a batch cannot be cut
    enumerates: ClassVar[bool] = False  # whether discrete latents are summed over
    records: ClassVar[bool] = False  # whether it is right for records
    is_elbo: bool = False  # whether its value is minus the ELBO of one draw
    warmup_steps: int = 0  # optimizer steps before the loss is the one that is meant

    @abstractmethod
    def __call__(
        self, program: Program, x: Tensor, y: Tensor | None = None, step: Tensor | int = 0
    ) -> tuple[Tensor, Tensor]:
        """The reported loss and the scalar to differentiate, both mean nats per image, with fresh draws.

        Args:
            program: the Program to train.
            x: a minibatch ``(batch, *event)``.
            y: what a conditional program is conditioned on.
            step: the number of optimizer steps taken so far, for schedules that are part of the loss.
        """

    def value(self, program: Program, x: Tensor, y: Tensor | None = None) -> Tensor:
        """What is minimised when all schedules have ended, by which epochs compare: a scalar, mean nats per image.

        The reported loss; an objective whose surrogate has more to it (a floor, a discrepancy) says so here.
        """
        return self(program, x, y, LAST_STEP)[0]
