"""The modes of a program's modules while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_training(program: nn.Module) -> Iterator[None]:
    """Training mode, but for submodules that the user put into evaluation mode (a frozen encoder's); all put back on leaving.

    A program in evaluation mode as a whole trains as a whole.
    """
    before = {module: module.training for module in program.modules()}
    program.train()  # which a program may have overridden
    if program.training and any(before.values()):
        for module, mode in before.items():
            if not mode and module is not program:
                module.training = False
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode
