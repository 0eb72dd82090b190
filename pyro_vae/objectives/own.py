"""An objective that is a function of the user's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyro_vae.errors import UserError
from pyro_vae.objectives.base import Objective
from pyro_vae.programs.trace import Program, isolated


class OwnObjective(Objective):
    """A loss that is both reported and differentiated.

    Args:
        function: of program, x and, if it takes them, y and step; gives a scalar, the mean over rows in nats. It is called with
            Pyro's state put aside, so that it may trace the program itself; :func:`pyro_vae.programs.trace.draw_terms` gives
            log p(x | z), log p(z) and log q(z | x) of fresh draws.
    """

    formula = "a function of yours"

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        parameters = inspect.signature(function).parameters.values()
        places = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
        self.takes = 4 if any(p.kind is p.VAR_POSITIONAL for p in parameters) else min(4, places)
        if places < 2 and self.takes < 4:
            raise UserError("objective: expected a function of program and x, and of y and step if it takes them")

    def __call__(
        self, program: Program, x: Tensor, y: Tensor | None = None, step: Tensor | int = 0
    ) -> tuple[Tensor, Tensor]:
        """The function's scalar, twice."""
        with isolated():
            loss = self.function(*(program, x, y, step)[: self.takes])
        if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(f"objective: expected a scalar tensor, the mean over rows, got {got}")
        return loss.detach(), loss
