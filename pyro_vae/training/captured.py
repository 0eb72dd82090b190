"""One step of SVI as one compiled graph: draw, objective, gradient, clipping, optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyro_vae.capture import Captured, Uncapturable, capture
from pyro_vae.precision import casts
from pyro_vae.programs.functional import OfProgram
from pyro_vae.training.schedule import share_of_newest
from pyro_vae.training.source import Batch

if TYPE_CHECKING:
    from pyro_vae.training.loop import Trainer

CAPTURED_OPTIMIZERS = ("adam", "adamw")
AHEAD = 64  # steps whose scalars are computed at once

# A captured step saves about 2 ms of Python on a CPU and compiles in about 9 s, once; on a GPU it saves more.
WORTH_CAPTURING = {"cpu": 6_000, "cuda": 3_000}


def worth_capturing(total_steps: int, device: torch.device) -> bool:
    """Whether the steps of a whole run repay the time of compiling one."""
    return total_steps >= WORTH_CAPTURING.get(device.type, 1 << 62)


class CapturedStep:
    """Takes the place of a trainer's plain step, on the same parameters and optimizer state.

    The trainer updates the moving average between steps, when it is time to; ``averages`` has the graph do it, for launches of
    many steps.

    The numbers follow ``torch.optim.Adam`` and ``AdamW`` (Kingma & Ba 2015, https://arxiv.org/abs/1412.6980; Loshchilov &
    Hutter 2019, https://arxiv.org/abs/1711.05101), with the divisions that are the same for all elements done once.
    """

    def __init__(self, trainer: Trainer, stored: Tensor, y: Tensor | None, averages: bool = False) -> None:
        settings = trainer.settings
        if settings.optimizer not in CAPTURED_OPTIMIZERS:
            raise Uncapturable(
                f"the optimizer {settings.optimizer!r} is not captured; {' and '.join(CAPTURED_OPTIMIZERS)} are"
            )
        if trainer.device.type not in WORTH_CAPTURING:
            raise Uncapturable(
                f"the device {trainer.device.type!r} is not captured; {' and '.join(WORTH_CAPTURING)} are"
            )
        self.trainer, self.averages = trainer, averages
        group = trainer.optimizer.param_groups[0]
        self.eps, (self.beta1, self.beta2) = group["eps"], group["betas"]
        self.weight_decay = group["weight_decay"]
        self.names = [n for n, p in trainer.program.named_parameters() if p.requires_grad]
        self.objective = OfProgram(trainer.program, trainer.objective)
        self._ensure_state()
        like = trainer.parameters[0].detach()
        self.scalars = torch.zeros(len(_Scalars._fields), dtype=like.dtype)
        self.scalars_array = self.scalars.numpy()  # of the same memory
        self.on_device = self.scalars if like.device.type == "cpu" else self.scalars.to(like.device)
        self.loss = torch.zeros((), dtype=torch.float64, device=like.device)
        self.finite = torch.zeros((), dtype=torch.int64, device=like.device)
        tensors = self.objective.tensors()
        params = [tensors.pop(name) for name in self.names]
        average = (trainer.average or []) if averages else []
        self.kept = (params, *self.moments, average, tensors, self.count, list(self.on_device))
        self.sums = self.loss, self.finite
        self.flat = tree_flatten((*self.kept, *self.sums))[0]
        self.graph: Captured = capture(self._step, (*self.kept, *self.sums, stored, [] if y is None else [y]))

    def advance(self, minibatches: Iterator[Batch], last_step: int) -> None:
        """Take all steps up to ``last_step``, or up to a signal.

        Their losses are added to ``loss``, and ``finite`` counts them while that sum is finite. What can be is computed for many
        steps at once: after a step nothing of the interpreter is left in the processor's caches.
        """
        trainer = self.trainer
        with torch.no_grad():
            while trainer.step < last_step:
                for scalars in [self.scalars_of(s) for s in range(trainer.step, min(last_step, trainer.step + AHEAD))]:
                    self.scalars_array[:] = scalars
                    if self.on_device is not self.scalars:
                        self.on_device.copy_(self.scalars)
                    self.run(*next(minibatches))
                    trainer.step += 1
                    if scalars.newer and not self.averages:
                        trainer.follow(scalars.newer)
                    if trainer.interrupts.pending is not None:
                        return

    def run(self, stored: Tensor, y: Tensor | None) -> None:
        """One step on stored rows with the scalars that are on the device, under ``torch.no_grad()``."""
        self.graph.flat([*self.flat, stored] if y is None else [*self.flat, stored, y])

    def rehearse(self, stored: Tensor, y: Tensor | None) -> None:
        """The same on copies of everything."""
        copies = [t.clone() for t in self.flat]
        self.graph.flat([*copies, stored] if y is None else [*copies, stored, y])

    def scalars_of(self, step: int) -> _Scalars:
        """The numbers of the step after ``step`` others; computed here, since a graph would compute them for every element."""
        (lr, beta1), step = self.trainer.schedule.at(step), step + 1
        beta1 = self.beta1 if beta1 is None else beta1
        return _Scalars(
            lr / (1 - beta1**step),
            1 / math.sqrt(1 - self.beta2**step),
            1 - beta1,
            1 - lr * self.weight_decay,
            share_of_newest(self.trainer.settings.average, step),
        )

    def finish(self) -> None:
        """Let the optimizer's own counters follow the graph's, which counts once for all parameters."""
        for p in self.trainer.parameters[1:]:
            self.trainer.optimizer.state[p]["step"].copy_(self.count)

    def _ensure_state(self) -> None:
        """The state that torch's Adam makes at its first step, made now; the graph holds on to its tensors."""
        for p in self.trainer.parameters:
            state = self.trainer.optimizer.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        states = [self.trainer.optimizer.state[p] for p in self.trainer.parameters]
        self.count = states[0]["step"]
        self.moments = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]

    def _step(
        self,
        params: Sequence[Tensor],
        exp_avg: Sequence[Tensor],
        exp_avg_sq: Sequence[Tensor],
        average: Sequence[Tensor],
        others: dict[str, Tensor],
        count: Tensor,
        scalars: Sequence[Tensor],
        total: Tensor,
        finite: Tensor,
        stored: Tensor,
        y: Sequence[Tensor],
    ) -> list[Tensor]:
        """The step as tensor operations on its arguments, changed in place."""
        settings = self.trainer.settings
        leaves = [p.detach().requires_grad_() for p in params]
        tensors = {**dict(zip(self.names, leaves, strict=True)), **others}
        with torch.enable_grad(), casts(settings.precision, stored.device):
            x = self.trainer.source.prepare(stored)
            loss, surrogate = self.objective.at(tensors, x, y[0] if y else None, count)
            grads = torch.autograd.grad(surrogate, leaves, allow_unused=True, materialize_grads=True)
        if settings.clip_norm is not None:
            norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
            scale = (settings.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            grads = tuple(g * scale for g in grads)
        count.add_(1)
        size, root, fresh, shrink, newer = scalars
        for p, g, m, v in zip(params, grads, exp_avg, exp_avg_sq, strict=True):
            if settings.optimizer == "adamw":
                p.mul_(shrink)
            m.add_((g - m) * fresh)
            v.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
            p.sub_(size * m / (v.sqrt() * root + self.eps))
        for a, p in zip(average, params, strict=False):
            a.add_((p - a) * newer)
        total.add_(loss.detach())
        finite.add_(torch.isfinite(total))
        return []


class _Scalars(NamedTuple):
    """What changes from step to step: of Adam's update, of its bias correction, of decay and of the moving average."""

    size: float
    root: float
    fresh: float
    shrink: float
    newer: float
