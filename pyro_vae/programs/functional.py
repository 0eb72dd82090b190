"""A function of a program as a function of the program's tensors too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class OfProgram(nn.Module):
    """``function(program, *args)`` as a function of the program's parameters and buffers too, which a graph takes as inputs.

    So one graph serves any values of them, and changes those that it updates in place.
    """

    def __init__(self, program: Any, function: Callable[..., Any]) -> None:
        super().__init__()
        self.program, self.function = program, function

    def forward(self, *args: Any) -> Any:
        """The function of the program as it is; a buffer that it replaces by another tensor is changed in place instead."""
        before = dict(self.program.named_buffers())
        value = self.function(self.program, *args)
        after = dict(self.program.named_buffers())
        with torch.no_grad():
            for name, buffer in before.items():
                if after.get(name, buffer) is not buffer:
                    buffer.copy_(after[name])
        return value

    def tensors(self) -> dict[str, Tensor]:
        """The program's parameters and buffers by name, sharing their memory."""
        named = {**dict(self.program.named_parameters()), **dict(self.program.named_buffers())}
        return {name: t.detach() for name, t in named.items()}

    def at(self, tensors: dict[str, Tensor], *args: Any) -> Any:
        """The function of the program with these parameters and buffers."""
        return torch.func.functional_call(self, {f"program.{name}": t for name, t in tensors.items()}, args)

    def stopped(self, *args: Any, buffers: dict[str, Tensor] | None = None) -> Any:
        """The function's value, through which no gradient reaches the program's parameters; its buffers stay as they are.

        What it does to them (statistics of a BatchNorm) is done to ``buffers``, by default to copies of the program's.
        """
        if buffers is None:
            buffers = self.copied()
        parameters = {name: p.detach() for name, p in self.program.named_parameters()}
        return self.at({**parameters, **buffers}, *args)

    def copied(self) -> dict[str, Tensor]:
        """Copies of the program's buffers by name."""
        return {name: b.clone() for name, b in self.program.named_buffers()}
