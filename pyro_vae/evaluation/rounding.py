"""What computing in fewer bits does to an estimate of log p(x), against float64 and the same draws."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae.evaluation.weights import weigh
from pyro_vae.precision import products
from pyro_vae.programs.trace import Program, Traces, device_of, dtype_of, evaluating, to_program, y_to_program
from pyro_vae.seeding import derive_seed, seeded

LARGER = 2.0  # times the numbers that were measured with
IMAGES, SAMPLES, SHARE = 16, 500, 100  # rows; draws of each at most, and what part of the call's all are


def measured(
    program: Program, x: Tensor, y: Tensor | None, traces: Traces, precision: str, seed: int, num_samples: int
) -> Tensor | None:
    """:func:`rounding_error`; at full precision once, while the program is the same and numbers do not become twice as large."""
    if precision != "full":
        return rounding_error(program, x, y, precision, seed, num_samples)
    largest, known = float(x.detach().abs().max().nan_to_num(0.0)), traces.known.get(rounding_error)
    if known is None or largest > LARGER * known[0]:
        known = traces.known[rounding_error] = largest, rounding_error(program, x, y, precision, seed, num_samples)
    found: Tensor | None = known[1]
    return found


def rounding_error(
    program: Program, x: Tensor, y: Tensor | None, precision: str, seed: int, num_samples: int | None = None
) -> Tensor | None:
    """Estimates of log p(x) in a precision minus those in float64, ``(min(N, 16),)``, of the same noise.

    Of the first rows; at full precision of the eight with the largest numbers and of eight others, by a hundredth of the
    ``num_samples`` draws of all rows, at least 8 of each, and at most 500. Products round as they do in the estimate; a compiled
    pass takes them from the same libraries. None for a program that is in float64, or does not run in it: one that cannot be
    copied, or has float32 tensors that are no parameters or buffers.
    """
    if dtype_of(program) == torch.float64 or device_of(program).type == "mps" or not isinstance(program, nn.Module):
        return None
    samples, rows = SAMPLES, torch.arange(min(IMAGES, len(x)))
    if num_samples is not None and precision == "full":
        samples = min(SAMPLES, max(8, num_samples * len(x) // (SHARE * IMAGES)))
        if len(x) > IMAGES:
            largest = x.flatten(1).abs().nan_to_num(0.0).amax(1).cpu().topk(IMAGES // 2).indices
            rows = torch.cat([largest, torch.linspace(0, len(x) - 1, IMAGES - len(largest)).long()])
    x, y = to_program(program, x[rows]), y_to_program(program, y if y is None else y[rows])
    wide_y = y.double() if y is not None and y.is_floating_point() else y
    found = []
    try:
        exact: Any = copy.deepcopy(program).double()
        for one, data, given, mode in ((exact, x.double(), wide_y, "full"), (program, x, y, precision)):
            with (
                evaluating(one),
                products(mode),
                seeded(derive_seed("rounding error", seed), x.device),
                _Float32Noise(),
            ):
                log_weight = weigh(one, data, given, samples, mode)[0]
            found.append(log_weight.double().logsumexp(0).cpu() - math.log(samples))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of what a stranger's program says when it is copied, or is given numbers of another kind
        return None
    return found[1] - found[0]


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
