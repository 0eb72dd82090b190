"""The noise of a global batch, of which every process keeps its own rows.

Every process draws from the same seed what one process would draw for the whole batch, and keeps the rows of its slice:
gradients, averaged over processes, are then those of one process. It is done below autograd, where each random
operation is replaced by the same operation on a tensor widened to the global batch. Operations that draw from parameters
(a gamma's shape, a multinomial's weights) get those of all processes, gathered.

Which axis is the batch is known inside a sample site: the data plate is the last batch axis of the site's distribution.
Outside one (dropout) it is the first axis where its length is a multiple of the slice's. What has no such axis (noise on
weights) is drawn alike everywhere. An objective whose loss is not a mean over images (one that normalises over the batch)
gets the mean of the slices' losses instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae.programs.trace import is_random


class GlobalNoise(TorchDispatchMode):
    """While entered, random operations draw for ``size`` times ``rows`` rows and keep those of process ``rank``."""

    def __init__(self, rows: int, rank: int, size: int) -> None:
        super().__init__()
        self.rows, self.rank, self.size = rows, rank, size
        self.axis: int | None = None  # of the batch inside a sample site

    @contextmanager
    def batch_axis(self, axis: int) -> Iterator[None]:
        """Say which axis is the batch's."""
        before, self.axis = self.axis, axis
        try:
            yield
        finally:
            self.axis = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every random operation on the global batch; every other as it is."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        schema = func._schema.arguments
        named = {a.name: v for a, v in zip(schema, args, strict=False)} | kwargs
        target = next((named[a.name] for a in schema if a.alias_info is not None and a.alias_info.is_write), None)
        wide = {}
        for argument in schema:
            if argument.name not in named:
                continue
            value = named[argument.name]
            if value is target and target is not None:
                wide[argument.name] = target.new_empty(self._widened(target.shape))
            elif isinstance(value, Tensor):
                wide[argument.name] = self._gathered(value)
            elif argument.name == "size":
                wide[argument.name] = self._widened(value)
            else:
                wide[argument.name] = value
        positional = [wide.pop(a.name) for a in schema if not a.kwarg_only and a.name in wide]
        drawn = func(*positional, **wide)
        if target is not None:
            return target.copy_(self._own(drawn, target.shape))
        # what a draw gives back has the axes of what it was asked for
        if isinstance(drawn, (tuple, list)):
            return type(drawn)(self._own(d) for d in drawn)
        return self._own(drawn)

    def _place(self, shape: Any, rows: int) -> int | None:
        """The batch axis of a shape whose batch has ``rows`` rows."""
        if self.axis is not None:
            if self.axis < len(shape) and shape[self.axis] == rows:
                return self.axis
            return next((i for i, n in enumerate(shape) if n == rows), None)
        return 0 if len(shape) and shape[0] and shape[0] % rows == 0 else None

    def _widened(self, shape: Any) -> list[int]:
        axis = self._place(shape, self.rows)
        return [n * self.size if i == axis else n for i, n in enumerate(shape)]

    def _own(self, drawn: Tensor, shape: Any = None) -> Tensor:
        """The slice's rows of what was drawn for the global batch."""
        axis = self._place(drawn.shape, self.rows * self.size)
        if axis is None:
            return drawn
        split = drawn.unflatten(axis, (-1, self.size, self.rows))  # particles, where they share the axis, come first
        return split.select(axis + 1, self.rank).flatten(axis, axis + 1)

    def _gathered(self, value: Tensor) -> Tensor:
        axis = self._place(value.shape, self.rows)
        if axis is None:
            return value
        parts = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, value.contiguous())
        split = [p.unflatten(axis, (-1, 1, self.rows)) for p in parts]
        return torch.cat(split, axis + 1).flatten(axis, axis + 2)


class BatchAxis(Messenger):
    """Tells a :class:`GlobalNoise` the batch axis of each site while it is drawn; entered around all other handlers."""

    def __init__(self, noise: GlobalNoise) -> None:
        super().__init__()
        self.noise = noise

    def _pyro_sample(self, msg: Any) -> None:
        if not is_random(msg) or msg["is_observed"] or msg["done"] or msg["value"] is not None:
            return
        with self.noise.batch_axis(max(0, len(msg["fn"].batch_shape) - 1)):
            msg["value"] = msg["fn"](*msg["args"], **msg["kwargs"])
        msg["done"] = True
