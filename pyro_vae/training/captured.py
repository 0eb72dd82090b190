"""One step of SVI as one compiled graph: draw, objective, gradient, clipping, optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyro_vae.capture import Captured, Uncapturable, capture
from pyro_vae.guard import hooked_parameter
from pyro_vae.precision import casts
from pyro_vae.programs.functional import OfProgram
from pyro_vae.training.schedule import share_of_newest
from pyro_vae.training.source import Batch

if TYPE_CHECKING:
    from pyro_vae.training.loop import Trainer

CAPTURED_OPTIMIZERS = ("adam", "adamw")
CAPTURED_OPTIONS = {"betas", "eps", "weight_decay"}
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
        kind, options = settings.optimizer.name, set(settings.optimizer.options)
        if (
            kind not in CAPTURED_OPTIMIZERS
            or options - CAPTURED_OPTIONS
            or (kind == "adam" and "weight_decay" in options)
        ):
            raise Uncapturable(
                f"the optimizer '{settings.optimizer}' is not captured; {' and '.join(CAPTURED_OPTIMIZERS)} are, with betas, eps "
                "and adamw's weight_decay"
            )
        if settings.accumulate > 1:
            raise Uncapturable("minibatches in parts are not captured")
        if trainer.device.type not in WORTH_CAPTURING:
            raise Uncapturable(
                f"the device {trainer.device.type!r} is not captured; {' and '.join(WORTH_CAPTURING)} are"
            )
        if any(p.is_complex() for p in trainer.parameters):
            raise Uncapturable("the optimizer's steps of complex parameters are not captured")
        self.trainer, self.averages = trainer, averages
        self.objective = OfProgram(trainer.program, trainer.objective)
        like = trainer.parameters[0].detach()
        self.count = torch.zeros(
            (), dtype=torch.float32, device=like.device
        )  # steps taken, for schedules in the objective
        self.loss = torch.zeros((), dtype=torch.float64, device=like.device)
        self.finite = torch.zeros((), dtype=torch.int64, device=like.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=like.device)
        self.unused: set[str] = set()  # parameters without a gradient, which an optimizer leaves as they are
        self._bind()
        others = {"the objective": lambda: trainer.objective, "the optimizer": self._options}
        example = (*self.kept, *self.sums, stored, [] if y is None else [y])
        self.graph: Captured = capture(self._step, example, trainer.program, others)
        self._forget_unused()

    def stale(self) -> str | None:
        """What has changed since the step was recorded, as a clause; None where the graph still stands for it.

        Tensors that merely lie elsewhere (a parameter's new ``data``, a buffer that was replaced) are taken in.
        """
        changed = self.graph.stale()
        if changed is None and (hooked := hooked_parameter(self.trainer.program)) is not None:
            changed = f"a hook was set on {hooked!r}"
        if changed is None and self._tensors() != self.bound:
            before = self.outline
            self._bind()
            self._forget_unused()
            if self.outline != before:
                changed = _difference(before, self.outline)
            self.moved = True
        return changed

    def begin(self, step: int) -> None:
        """Stand after so many steps."""
        self.count.fill_(step)

    def advance(self, minibatches: Iterator[Batch], last_step: int) -> None:
        """Take all steps up to ``last_step``, or up to a signal.

        Their losses are added to ``loss``, and ``finite`` counts them while that sum is finite. What can be is computed for many
        steps at once: after a step nothing of the interpreter is left in the processor's caches.
        """
        trainer = self.trainer
        with torch.no_grad():
            while trainer.step < last_step:
                for scalars in [self.scalars_of(s) for s in range(trainer.step, min(last_step, trainer.step + AHEAD))]:
                    newer = scalars[0]
                    self.scalars_array[:] = scalars
                    if self.on_device is not self.scalars:
                        self.on_device.copy_(self.scalars)
                    self.run(*next(minibatches))
                    trainer.step += 1
                    if newer and not self.averages and trainer.average is not None:
                        trainer.average.follow(newer)
                    if trainer.interrupts.pending is not None:
                        return

    def run(self, stored: Tensor, y: Tensor | None) -> None:
        """One step on stored rows with the scalars that are on the device, under ``torch.no_grad()``."""
        self.graph.flat([*self.flat, stored] if y is None else [*self.flat, stored, y])

    def rehearse(self, stored: Tensor, y: Tensor | None) -> None:
        """The same on copies of everything."""
        copies = [t.clone() for t in self.flat]
        self.graph.flat([*copies, stored] if y is None else [*copies, stored, y])

    def scalars_of(self, step: int) -> list[float]:
        """The numbers of the step after ``step`` others; computed here, since a graph would compute them for every element.

        The share of the newest weights in their average, of the newest gradient in its average, and what is left of decayed
        weights; then for parameters that began together the size of a step, and the factor of the root, with the corrections of
        their bias.
        """
        lr, beta1 = self.trainer.schedule.at(step)
        beta1 = self.beta1 if beta1 is None else beta1
        found = [share_of_newest(self.trainer.settings.average, step + 1), 1 - beta1, 1 - lr * self.weight_decay]
        for began in self.began:
            own = step + 1 - began
            found += [lr / (1 - beta1**own), 1 / math.sqrt(1 - self.beta2**own)]
        return found

    def finish(self) -> None:
        """Let the optimizer's own counters follow: a graph has one for all parameters."""
        for name, began in zip(self.names, self.began_of, strict=True):
            state = self.trainer.optimizer.state.get(self.parameters[name])  # gone with a parameter that was replaced
            if name not in self.unused and state:
                state["step"].fill_(self.trainer.step - began)

    def _bind(self) -> None:
        """Take the program's tensors, and the state that torch's Adam makes at its first step, as what the graph is given."""
        trainer = self.trainer
        _, _, self.eps, self.beta2, self.weight_decay = self._options()
        self.beta1 = trainer.optimizer.param_groups[0]["betas"][0]
        self.parameters = {n: p for n, p in trainer.program.named_parameters() if p.requires_grad}
        self.names = list(self.parameters)
        self.fresh: list[str] = []
        for name, p in self.parameters.items():
            state = trainer.optimizer.state[p]
            if not state:
                self.fresh.append(name)
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        states = [trainer.optimizer.state[p] for p in self.parameters.values()]
        # parameters that joined later, or had no gradient at first, are corrected for the bias of their own first steps
        idle = self.unused.intersection(self.fresh)
        began = {n: trainer.step - int(s["step"]) for n, s in zip(self.names, states, strict=True) if n not in idle}
        self.began = sorted(set(began.values()))
        self.began_of = [began.get(name, self.began[0]) for name in self.names]
        wide = any(p.dtype == torch.float64 for p in self.parameters.values())
        self.scalars = torch.zeros(3 + 2 * len(self.began), dtype=torch.float64 if wide else torch.float32)
        self.scalars_array = self.scalars.numpy()  # of the same memory
        self.on_device = self.scalars if self.loss.device.type == "cpu" else self.scalars.to(self.loss.device)
        tensors = self.objective.tensors()
        params = [tensors.pop(name) for name in self.names]
        average = trainer.average.values if self.averages and trainer.average is not None else {}
        moments = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        self.kept = (params, *moments, dict(average), tensors, self.count, list(self.on_device))
        self.sums = self.loss, self.finite, self.skipped
        self.flat = tree_flatten((*self.kept, *self.sums))[0]
        self.bound = self._tensors()
        held = {**dict(trainer.program.named_parameters()), **dict(trainer.program.named_buffers())}
        self.held = list(held.values())  # so that no other tensor gets the identity of one of these
        places = [self.began.index(b) for b in self.began_of]
        outline = [(n, t.shape, t.stride(), t.dtype, t.data_ptr() % 16) for n, t in held.items()]
        self.outline = self.names, outline, list(average), places
        self.moved = False

    def _tensors(self) -> list[tuple[str, int, int, bool]]:
        """The program's tensors, by name, identity and place, and whether they are trained."""
        program = self.trainer.program
        named = (*program.named_parameters(), *program.named_buffers())
        return [(n, id(t), t.data_ptr(), t.requires_grad) for n, t in named]

    def _options(self) -> tuple[Any, ...]:
        """What the graph keeps of the optimizer."""
        group = self.trainer.optimizer.param_groups[0]
        return (
            self.trainer.settings,
            len(self.trainer.optimizer.param_groups),
            group["eps"],
            group["betas"][1],
            group["weight_decay"],
        )

    def _forget_unused(self) -> None:
        """Leave no state of parameters that take no part, since torch makes none."""
        for name in self.unused.intersection(self.fresh):
            self.trainer.optimizer.state.pop(self.parameters[name], None)

    def _step(
        self,
        params: Sequence[Tensor],
        exp_avg: Sequence[Tensor],
        exp_avg_sq: Sequence[Tensor],
        average: dict[str, Tensor],
        others: dict[str, Tensor],
        count: Tensor,
        scalars: Sequence[Tensor],
        total: Tensor,
        finite: Tensor,
        skipped: Tensor,
        stored: Tensor,
        y: Sequence[Tensor],
    ) -> list[Tensor]:
        """The step as tensor operations on its arguments, changed in place."""
        settings = self.trainer.settings
        leaves = [p.detach().requires_grad_() for p in params]
        tensors = {**dict(zip(self.names, leaves, strict=True)), **others}
        x = self.trainer.source.prepare(stored)
        with torch.enable_grad():
            with casts(settings.precision, stored.device):
                loss, surrogate = self.objective.at(tensors, x, y[0] if y else None, count)
            found = torch.autograd.grad(surrogate, leaves, allow_unused=True)
        self.unused = {name for name, g in zip(self.names, found, strict=True) if g is None}
        grads = [g for g in found if g is not None]
        keep: Any = None  # whether the step is taken, where some are not
        if settings.clip_norm is not None or settings.skip_gradients is not None:
            norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        if settings.clip_norm is not None:
            scale = (settings.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            grads = [g * scale for g in grads]
        loss = loss.detach()
        if settings.skip_gradients is not None:
            keep = norm <= settings.skip_gradients
            grads = [torch.where(keep, g, 0.0) for g in grads]
            loss = torch.where(keep, loss, 0.0)
            skipped.add_(~keep)
            keep = keep.to(norm.dtype)
        count.add_(1)
        newer, fresh, shrink, *own = scalars
        left: Any = self.beta2
        if keep is not None:  # or all that would change by something changes by nothing
            fresh, shrink, left = fresh * keep, 1 - (1 - shrink) * keep, 1 - (1 - self.beta2) * keep
        moved = [i for i, g in enumerate(found) if g is not None]
        for i, g in zip(moved, grads, strict=True):
            p, m, v, group = params[i], exp_avg[i], exp_avg_sq[i], self.began.index(self.began_of[i])
            size, root = own[2 * group : 2 * group + 2]
            size = size if keep is None else size * keep
            if settings.optimizer.name == "adamw":
                p.mul_(shrink)
            m.add_((g - m) * fresh)
            v.mul_(left).addcmul_(g, g, value=1 - self.beta2)
            p.sub_(size * m / (v.sqrt() * root + self.eps))
        newest = {**dict(zip(self.names, params, strict=True)), **others}
        for name, a in average.items():
            a.add_((newest[name] - a) * newer)
        total.add_(loss)
        finite.add_(torch.isfinite(total))
        return []


def _difference(before: Any, now: Any) -> str:
    """What of the outlines of two bindings differs."""
    if before[0] != now[0]:
        name = next(iter(set(before[0]) ^ set(now[0])), "the parameters")
        return f"{name!r} is {'now trained' if name in now[0] else 'no longer trained'}"
    for old, new in zip(before[1], now[1], strict=False):
        if old != new:
            return f"the tensor {new[0]!r} has another shape, dtype or layout"
    return "a parameter was replaced"
