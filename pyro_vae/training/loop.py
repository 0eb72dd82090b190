"""The loop of SVI: draw a minibatch, follow the gradient of the objective, keep the best weights or the last.

Every epoch seeds its own shuffle and its own noise from (seed, epoch), so that an epoch's result depends on the state it
began with and on nothing else: a run resumed from the checkpoint after any epoch equals, to the bit, one left alone. A
checkpoint within an epoch keeps the generators' states too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from pyro_vae.errors import NumericalError, UserError
from pyro_vae.memory import keep_freed
from pyro_vae.objectives.base import Objective
from pyro_vae.precision import casts, no_denormals, products
from pyro_vae.programs.trace import dtype_of
from pyro_vae.seeding import derive_seed, generator, seeded
from pyro_vae.training.average import Average, pass_over
from pyro_vae.training.captured import CapturedStep
from pyro_vae.training.checkpoint import (
    State,
    Within,
    fits,
    random_state,
    restore,
    save_checkpoint,
    save_weights,
    set_random_state,
    state_of,
)
from pyro_vae.training.compiling import Compiling
from pyro_vae.training.distributed import ALONE, Ranks, parallel, told
from pyro_vae.training.due import Due
from pyro_vae.training.faults import ADVICE, Fault, all_finite, examine
from pyro_vae.training.interrupts import Interrupted, Interrupts, stops
from pyro_vae.training.launch import Launches
from pyro_vae.training.metrics import append_metrics
from pyro_vae.training.modes import in_training
from pyro_vae.training.optimizers import make_optimizer
from pyro_vae.training.progress import Progress
from pyro_vae.training.schedule import Schedule, share_of_newest
from pyro_vae.training.selection import Validation
from pyro_vae.training.settings import Settings
from pyro_vae.training.skipping import advance, exploded
from pyro_vae.training.source import Batch, Source, in_parts

LOGS_PER_EPOCH = 10  # how often an epoch's losses are read to the host
COPY_SECONDS = 60  # how old the copy of the state may be from which a fault is looked for


class Trainer:
    """The state of training a program, and the steps that advance it."""

    def __init__(
        self,
        program: Any,
        source: Source,
        settings: Settings,
        objective: Objective,
        device: torch.device,
        path: Path | None,
        ranks: Ranks = ALONE,
        *,
        moving: Sequence[str] = (),
        schedule: Callable[[int], float] | None = None,
        due: Due | None = None,
    ) -> None:
        self.program, self.source, self.settings, self.objective = program, source, settings, objective
        self.device, self.path, self.ranks, self.due = device, path, ranks, due or Due()
        self.steps_per_epoch, self.total_steps = settings.length(source.num_rows)
        self.all_parameters = self._flags()
        self.parameters = [p for p in program.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(settings.optimizer, settings.lr, self.parameters)
        self.schedule = Schedule(settings, self.total_steps, schedule)
        self.average = Average(program, moving) if settings.average else None
        split, judge = source.validation(), None if settings.keep == "elbo" else objective
        self.validation = None if split is None else Validation(split, judge, settings.batch_size)
        self.noise: float | None = None  # that draws leave in the value by which epochs compare
        self.step, self.epoch = 0, 0  # steps taken, epochs completed
        self.metrics: list[dict[str, Any]] = []
        self.best_loss, self.best_epoch, self.checkpoint_epoch = math.inf, 0, 0  # the last: of the newest checkpoint
        self.best: dict[str, Tensor] | None = None
        self.best_written = True  # whether the run's weights are the best ones
        self.within: Within | None = None  # where the first epoch goes on
        self.captured: CapturedStep | None = None
        self.launches: Launches | None = None
        self.compiling, self.interrupts = Compiling(self), Interrupts()
        # steps after which the sum of losses was finite, and the step that their count began with
        self.finite, self.counted_from = torch.zeros((), dtype=torch.int64, device=device), 0
        self.minibatches: Iterator[Batch] = iter(())  # that a compiled step is to take
        self.compute: Any = None  # (x, y, step) -> (loss, surrogate)
        self.copy: tuple[State, float] | None = None  # of the state a fault is looked for from, and when it was made

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or patience is at its end."""
        patience = self.settings.patience
        waited = patience is not None and self.validation is not None and self.epoch - self.best_epoch >= patience
        return self.step >= self.total_steps or waited

    def run(self, bar: Progress, callback: Callable[[dict[str, Any]], Any] | None) -> None:
        """Train to the end, and leave the weights that are kept in the program."""
        keep_freed()
        self.ranks.require_divisible(min(self.settings.batch_size, self.source.num_rows))
        tf32 = self.settings.precision == "tf32"  # else what torch was told: a training vouches for no figure
        with told(self.path), self.interrupts, products("tf32") if tf32 else nullcontext(), no_denormals():
            while not self.finished:
                first_step = self.step if self.within is None else self.within.first_step
                metrics = self._one_epoch(bar)
                self._choose(metrics, first_step)
                self.metrics.append(metrics)
                if self.path is not None and self.ranks.first:
                    append_metrics(self.path, metrics)
                if self.finished or self.due.after(self.epoch, callback is not None):
                    self._save()
                if self.ranks.shared(callback is not None and self.ranks.first and stops(callback(dict(metrics)))):
                    break
                self._heed(None)
        self.optimizer.zero_grad(set_to_none=True)
        if self.best is not None and fits(self.program, self.best):
            self.program.load_state_dict(self.best)
            if self.validation is not None and self.ranks.first:
                self.noise = self.validation.noise(self.program)
                if self.path is not None:
                    save_weights(self.path, self.best, self.noise)

    def _one_epoch(self, bar: Progress) -> dict[str, Any]:
        began, epoch = time.perf_counter(), self.epoch + 1
        order = torch.randperm(self.source.num_rows, generator=generator("order of rows", self.settings.seed, epoch))
        with in_training(self.program):
            try:
                within, began = self._steps(order, bar, began)
            finally:  # compiled and fused steps change tensors, and torch does not count it
                increment_version([*self.program.parameters(), *self.program.buffers()])
            if self.average is not None:
                self.average.settle(lambda: pass_over(self, order))
        if self.captured is not None:
            self.captured.finish()
        taken = self.step - within.first_step - int(within.skipped)
        metrics: dict[str, Any] = {
            "epoch": epoch,
            "step": self.step,
            "train_loss": within.read / taken if taken else math.nan,
            "lr": self.schedule.at(within.first_step).lr,
        }
        if self.settings.skip_gradients is not None:
            metrics["skipped"] = int(within.skipped)
        metrics |= self.ranks.shared(self._validate() if self.ranks.first else {})
        metrics["seconds"] = round(time.perf_counter() - began, 3)
        self.epoch = epoch
        return metrics

    def _steps(self, order: Tensor, bar: Progress, began: float) -> tuple[Within, float]:
        """All steps of an epoch; their sums, and when it began as if it had not been interrupted."""
        epoch, every = self.epoch + 1, max(1, self.steps_per_epoch // LOGS_PER_EPOCH)
        self._prepare(order[: self.settings.batch_size])
        within, self.within = self.within or self._at_beginning(), None
        self._begin(order, within)
        saved_at, began = began, began - within.seconds
        last_step = min(self.total_steps, within.first_step + self.steps_per_epoch)
        with seeded(derive_seed("training", self.settings.seed, epoch), self.device):
            set_random_state(within.random, self.device)
            self._copy_state(within)
            while self.step < last_step:
                self._advance(order, within, min(last_step, self._next_logging(within, every)))
                since = (self.step - within.first_step) % every
                logging = since == 0 or self.step == last_step
                if logging:
                    seen, within.read = within.read, float(self.ranks.mean(within.total))
                    if not math.isfinite(within.read) or (self.step == last_step and not all_finite(self.parameters)):
                        self._explain(order, self.counted_from + int(self.finite) + 1)
                    bar.update(self.step, f"epoch {epoch}  loss {(within.read - seen) / (since or every):.2f}")
                    self.compiling.within_epoch()
                if self.step == last_step:
                    break  # the checkpoint after the epoch is the next
                now = time.perf_counter()
                within.seconds = now - began
                if logging or self.ranks.size == 1:
                    self._heed(within)
                if logging and self.ranks.shared(now - saved_at > self.due.seconds):
                    saved_at = now
                    self._save(within)
                if logging and self.copy is not None and now - self.copy[1] > COPY_SECONDS:
                    self._copy_state(within)
                    self._begin(order, within)
        return within, began

    def _prepare(self, rows: Tensor) -> None:
        """What computes a step: the compiled one where it is wanted and can be had, the objective, or its parallel form."""
        self._take_in()
        if self.compute is None:
            alone = lambda x, y, step: self.objective(self.program, x, y, step)  # noqa: E731
            self.compute = alone
            if self.ranks.size > 1:
                with seeded(derive_seed("first step"), self.device):
                    self.compute = parallel(self.program, self.objective, self.ranks, *self._batch(rows))
        self.compiling.before_epoch(rows)

    def _flags(self) -> list[tuple[torch.nn.Parameter, bool]]:
        return [(p, p.requires_grad) for p in self.program.parameters()]

    def _take_in(self) -> None:
        """Train what is to be trained now: a callback may have frozen or freed parameters, or replaced a part of the program."""
        if (dtype := dtype_of(self.program)) != self.source.dtype:
            raise UserError(
                f"the callback made the program {dtype}, and training began in {self.source.dtype}: leave it so"
            )
        flags = self._flags()
        same = len(flags) == len(self.all_parameters) and all(
            p is q and r == s for (p, r), (q, s) in zip(flags, self.all_parameters, strict=True)
        )
        if self.ranks.size > 1 and not all(self.ranks.gathered(same)):
            raise UserError(
                "the callback changed which parameters are trained, and is called in the first of several processes alone: "
                "train in one process"
            )
        if same:
            return
        self.program.to(self.device)
        self.optimizer.zero_grad(set_to_none=True)  # while it still knows those that are frozen now
        self.all_parameters, self.parameters = self._flags(), [p for p, trained in self._flags() if trained]
        if not self.parameters:
            raise UserError("after the callback no parameter requires a gradient: there is nothing left to train")
        self.optimizer.param_groups[0]["params"] = self.parameters
        held = {id(p) for p, _ in self.all_parameters}
        for p in [p for p in self.optimizer.state if id(p) not in held]:
            del self.optimizer.state[p]
        if self.average is not None:
            self.average.renew()

    def _launchable(self) -> Batch | None:
        """The data, where a launch costs more than the step that it starts and they are where it would gather them."""
        return self.source.resident() if self.device.type == "cuda" else None

    def _at_beginning(self) -> Within:
        dtype = torch.float64 if self.device.type != "mps" else torch.float32
        total = torch.zeros((), dtype=dtype, device=self.device)
        return Within(self.step, 0.0, 0.0, total, {}, torch.zeros((), dtype=torch.int64, device=self.device))

    def _next_logging(self, within: Within, every: int) -> int:
        return within.first_step + ((self.step - within.first_step) // every + 1) * every

    def _advance(self, order: Tensor, within: Within, last_step: int) -> None:
        """A step, or where they are compiled, all up to ``last_step`` or a signal; their losses are added to the epoch's."""
        if self.launches is not None:
            self.launches.run(last_step - self.step)
            self.step = last_step
        elif self.captured is not None:
            self.captured.advance(self.minibatches, last_step)
        else:
            loss, taken = self._gradients(self._batch(self._rows(order, within))), self._apply()
            within.total += loss if taken else 0.0
            self.finite += torch.isfinite(within.total)
            within.skipped += not taken

    def _begin(self, order: Tensor, within: Within) -> None:
        """Stand at the step under way, and count anew those after which the sum of losses is finite.

        A compiled step does both sums itself.
        """
        self.counted_from = self.step
        if self.launches is not None:
            self.launches.begin(order, within.first_step, self.step)
        if self.captured is not None:
            self.captured.begin(self.step)
            rest = order[(self.step - within.first_step) * self.settings.batch_size :]
            self.minibatches = self.source.minibatches(rest, self.settings.batch_size)
            within.total, self.finite = self.captured.loss.copy_(within.total), self.captured.finite
            within.skipped = self.captured.skipped.copy_(within.skipped)
        self.finite.zero_()

    def _rows(self, order: Tensor, within: Within) -> Tensor:
        offset = (self.step - within.first_step) * self.settings.batch_size
        return order[offset : offset + self.settings.batch_size]

    def _batch(self, rows: Tensor) -> Batch:
        """What the program sees of these rows: this process's slice of the batch, with the noise of the whole."""
        if self.source.fresh:
            x, y = self.source.batch(rows)
            return self.ranks.own(x), self.ranks.own(y)
        return self.source.batch(self.ranks.own(rows))

    def _gradients(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        total: Any = 0.0
        for part, share in in_parts(batch, self.settings.accumulate):
            with casts(self.settings.precision, self.device):
                loss, surrogate = self.compute(*part, self.step)
            (surrogate if share == 1 else surrogate * share).backward()
            total = loss if share == 1 else total + loss.detach() * share
        return total

    def _apply(self) -> bool:
        """Take the step; False where its gradient has exploded, and it is left out."""
        taken = not exploded(self.parameters, self.settings.skip_gradients)
        if self.settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm)
        self.schedule.apply(self.optimizer, self.step)
        advance(self.optimizer, taken)
        self.step += 1
        if self.average is not None and (share := share_of_newest(self.settings.average, self.step)):
            self.average.follow(share)
        return taken

    def _heed(self, within: Within | None) -> None:
        """End training where a signal asked for it: with a checkpoint, where there is a run."""
        signum = next((s for s in self.ranks.gathered(self.interrupts.pending) if s is not None), None)
        if signum is None:
            return
        self._save(within)
        kept = f"; its checkpoint is in {self.path}: go on with --resume" if self.path is not None else ""
        raise Interrupted(signum, f"interrupted after step {self.step} of {self.total_steps}{kept}")

    def _save(self, within: Within | None = None) -> None:
        """The best weights, and a checkpoint that stands by them: after an epoch, or within one."""
        if self.path is None or not self.ranks.first or (within is None and self.checkpoint_epoch == self.epoch):
            return
        began = time.perf_counter()
        if within is not None:
            within.random = random_state(self.device)
        if self.best is not None and not self.best_written:
            save_weights(self.path, self.best)
            self.best_written = True
        save_checkpoint(self.path, self, within)
        self.checkpoint_epoch = self.epoch
        self.due.made(began)

    def _copy_state(self, within: Within) -> None:
        within.random = random_state(self.device)
        tensors, state = state_of(self, within)
        self.copy = ({n: t.detach().clone() for n, t in tensors.items()}, state), time.perf_counter()

    def _explain(self, order: Tensor, lost: int) -> None:
        """Raise what is to be said of a sum that is not finite from step ``lost`` on, or of parameters after it."""
        lost = min(self.ranks.gathered(lost))
        found: tuple[int, Fault] | None = None
        if self.copy is not None:
            within = restore(self, *self.copy[0])
            if within is not None:
                set_random_state(within.random, self.device)
                found = self._find(order, within, lost)
            restore(self, *self.copy[0])  # the last state that is known to be good
        last = self.checkpoint_epoch
        kept = f"; the checkpoint in {self.path} is from epoch {last}" if self.path and last else ""
        what, step, where = (found[1].what, found[0], f": {found[1]}") if found else ("the loss", lost, "")
        raise NumericalError(f"{what} is NaN or infinite at step {step}{where}{kept}; {ADVICE}")

    def _find(self, order: Tensor, within: Within, lost: int) -> tuple[int, Fault] | None:
        """Go to the step before the last good one, and look at what follows; every process hears of what one finds."""
        self._begin(order, within)
        while self.step < lost - 2:
            self._advance(order, within, lost - 2)
        previous: dict[str, Tensor] | None = None
        while self.step < min(lost, self.total_steps):
            fault = examine(self, self._batch(self._rows(order, within)), self._gradients, previous)
            found = next((f for f in self.ranks.gathered(fault) if f is not None), None)
            if found is not None:
                return self.step + 1, found
            previous = {n: p.detach().clone() for n, p in self.program.named_parameters()}
            self._apply()
        return None

    def _validate(self) -> dict[str, float]:
        """The validation split's figures under the weights that would be kept."""
        if self.validation is None:
            return {}
        with self._averaged():
            return self.validation.measure(self.program)

    def _averaged(self) -> Any:
        """The program with the moving average of its weights, where there is one."""
        return nullcontext() if self.average is None else self.average.swapped()

    def _choose(self, metrics: dict[str, Any], first_step: int) -> None:
        """Take an epoch's weights where they are the best so far, or the last is to be kept; say so in its metrics."""
        newest = -float(self.epoch)  # without a validation split, as within a warm-up, the newest is the best
        value = metrics.get("validation_loss" if self.settings.keep == "elbo" else "validation_objective", newest)
        if self.best is not None and not fits(self.program, self.best):
            self.best = None  # a callback has rebuilt the program: older weights are of another
        warming = False
        if self.objective.warmup_steps and self.validation is not None and self.settings.keep != "elbo":
            warming = first_step + 1 < self.objective.warmup_steps
            metrics["warm_up"] = int(warming)
        if warming or value < self.best_loss or self.best is None:
            self.best_loss, self.best_epoch = value if math.isfinite(value) and not warming else math.inf, self.epoch
        if self.best_epoch == self.epoch or self.settings.keep == "last":
            with self._averaged():
                self.best = {name: t.detach().clone() for name, t in self.program.state_dict().items()}
            self.best_written = False
        metrics["kept_epoch"] = self.epoch if self.settings.keep == "last" else self.best_epoch
