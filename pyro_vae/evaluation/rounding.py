"""What computing in fewer bits does to an estimate of log p(x), against float64 and the same draws."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae.evaluation.weights import weigh
from pyro_vae.precision import products
from pyro_vae.programs.trace import Program, evaluating, to_program, y_to_program
from pyro_vae.seeding import derive_seed, seeded

IMAGES, SAMPLES = 16, 500  # the first of them, and draws of each


def rounding_error(program: Program, x: Tensor, y: Tensor | None, precision: str, seed: int) -> Tensor | None:
    """Estimates of log p(x) in a precision minus those in float64, ``(min(N, 16),)``, of 500 draws from the same noise.

    Products round here as they do in the estimate; a compiled pass takes them from the same libraries. None for a program
    that does not run in float64: one with float32 tensors that are no parameters or buffers.
    """
    x, y = to_program(program, x[:IMAGES]), y_to_program(program, y, slice(0, IMAGES))
    wide_y = y.double() if y is not None and y.is_floating_point() else y
    exact: Any = copy.deepcopy(program).double()  # type: ignore[attr-defined]
    found = []
    for one, data, given, mode in ((program, x, y, precision), (exact, x.double(), wide_y, "full")):
        try:
            with (
                evaluating(one),
                products(mode),
                seeded(derive_seed("rounding error", seed), x.device),
                _Float32Noise(),
            ):
                log_weight = weigh(one, data, given, SAMPLES, mode)[0]
        except RuntimeError:
            if one is exact:
                return None
            raise
        found.append(log_weight.double().logsumexp(0).cpu() - math.log(SAMPLES))
    return found[0] - found[1]


class _Float32Noise(TorchDispatchMode):
    """While entered, random numbers are drawn in float32 and then widened: the same in programs of either dtype."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Random operations on float64 done in float32; every other as it is."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        narrow = lambda v: v.float() if isinstance(v, Tensor) and v.dtype == torch.float64 else v  # noqa: E731
        wide = any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args)
        if kwargs.get("dtype") == torch.float64:
            kwargs, wide = {**kwargs, "dtype": torch.float32}, True
        drawn = func(*map(narrow, args), **{k: narrow(v) for k, v in kwargs.items()})
        if not wide:
            return drawn
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        return args[0].copy_(drawn) if writes else drawn.double()
