"""The one exception that a user can mend.

Everything the library refuses because of what it was given is a :class:`UserError` whose message names the
value, what was expected and what to do, in one line. The command line turns it into exit status 2.
"""

from __future__ import annotations

import difflib
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Something the user can mend; ``str(error)`` is one line that says how."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class ProgramError(UserError):
    """A Pyro program that breaks the contract of :mod:`pyro_vae.programs.contract`."""


class DataError(UserError):
    """Rows of data that a program cannot take: values outside of a support, or missing ones."""


class NumericalError(UserError):
    """A loss or gradient became NaN or infinite during training."""


_OURS = str(Path(__file__).parent)
_KEPT = threading.local()


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the caller's that called the library, however deep in it the warning is."""
    for categories, kept in reversed(getattr(_KEPT, "lists", ())):
        if issubclass(category, categories):
            kept.append(message)
            return
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename.startswith(_OURS)
        or frame.f_code.co_filename.endswith(("contextlib.py", "functools.py"))
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def tell(messages: Iterable[str], category: type[Warning]) -> None:
    """:func:`warn` of each line."""
    for message in messages:
        warn(message, category)


@contextmanager
def unsaid(*categories: type[Warning]) -> Iterator[list[str]]:
    """While entered, what this thread would be warned of, of these categories, goes into the list that is given instead.

    ``warnings.catch_warnings`` does that to all threads, and two that leave it crosswise leave it on.
    """
    lists, kept = _KEPT.__dict__.setdefault("lists", []), list[str]()
    lists.append((categories, kept))
    try:
        yield kept
    finally:
        lists.pop()


def said(error: BaseException, most: int = 200) -> str:
    """What an exception says in one line: its kind and first words, without the table of shapes that Pyro appends."""
    return f"{type(error).__name__}: {' '.join(str(error).partition('Trace Shapes:')[0].split())[:most]}"


def nearest(name: str, valid: Iterable[str]) -> str:
    """A clause that names the valid spellings nearest to ``name``, all of them where none is near.

    >>> nearest("bernouli", ["bernoulli", "normal"])
    "did you mean 'bernoulli'?"
    >>> nearest("zzz", ["bernoulli", "normal"])
    'choose from bernoulli, normal'
    """
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "choose from " + ", ".join(valid) if valid else "there is none"
