"""The metrics of every epoch as TensorBoard scalars."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyro_vae.errors import UserError


def tensorboard(path: str | Path) -> Callable[[dict[str, Any]], None]:
    """A callback for :func:`pyro_vae.fit` that writes each epoch's metrics to TensorBoard event files, by step.

    Args:
        path: the folder of the event files.

    Raises:
        UserError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("TensorBoard is not installed: pip install pyro-vae[tensorboard]") from None
    writers: list[Any] = []  # made with the first metrics: a run directory is empty before

    def write(metrics: dict[str, Any]) -> None:
        if not writers:
            writers.append(SummaryWriter(str(path)))
        for name, value in metrics.items():
            if name != "step":
                writers[0].add_scalar(name, value, metrics["step"])
        writers[0].flush()

    return write
