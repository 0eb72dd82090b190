"""When a checkpoint is made: as often as it costs little, or as often as the user says."""

from __future__ import annotations

import math
import time

from pyro_vae.errors import UserError

SECONDS = 600  # how long an epoch may go on without a checkpoint within it
SHARE = 0.005  # of the time of training goes into checkpoints after epochs, where these are short


class Due:
    """When the next checkpoint is due.

    Args:
        epochs: after so many epochs each; None of both for as often as it costs little.
        minutes: between two of them at most.
    """

    def __init__(self, epochs: int | None = None, minutes: float | None = None) -> None:
        if (epochs is not None and epochs < 1) or not (minutes is None or 0 < minutes < math.inf):
            raise UserError("checkpoints: expected at least 1 epoch, or more than 0 minutes, between two of them")
        self.epochs, self.minutes = epochs, minutes
        self.chosen = epochs is not None or minutes is not None
        self.seconds = SECONDS if minutes is None else 60 * minutes
        self.at = (
            math.inf if self.chosen and minutes is None else -math.inf if minutes is None else _now() + self.seconds
        )

    def after(self, epoch: int, watched: bool) -> bool:
        """Whether one is to be made after this epoch; after every one that is ``watched`` by a callback, unless it is said."""
        if self.epochs is not None and epoch % self.epochs == 0:
            return True
        return (watched and not self.chosen) or _now() >= self.at

    def made(self, began: float) -> None:
        """One was made, from ``began`` until now."""
        if not self.chosen:
            self.at = _now() + (_now() - began) / SHARE
        elif self.minutes is not None:
            self.at = _now() + self.seconds


def _now() -> float:
    return time.perf_counter()
