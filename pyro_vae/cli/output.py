"""Standard output and standard error as they are found: full, closed, of another encoding, with nobody who reads.

Standard output that takes no more is an error in one line; standard error that takes no more is no reason to stop. What was
computed is written and printed, each whatever becomes of the other.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pyro_vae.errors import UserError


class OutputError(UserError):
    """Standard output took no more."""


class Output:
    """Standard output whose failures say what failed; everything else is as of the stream beneath, None for a closed one."""

    def __init__(self, stream: Any) -> None:
        self.stream: Any = None if stream is None or stream.closed else stream

    def write(self, text: str) -> int:
        """Write text; :class:`OutputError` where that cannot be."""
        return int(self._do(lambda: self.stream.write(text)))

    def flush(self) -> None:
        """Let everything reach its end, or say that it cannot."""
        self._do(self.stream.flush if self.stream is not None else lambda: None)

    def isatty(self) -> bool:
        """Whether somebody looks on."""
        return self.stream is not None and bool(self.stream.isatty())

    def _do(self, what: Callable[[], Any]) -> Any:
        if self.stream is None:
            raise OutputError("cannot write to standard output: it is closed")
        try:
            return what()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(f"cannot write to standard output: {error.strerror or error}") from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Tolerant:
    """Standard error that drops what cannot be written: a bar or a warning is no reason to lose a run."""

    def __init__(self, stream: Any) -> None:
        self.stream: Any = None if stream is None or stream.closed else stream

    def write(self, text: str) -> int:
        """Write text if that can be."""
        with contextlib.suppress(OSError, ValueError):
            if self.stream is not None:
                self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Let it reach its end if that can be."""
        with contextlib.suppress(OSError, ValueError):
            if self.stream is not None:
                self.stream.flush()

    def isatty(self) -> bool:
        """Whether somebody looks on."""
        with contextlib.suppress(OSError, ValueError):
            return self.stream is not None and bool(self.stream.isatty())
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """While entered, the two standard streams are such; names that their encoding lacks are written as escapes."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = Output(before[0]), Tolerant(before[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def open_standard_streams() -> None:
    """Let the first three descriptors be taken: a file opened in the place of a closed one would be written into."""
    with contextlib.suppress(OSError):
        while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(handle)


def abandon(stream: Any) -> None:
    """Send to nowhere what a stream still holds, so that the interpreter does not fail on it when it ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def deliver(text: str, write: Callable[[], object], where: str) -> None:
    """Write figures to a file and print them; whichever fails, the other is done, and the failure raised after it.

    Args:
        text: what is printed.
        write: writes the same to a file, or raises a :class:`UserError`.
        where: that file, for the message of an output that takes no more.
    """
    try:
        write()
    except UserError:
        try:
            show(text)
        except OutputError:
            print(text, file=sys.stderr)
        raise
    try:
        show(text)
    except OutputError as error:
        raise OutputError(f"{error}; what was found is in {where}") from error


def saved(run: Path, write: Callable[[], object]) -> bool:
    """Write into a run, or say that it may only be read; whether it was written.

    Raises:
        UserError: of ``write``, where anything else is in the way.
    """
    try:
        write()
    except UserError as error:
        if getattr(error.__cause__, "errno", None) not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        print(f"not saved: {run} can only be read", file=sys.stderr)
        return False
    return True


def show(text: str) -> None:
    """Print, and see that it got there."""
    print(text, flush=True)


def show_or_say(text: str) -> None:
    """The same for figures that no file keeps: on standard error where standard output takes no more."""
    try:
        show(text)
    except OutputError:
        print(text, file=sys.stderr)
        raise
