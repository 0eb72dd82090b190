"""What a user sees while training: one line that moves."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """A bar on standard error with the current ELBO; silent where it is not wanted."""

    def __init__(self, total: int, done: int = 0, *, visible: bool, unit: str = "step") -> None:
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit + "s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            disable=not visible,
        )
        self._task = self._bar.add_task("starting", total=total, completed=done)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, done: float, text: str) -> None:
        """Show how many steps are done, and a word on how it goes."""
        self._bar.update(self._task, completed=done, description=text)

    def advance(self, count: float, text: str = "") -> None:
        """Show that ``count`` more are done."""
        self._bar.update(self._task, advance=count, description=text or None)
