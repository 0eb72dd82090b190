"""When a step is compiled, when it is compiled anew, and when steps go on plain.

A graph stands for the program as it was recorded. Before every epoch, and so after every callback, the program is compared with
that; a second's worth of steps later again. A recording takes 7 to 28 s: it is made anew for what changes now and then, and given
up where changes follow each other.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer
from typing import TYPE_CHECKING

from torch import Tensor

from pyro_vae.capture import CaptureWarning, Uncapturable
from pyro_vae.errors import warn
from pyro_vae.training.captured import CapturedStep, worth_capturing
from pyro_vae.training.launch import Launches

if TYPE_CHECKING:
    from pyro_vae.training.loop import Trainer

LONG_SECONDS = 20.0  # of compiling without a word
STILL = "still compiling the step: a model's first time may take minutes, later ones use the cache; compile=off does without"
LOOK_SECONDS = 1.0  # of steps between two looks at the program within an epoch
RECORDINGS = 4  # of a step in one run, at most
SERVES = 2  # epochs that a recording serves at least where another is worth its time


@contextmanager
def _told_if_long() -> Iterator[None]:
    """While entered, say once that the step is being compiled, where that takes longer than anybody waits for without a word."""
    timer = Timer(LONG_SECONDS, lambda: print(STILL, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Compiling:
    """Gives a trainer its compiled step, and takes it away.

    Args:
        trainer: whose ``captured`` and ``launches`` are set here.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.recorded: list[int] = []  # the epochs before which a step was recorded
        self.looked = 0.0  # when the program was last looked at

    def before_epoch(self, rows: Tensor) -> None:
        """See to it that the step is compiled, where it is wanted and can be, for the program as it is now.

        Args:
            rows: the numbers of the rows of a minibatch.
        """
        trainer = self.trainer
        self.looked = time.perf_counter()
        if not self.recorded:
            if self._wanted():
                self._record(rows)
            return
        if trainer.captured is None:
            return
        changed = trainer.captured.stale()
        if changed is None:
            if trainer.captured.moved:
                trainer.captured.moved = False
                self._launch()
            return
        served = trainer.epoch - self.recorded[-1]
        first = len(self.recorded) == 1
        if (served < SERVES and not first) or len(self.recorded) >= RECORDINGS or not self._wanted():
            why = (
                "it changes too often to record steps anew"
                if self._wanted()
                else "too few steps are left to record them anew"
            )
            self._go_on_plain(f"{changed} since the step was compiled; {why}")
            return
        trainer.captured.finish()
        warn(f"the compiled step is recorded anew: {changed}", CaptureWarning)
        self._record(rows)

    def within_epoch(self) -> None:
        """Go on plain where the program has changed while the epoch is under way; it is looked at once in a while."""
        now = time.perf_counter()
        if self.trainer.captured is None or now - self.looked < LOOK_SECONDS:
            return
        self.looked = now
        changed = self.trainer.captured.stale()
        if changed is not None or self.trainer.captured.moved:
            self._go_on_plain(f"{changed or 'a parameter or buffer was replaced'} within an epoch")

    def _wanted(self) -> bool:
        trainer = self.trainer
        choice, left = trainer.settings.compile, trainer.total_steps - (trainer.step if self.recorded else 0)
        return choice == "on" or (
            choice == "auto" and trainer.ranks.size == 1 and worth_capturing(left, trainer.device)
        )

    def _record(self, rows: Tensor) -> None:
        trainer = self.trainer
        self.recorded.append(trainer.epoch)
        trainer.captured = trainer.launches = None
        try:
            if trainer.ranks.size > 1:
                raise Uncapturable("a compiled step cannot wait for other processes")
            with trainer.interrupts.at_once(), _told_if_long():
                resident = trainer._launchable()
                trainer.captured = CapturedStep(trainer, *trainer.source.stored(rows), averages=resident is not None)
                self._launch()
        except Uncapturable as error:
            warn(f"training uncompiled: {error}", CaptureWarning)

    def _launch(self) -> None:
        trainer, resident = self.trainer, self.trainer._launchable()
        if trainer.captured is not None and resident is not None:
            batch_size = min(trainer.settings.batch_size, trainer.source.num_rows)
            trainer.launches = Launches(trainer.captured, resident, batch_size, trainer.steps_per_epoch)

    def _go_on_plain(self, why: str) -> None:
        if self.trainer.captured is not None:
            self.trainer.captured.finish()
        self.trainer.captured = self.trainer.launches = None
        warn(f"training goes on uncompiled: {why}", CaptureWarning)
