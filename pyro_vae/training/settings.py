"""How a program is trained: validated once, recorded in the run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from pyro_vae.errors import UserError, nearest
from pyro_vae.spec import Block, parse_block, read_block
from pyro_vae.training.optimizers import parse_optimizer

FUNCTION = "function"  # the name that stands for a schedule or an objective that is a function of the user's
# What follows a rate over a run, with its options: the share of steps in which one cycle rises; the share of the others' steps
# in which they rise from 0, and the factor that they end at; stages, each ``growth`` times as long and ``decay`` times as fast as
# the one before, by default those of Burda, Grosse & Salakhutdinov 2016 (3^i passes at 10^(-i/7), i = 0, ..., 7).
SCHEDULES: dict[str, dict[str, float]] = {
    "one-cycle": {"rise": 0.3},
    "cosine": {"final": 0.0, "warmup": 0.0},
    "constant": {"warmup": 0.0},
    "exponential": {"final": 0.01, "warmup": 0.0},
    "stages": {"number": 8, "growth": 3.0, "decay": 10 ** (-1 / 7), "warmup": 0.0},
}
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseModel):
    """The settings of :func:`pyro_vae.fit`.

    Attributes:
        epochs: passes over the training rows; None where ``steps`` says how long.
        steps: optimizer steps; the last epoch is cut short.
        batch_size: images per step; rows that do not fill the last minibatch of an epoch wait for the next shuffle.
        lr: the (peak) step size.
        optimizer: one of ``torch.optim``, with its options: ``"adamw:weight_decay=0.1,betas=[0.9,0.99]"``, a table or a class.
        schedule: ``one-cycle`` (up to ``lr`` over the first 30 % of steps, then down to almost 0; Smith & Topin 2018),
            ``cosine`` (down to 0), ``constant``, ``exponential`` or ``stages``, with the options of :data:`SCHEDULES`; or a
            function of the number of steps taken, which gives the rate of the next.
        accumulate: parts that a minibatch is computed in, one after the other: their gradients add up to that of the whole, and
            they take less memory.
        clip_norm: the largest norm of the whole gradient, or None.
        skip_gradients: the norm of the whole gradient above which, or where it is not finite, a step is left out: weights and
            moments stay as they are, its loss is no part of the epoch's, and the metrics count it as ``skipped`` (Child 2021,
            https://arxiv.org/abs/2011.10650, section 4). None leaves out no step.
        average: decay per step of the exponential moving average of the weights that is evaluated and kept (with a faster
            decay over the first steps; updated at every step at first, at every 16th where its memory is long), or None.
        patience: epochs without a better validation value before training stops, or None; needs a validation split.
        keep: which weights are kept: ``best``, those of the epoch with the lowest validation value of the objective at the end of
            its schedules, never of a warm-up (the last where there is no validation split); ``last``; or ``elbo``, the best
            validation ELBO whatever was minimised.
        standardize: ``auto`` lets a declared program with a real-valued likelihood see data of one axis (or of two, the columns
            last) without levels in standard units from its first training on; ``off`` does not.
        objective: what is minimised; or a function of program, x and, if it takes them, y and step, which gives a scalar loss,
            the mean over rows in nats.
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
    optimizer: Annotated[Block, BeforeValidator(parse_optimizer)] = Block(name="adam")
    schedule: Annotated[Block, BeforeValidator(lambda v: parse_schedule(v))] = Block(name="one-cycle")
    accumulate: Annotated[int, Field(ge=1)] = 1
    clip_norm: Positive | None = None
    skip_gradients: Positive | None = None
    average: Annotated[float, Field(gt=0, lt=1)] | None = 0.999
    patience: Annotated[int, Field(ge=1)] | None = None
    keep: Literal["best", "last", "elbo"] = "best"
    standardize: Literal["auto", "off"] = "auto"
    objective: Annotated[Block, BeforeValidator(lambda v: parse_objective(v))] = Block(name="elbo")
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
BEFORE = {"keep": "elbo", "standardize": "off", "accumulate": 1}


def parse_schedule(value: Any) -> Block:
    """A schedule by name and options, or the name of a function of the user's."""
    if (own := _function(value)) is not None:
        return own
    block = read_block("schedules", value)
    if block.name not in SCHEDULES:
        raise UserError(f"unknown schedule {block.name!r}: {nearest(block.name, SCHEDULES)}; or a function of the step")
    for key, option in block.options.items():
        known = SCHEDULES[block.name]
        if key not in known:
            raise UserError(f"schedule {block.name!r} has no option {key!r}: {nearest(key, known)}")
        above = key in ("number", "growth", "decay") or (key == "final" and block.name == "exponential")
        most = {"number": 64, "growth": 1000, "decay": 1000}.get(key, 1)
        if isinstance(option, bool) or not isinstance(option, int | float) or not (option > 0 if above else option >= 0) or (
            option > most or (key == "number" and not isinstance(option, int)) or (key == "rise" and not 0 < option < 1)
        ):  # fmt: skip
            raise UserError(f"schedule {block.name!r}: {key} = {option!r} is out of range (default {known[key]:g})")
    return block


def parse_objective(value: Any) -> Block:
    """An objective by name and options, or the name of a function of the user's."""
    own = _function(value)
    return parse_block("objectives", value) if own is None else own


def _function(value: Any) -> Block | None:
    """What the record says of a function of the user's, or said of one."""
    if callable(value) and not isinstance(value, type | Block):
        return Block(name=FUNCTION, options={"of": str(getattr(value, "__qualname__", type(value).__qualname__))})
    recorded = isinstance(value, dict) and value.get("name") == FUNCTION and set(value) == {"name", "of"}
    return (
        Block(name=FUNCTION, options={"of": str(value["of"])})
        if recorded
        else (value if isinstance(value, Block) and value.name == FUNCTION else None)
    )
