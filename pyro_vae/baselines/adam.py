"""Adam with its state among a module's buffers, so that what is saved of the module is all there is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Adam(nn.Module):
    """``torch.optim.AdamW`` over some parameters; with no weight decay it is Adam.

    Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101.

    Args:
        parameters: what it moves.
        betas: decays of the two moments.
        weight_decay: decoupled from the gradient.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.0
    ) -> None:
        super().__init__()
        moved = [p for p in parameters if p.requires_grad]
        self.optimizer = torch.optim.AdamW(moved, betas=betas, weight_decay=weight_decay)
        for i, p in enumerate(moved):
            state: dict[str, Any] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
            for name, tensor in state.items():
                self.register_buffer(f"{name}_{i}", tensor.detach())
            self.optimizer.state[p] = {name: self.get_buffer(f"{name}_{i}") for name in state}

    def descend(self, loss: Tensor, lr: float) -> None:
        """One step down the gradient of ``loss``."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
