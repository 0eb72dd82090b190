"""Ctrl-C and a scheduler's SIGTERM, taken between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Training ended at a signal's wish; ``status`` is the exit status that is usual for it."""

    def __init__(self, signum: int, message: str = "interrupted") -> None:
        super().__init__(message)
        self.signum, self.status = signum, 128 + signum


class Interrupts:
    """While entered, the first SIGINT or SIGTERM is noted in ``pending``; the second ends the process's work at once.

    Only in the main thread, and only for signals that nobody else handles.
    """

    def __init__(self) -> None:
        self.pending: int | None = None
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        if threading.current_thread() is threading.main_thread():
            for signum, handler in usual.items():
                if signal.getsignal(signum) == handler:
                    self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before.clear()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """For long work that changes nothing: the first signal ends it."""
        self._at_once = True
        try:
            if self.pending is not None:
                raise Interrupted(self.pending)
            yield
        finally:
            self._at_once = False

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._at_once or self.pending is not None:
            raise Interrupted(signum)
        self.pending = signum


def stops(answer: Any) -> bool:
    """Whether what a callback returned asks to stop: True does (NumPy's too), not a list or figure that it happens to return."""
    return type(answer).__name__ in ("bool", "bool_") and bool(answer)
