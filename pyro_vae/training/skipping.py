"""Steps whose gradient has exploded, and which are left out.

Child 2021, Very Deep VAEs, https://arxiv.org/abs/2011.10650, section 4: in deep hierarchies a few steps have gradients of a
thousand times the usual size, and a step along a direction of chance is worse than none. A compiled step does the same by itself
(:mod:`pyro_vae.training.captured`), without reading a norm to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor


def exploded(parameters: list[torch.nn.Parameter], most: float | None) -> bool:
    """Whether the norm of the whole gradient is above ``most``, or not finite; never where that is None."""
    if most is None:
        return False
    grads = [p.grad for p in parameters if p.grad is not None]
    norm: Tensor = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
    return not bool(norm <= most)


def advance(optimizer: torch.optim.Optimizer, taken: bool) -> None:
    """Take a step of the optimizer; or count it alone, where it counts its own: a compiled step has one count for all."""
    if taken:
        optimizer.step()
        return
    if not optimizer.state and isinstance(
        optimizer, torch.optim.Adam
    ):  # AdamW is one: moments of nothing, at a rate of 0
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = None if parameter.grad is None else torch.zeros_like(parameter.grad)
        optimizer.step()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] += 1
