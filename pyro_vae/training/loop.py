"""The loop of SVI: draw a minibatch, follow the gradient of the objective, keep the best weights.

Every epoch seeds its own shuffle and its own noise from (seed, epoch), so that an epoch's result depends on the state it
began with and on nothing else: a run resumed from the checkpoint after any epoch equals, to the bit, one left alone.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vae.capture import CaptureWarning, Uncapturable
from pyro_vae.errors import NumericalError
from pyro_vae.objectives.base import Objective
from pyro_vae.programs.contract import draw_terms, evaluating
from pyro_vae.programs.latents import to_program
from pyro_vae.seeding import derive_seed, generator, seeded
from pyro_vae.training.captured import CapturedStep, worth_capturing
from pyro_vae.training.checkpoint import save_checkpoint, save_weights
from pyro_vae.training.progress import Progress
from pyro_vae.training.run import write_metrics
from pyro_vae.training.settings import Settings, make_optimizer, make_schedule
from pyro_vae.training.source import Batch, Source

LOGS_PER_EPOCH = 10  # how often an epoch's losses are read to the host
VALIDATION_ROWS = 1000  # images in one pass of validation
SHUFFLE, NOISE, VALIDATION = 0, 1, 2  # streams of random numbers


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
    ) -> None:
        self.program, self.source, self.settings, self.objective = program, source, settings, objective
        self.device, self.path = device, path
        self.steps_per_epoch, self.total_steps = settings.length(source.num_rows)
        self.parameters = [p for p in program.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(settings, self.parameters)
        self.schedule = make_schedule(settings, self.optimizer, self.total_steps)
        self.average = [p.detach().clone() for p in self.parameters] if settings.average else None
        self.validation = source.validation()
        self.step, self.epoch = 0, 0
        self.metrics: list[dict[str, Any]] = []
        self.best_loss, self.best_epoch = math.inf, 0
        self.best: dict[str, Tensor] | None = None
        self.captured: CapturedStep | None = None
        self.capture_tried = False

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or patience is at its end."""
        patience = self.settings.patience
        waited = patience is not None and self.validation is not None and self.epoch - self.best_epoch >= patience
        return self.step >= self.total_steps or waited

    def run(self, bar: Progress, callback: Callable[[dict[str, Any]], Any] | None) -> None:
        """Train to the end, and leave the best weights in the program."""
        while not self.finished:
            metrics = self._one_epoch(bar)
            self._keep_best(metrics)
            self.metrics.append(metrics)
            if self.path is not None:
                write_metrics(self.path, self.metrics)
                save_checkpoint(self.path, self)
            if callback is not None and callback(dict(metrics)):
                break
        if self.best is not None:
            self.program.load_state_dict(self.best)

    def _one_epoch(self, bar: Progress) -> dict[str, Any]:
        start = time.perf_counter()
        self.epoch += 1
        last_step = min(self.total_steps, self.step + self.steps_per_epoch)
        first_step = self.step
        lr = self.optimizer.param_groups[0]["lr"]
        every = max(1, self.steps_per_epoch // LOGS_PER_EPOCH)
        order = torch.randperm(self.source.num_rows, generator=generator(self.settings.seed, self.epoch, SHUFFLE))
        total = torch.zeros((), dtype=torch.float64 if self.device.type != "mps" else torch.float32, device=self.device)
        read = 0.0
        was_training = self.program.training
        self.program.train()
        captured = self._capture(order[: self.settings.batch_size])
        if captured is not None:
            total = captured.loss.zero_()
        with seeded(derive_seed(self.settings.seed, self.epoch, NOISE), self.device):
            while self.step < last_step:
                offset = (self.step - first_step) * self.settings.batch_size
                rows = order[offset : offset + self.settings.batch_size]
                if captured is not None:
                    captured(*self.source.stored(rows))
                    self.schedule.step()
                    self.step += 1
                else:
                    total += self._one_step(self.source.batch(rows))
                if (self.step - first_step) % every == 0 or self.step == last_step:
                    seen, read = read, float(total)
                    since = (self.step - first_step) % every or every
                    self._require_finite(read)
                    bar.update(self.step, f"epoch {self.epoch}  loss {(read - seen) / since:.2f}")
        if captured is not None:
            captured.finish()
        self.program.train(was_training)
        metrics: dict[str, Any] = {
            "epoch": self.epoch,
            "step": self.step,
            "train_loss": read / (self.step - first_step),
            "lr": lr,
        }
        metrics |= self._validate()
        metrics["seconds"] = round(time.perf_counter() - start, 3)
        return metrics

    def _capture(self, rows: Tensor) -> CapturedStep | None:
        """The compiled step, where it is wanted and can be had; said once where it is wanted and cannot."""
        wanted = self.settings.compile == "on" or (
            self.settings.compile == "auto" and worth_capturing(self.total_steps, self.device)
        )
        if wanted and not self.capture_tried:
            self.capture_tried = True
            try:
                self.captured = CapturedStep(self, *self.source.stored(rows))
            except Uncapturable as error:
                warnings.warn(f"training uncompiled: {error}", CaptureWarning, stacklevel=5)
        return self.captured

    def _one_step(self, batch: Batch) -> Tensor:
        loss, surrogate = self.objective(self.program, *batch, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        surrogate.backward()
        if self.settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        if self.average is not None and self.settings.average is not None:
            decay = min(self.settings.average, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        return loss

    def _require_finite(self, total: float) -> None:
        if math.isfinite(total):
            return
        broken = [n for n, p in self.program.named_parameters() if not bool(torch.isfinite(p).all())]
        at_fault = f"; the parameter {broken[0]!r} is no longer finite" if broken else ""
        kept = f"; the checkpoint in {self.path} is from epoch {self.epoch - 1}" if self.path and self.epoch > 1 else ""
        raise NumericalError(
            f"the loss became NaN or infinite by step {self.step}{at_fault}{kept}: lower lr, set clip_norm, or give the "
            "likelihood's scale a higher floor"
        )

    def _validate(self) -> dict[str, float]:
        """One-sample ELBO of the validation split under the weights that would be kept, with a fixed seed."""
        if self.validation is None:
            return {}
        x, y = self.validation
        sums = torch.zeros(2, dtype=torch.float64)
        self.swap_average()
        with evaluating(self.program), seeded(derive_seed(0, VALIDATION), self.device):
            for first in range(0, len(x), VALIDATION_ROWS):
                rows = slice(first, first + VALIDATION_ROWS)
                block_y = None if y is None else y[rows].to(self.device)
                terms = draw_terms(self.program, to_program(self.program, x[rows]), block_y, num_samples=1)
                kl = terms.log_guide - terms.log_prior
                sums += torch.stack([terms.log_likelihood.sum(), kl.sum()]).double().cpu()
        self.swap_average()
        reconstruction, kl_mean = (sums / len(x)).tolist()
        return {
            "validation_loss": kl_mean - reconstruction,
            "validation_reconstruction": reconstruction,
            "validation_kl": kl_mean,
        }

    def swap_average(self) -> None:
        """Exchange the program's weights and their moving average, where there is one."""
        if self.average is not None:
            for p, a in zip(self.parameters, self.average, strict=True):
                p.data, a.data = a.data, p.data

    def _keep_best(self, metrics: dict[str, Any]) -> None:
        loss = metrics.get("validation_loss", -float(self.epoch))  # without a validation split, the newest is the best
        if not loss < self.best_loss:
            return
        self.best_loss, self.best_epoch = loss, self.epoch
        self.swap_average()
        self.best = {name: t.detach().clone() for name, t in self.program.state_dict().items()}
        self.swap_average()
        if self.path is not None:
            save_weights(self.path, self.best)
