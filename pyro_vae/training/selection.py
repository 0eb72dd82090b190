"""Which epoch's weights are kept: what is measured on the validation split after every epoch, and what is said of the choice.

Epochs compare by the objective's own value on the same rows, in the same batches, with the same draws, as it is when all
schedules have ended (the full weight of the KL): a bound of another kind ranks weights that were trained for this one wrongly.
Epochs of a warm-up do not compare, whatever their values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_vae.objectives.base import Objective
from pyro_vae.programs.latents import to_program
from pyro_vae.programs.trace import Traces, device_of, evaluating, is_random, isolated, trace, y_to_program
from pyro_vae.programs.walk import AT_ONCE
from pyro_vae.seeding import derive_seed, generator, seeded
from pyro_vae.training.settings import parse_objective

if TYPE_CHECKING:
    from pyro_vae.training.source import Observed

VALIDATION_ROWS = AT_ONCE["validation"]  # images times particles
NOISE_DRAWS = 8  # fresh draws by which the noise of a validation value is found


class Validation:
    """The validation split, and what an epoch's weights are worth on it.

    Args:
        split: x and y, as :meth:`pyro_vae.training.source.Source.validation` gives them.
        objective: by whose value epochs compare; None for minus the ELBO, whatever is minimised.
        batch_size: of training.
    """

    def __init__(
        self, split: tuple[Tensor | Observed, Tensor | None], objective: Objective | None, batch_size: int
    ) -> None:
        self.x, self.y = split
        self.objective, n = objective, len(self.x)
        self.blocks = torch.arange(n).split(VALIDATION_ROWS)
        particles = getattr(objective, "num_particles", None)
        self.batches = torch.arange(n).split(max(batch_size, VALIDATION_ROWS // particles) if particles else batch_size)
        if objective is not None and objective.compares_images:
            # batches of one size, in an order that no file has: the rows of a split may be sorted by class
            order, size = torch.randperm(n, generator=generator("batches of validation")), min(batch_size, n)
            self.batches = torch.cat([order, order])[: math.ceil(n / size) * size].split(size)

    def measure(self, program: Any) -> dict[str, float]:
        """Figures in nats per image: minus the ELBO by one draw, its two parts, and the objective's own value.

        The same rows, batches and draws at every call.
        """
        sums, scaled = torch.zeros(2, dtype=torch.float64), False
        with evaluating(program), seeded(derive_seed("validation"), device_of(program)):
            for rows in self.blocks:
                traces, n = self._traces(program, rows)
                terms = traces.terms(1, n)
                scaled = scaled or any(_scaled(s) for t in (traces.model, traces.guide) for s in t.nodes.values())
                kl = terms.log_guide - terms.log_prior
                sums += torch.stack([terms.log_likelihood.sum(), kl.sum()]).cpu().double()
        reconstruction, kl_mean = (sums / len(self.x)).tolist()
        loss = kl_mean - reconstruction
        figures = {"validation_loss": loss, "validation_reconstruction": reconstruction, "validation_kl": kl_mean}
        if self.objective is not None:
            alone = self.objective.is_elbo and not scaled
            figures["validation_objective"] = loss if alone else self._value(program, self.batches, 0)
        return figures

    def noise(self, program: Any) -> float:
        """The standard error that the draws of z leave in the value by which epochs compare, the rows being what they are."""
        batches = self.blocks if self.objective is None else self.batches
        some = batches[: max(1, VALIDATION_ROWS // len(batches[0]))]
        values = torch.tensor([self._value(program, some, n) for n in range(1, NOISE_DRAWS + 1)], dtype=torch.float64)
        share = sum(map(len, some)) / sum(map(len, batches))
        return float(values.std()) * math.sqrt(share)

    def _value(self, program: Any, batches: Sequence[Tensor], draw: int) -> float:
        total = 0.0
        with evaluating(program), seeded(derive_seed("validation of the objective", draw), device_of(program)):
            for rows in batches:
                if self.objective is None:
                    traces, n = self._traces(program, rows)
                    value = -traces.terms(1, n).log_weight.mean()
                else:
                    value = self.objective.value(program, *self._rows(program, rows))
                total += float(value) * len(rows)
        return total / sum(map(len, batches))

    def _traces(self, program: Any, rows: Tensor) -> tuple[Traces, int]:
        with isolated():
            return trace(program, *self._rows(program, rows), num_samples=1), len(rows)

    def _rows(self, program: Any, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        if isinstance(self.x, Tensor):
            x = self.x[rows]
        elif bool((rows.diff() == 1).all()):
            x = self.x[int(rows[0]) : int(rows[-1]) + 1]
        else:
            x = torch.cat([self.x[i : i + 1] for i in rows.tolist()])
        return to_program(program, x), None if self.y is None else y_to_program(program, self.y[rows])


def _scaled(site: Any) -> bool:
    return is_random(site) and (isinstance(site["scale"], Tensor) or site["scale"] != 1)


@dataclass(frozen=True)
class Kept:
    """The epoch whose weights a run holds, and why that one.

    Attributes:
        epoch: its number, from 1.
        why: in words.
        value: by which epochs were compared, lower being better; None where they were not.
        noise: the standard error that the draws leave in it, where it was measured.
    """

    epoch: int
    why: str
    value: float | None = None
    noise: float | None = None

    def __str__(self) -> str:
        figure = "" if self.value is None else f" {self.value:.2f}"
        noise = "" if self.noise is None else f" (noise of its draws {self.noise:.2g})"
        return f"kept epoch {self.epoch}: {self.why}{figure}{noise}"


def with_kept(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of an older run, which do not say what was kept after each: the best validation ELBO so far."""
    best: dict[str, Any] = {}
    for m in metrics:
        if "kept_epoch" not in m:
            if not best or m.get("validation_loss", -math.inf) < best.get("validation_loss", math.inf):
                best = m
            m["kept_epoch"] = best["epoch"]
    return metrics


def kept(metrics: Sequence[Mapping[str, Any]], training: Mapping[str, Any], noise: float | None = None) -> Kept:
    """Which epoch of a run was kept.

    Args:
        metrics: one mapping per epoch, at least one.
        training: the settings of the run; what an old record lacks is what it was then.
        noise: of the value, where it is known.
    """
    objective = parse_objective(training.get("objective", "elbo"))
    keep = training.get("keep", "elbo")
    key = "validation_loss" if keep == "elbo" else "validation_objective"
    validated = [m for m in metrics if math.isfinite(m.get(key, math.nan)) and not m.get("warm_up")]
    best = min(validated, key=lambda m: m[key], default=metrics[-1])
    chosen = next((m for m in metrics if m["epoch"] == metrics[-1].get("kept_epoch")), best)
    if keep == "last":
        return Kept(chosen["epoch"], "the last, as keep says")
    if not any(key in m for m in metrics):
        return Kept(chosen["epoch"], "the last, for there is no validation split")
    if chosen.get("warm_up"):
        steps = objective.options.get("warmup_steps")
        return Kept(chosen["epoch"], f"the last, for training ended within the warm-up of {steps} steps")
    if not validated:
        return Kept(chosen["epoch"], "the last, for no validation value is finite")
    what = "minus the validation ELBO" if keep == "elbo" else f"validation value of {objective}"
    return Kept(chosen["epoch"], f"the lowest {what} of {len(validated)} epochs,", chosen[key], noise)
