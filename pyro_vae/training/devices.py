"""Where to compute."""

from __future__ import annotations

import os

import torch

from pyro_vae.errors import UserError

DEVICES = ("auto", "cpu", "cuda", "mps")


def resolve_device(name: str | torch.device) -> torch.device:
    """``auto`` (CUDA where there is one, else the CPU), ``cpu``, ``cuda`` (or ``cuda:1``) or ``mps``; refused where absent.

    A ``torch.device`` stands for its name.
    """
    if not isinstance(name, (str, torch.device)):
        raise UserError(
            f"expected a device as a string or torch.device, got {type(name).__name__}: {', '.join(DEVICES)}"
        )
    name = str(name)
    kind = name.partition(":")[0]
    if kind not in DEVICES:
        raise UserError(f"unknown device {name!r}: choose from {', '.join(DEVICES)}")
    if kind == "auto":
        kind = name = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda': no CUDA device is available here; use --device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("device 'mps': no Apple GPU is available here; use --device cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # one device for each process that torchrun starts
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}: expected cuda or cuda:N") from None
    if kind == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise UserError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices here")
    return device
