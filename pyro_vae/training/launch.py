"""Several captured steps in one launch: a GPU then waits neither for Python nor for a minibatch.

The rows, the order of an epoch, its rates and the place in it lie on the device; a step gathers its own minibatch and counts the
place on. On CUDA so many steps are recorded as one graph, which is replayed (Ng, Nguyen & Gschwind 2021, Accelerating PyTorch
with CUDA Graphs, https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs/); on other devices they are run one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_vae.training.captured import CapturedStep
from pyro_vae.training.source import Batch

STEPS = 32  # in one launch


class Launches:
    """Runs captured steps of an epoch from where it is told to begin.

    Args:
        step: the captured step.
        resident: all stored rows ``(N, *event)`` on the device, and their labels or None.
        batch_size: rows of a step.
        steps_per_epoch: steps of an epoch.
        steps: steps of one launch.
    """

    def __init__(
        self, step: CapturedStep, resident: Batch, batch_size: int, steps_per_epoch: int, steps: int = STEPS
    ) -> None:
        self.step, self.steps = step, steps
        self.rows, self.labels = resident
        device = self.rows.device
        self.order = torch.zeros(steps_per_epoch, batch_size, dtype=torch.int64, device=device)
        self.table = step.on_device.new_zeros(steps_per_epoch, len(step.on_device))
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self.recorded: Any = self._record() if device.type == "cuda" else None

    def begin(self, order: Tensor, first_step: int, step: int) -> None:
        """Stand at ``step`` of the epoch that began after ``first_step`` steps and goes through the rows in this order."""
        self.order.copy_(order[: self.order.numel()].view_as(self.order))
        rates = [self.step.scalars_of(first_step + i) for i in range(len(self.table))]
        self.table.copy_(torch.tensor(rates, dtype=self.table.dtype))
        self.place.fill_(step - first_step)

    def run(self, num_steps: int) -> None:
        """Take so many steps, with as few launches as may be, and wait for none."""
        with torch.no_grad():
            while self.recorded is not None and num_steps >= self.steps:
                self.recorded.replay()
                num_steps -= self.steps
            for _ in range(num_steps):
                self._one()

    def _one(self) -> None:
        self.step.on_device.copy_(self.table.index_select(0, self.place).squeeze(0))
        self.step.run(*self._minibatch())
        self.place.add_(1)

    def _minibatch(self) -> Batch:
        rows = self.order.index_select(0, self.place).squeeze(0)
        return self.rows.index_select(0, rows), None if self.labels is None else self.labels.index_select(0, rows)

    def _record(self) -> torch.cuda.CUDAGraph:
        """The graph of several steps; what a first run sets up is set up on copies, so that nothing is trained here."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad(), torch.random.fork_rng(devices=[self.rows.device]):
            for _ in range(3):
                self.step.rehearse(*self._minibatch())
        torch.cuda.current_stream().wait_stream(side)
        recorded = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(recorded):
            for _ in range(self.steps):
                self._one()
        return recorded
