"""How a program is trained: validated once, recorded in the run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from pyro_vae.errors import UserError
from pyro_vae.spec import Block, parse_block

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseModel):
    """The settings of :func:`pyro_vae.fit`.

    Attributes:
        epochs: passes over the training rows; None where ``steps`` says how long.
        steps: optimizer steps; the last epoch is cut short.
        batch_size: images per step; rows that do not fill the last minibatch of an epoch wait for the next shuffle.
        lr: the (peak) step size.
        optimizer: a PyTorch optimizer.
        schedule: ``one-cycle`` (up to ``lr`` over the first 30 % of steps, then down to almost 0; Smith & Topin 2018),
            ``cosine`` (down to 0) or ``constant``.
        clip_norm: the largest norm of the whole gradient, or None.
        average: decay per step of the exponential moving average of the weights that is evaluated and kept (with a faster
            decay over the first steps; updated at every step at first, at every 16th where its memory is long), or None.
        patience: epochs without a better validation value before training stops, or None; needs a validation split.
        keep: which weights are kept: ``best``, those of the epoch with the lowest validation value of the objective at the end of
            its schedules, never of a warm-up (the last where there is no validation split); ``last``; or ``elbo``, the best
            validation ELBO whatever was minimised.
        standardize: ``auto`` lets a declared program with a real-valued likelihood see data of one axis (or of two, the columns
            last) without levels in standard units from its first training on; ``off`` does not.
        objective: what is minimised.
        compile: ``on`` compiles a whole step into one graph, ``auto`` does where the number of steps repays it, ``off`` never
            does. The law of the result is the same; on a GPU the random numbers are others.
        precision: of matrix products: ``full``, ``tf32`` or ``bf16`` (:mod:`pyro_vae.precision`).
        seed: of shuffling, binarization and latents.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: Annotated[int, Field(ge=1)] | None = 50
    steps: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 128
    lr: Positive = 2e-3
    optimizer: Literal["adam", "adamw", "adamax", "rmsprop", "adagrad", "sgd"] = "adam"
    schedule: Literal["one-cycle", "cosine", "constant"] = "one-cycle"
    clip_norm: Positive | None = None
    average: Annotated[float, Field(gt=0, lt=1)] | None = 0.999
    patience: Annotated[int, Field(ge=1)] | None = None
    keep: Literal["best", "last", "elbo"] = "best"
    standardize: Literal["auto", "off"] = "auto"
    objective: Annotated[Block, BeforeValidator(lambda v: parse_block("objectives", v))] = Block(name="elbo")
    compile: Literal["auto", "on", "off"] = "auto"
    precision: Literal["full", "tf32", "bf16"] = "full"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @field_validator("*", mode="before")
    @classmethod
    def _no_flags(cls, value: Any) -> Any:
        """``True`` is no number: who writes ``epochs=True`` meant something else."""
        if isinstance(value, bool):
            raise ValueError(f"expected a number, a name or None, got {value}")
        return value

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without what is None."""
        return self.model_dump(exclude_none=True)

    def length(self, num_rows: int) -> tuple[int, int]:
        """Steps per epoch, and steps in all."""
        per_epoch = max(1, num_rows // self.batch_size)
        return per_epoch, self.steps if self.steps is not None else per_epoch * (self.epochs or 1)


# What runs were trained with before these were settings: what the record of an older run lacks.
BEFORE = {"keep": "elbo", "standardize": "off"}
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adamax": torch.optim.Adamax,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}
# What each keeps for a parameter; all but the step have the parameter's shape.
OPTIMIZER_STATE: dict[str, tuple[str, ...]] = {
    "adam": ("step", "exp_avg", "exp_avg_sq"),
    "adamw": ("step", "exp_avg", "exp_avg_sq"),
    "adamax": ("step", "exp_avg", "exp_inf"),
    "rmsprop": ("step", "square_avg"),
    "adagrad": ("step", "sum"),
    "sgd": (),
}
FUSED = {"adam", "adamw", "sgd", "adagrad"}


def make_optimizer(settings: Settings, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of the settings, fused where PyTorch has it so."""
    if not parameters:
        raise UserError("the program has no parameter that requires a gradient: there is nothing to train")
    kind = parameters[0].device.type
    extra: dict[str, Any] = {"fused": True} if settings.optimizer in FUSED and kind in ("cpu", "cuda") else {}
    return OPTIMIZERS[settings.optimizer](parameters, lr=settings.lr, **extra)  # type: ignore[call-arg]
