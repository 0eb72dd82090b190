"""The newest state of training in one file, tensors and text only.

A checkpoint is written at the start, after an epoch (not after every one where epochs take less time than is worth it), and
between two steps when training is interrupted; it holds all that the rest depends on, so that a resumed run equals, to the bit,
one left alone. Nothing in it is believed before it is held to the program and settings at hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyro_vae.training.files import Outline, damaged, read_tensors, remove_temporaries, write_tensors
from pyro_vae.training.metrics import METRICS, read_metrics, write_metrics
from pyro_vae.training.optimizers import state_of_one
from pyro_vae.training.run import CHECKPOINT, FILES, WEIGHTS, match
from pyro_vae.training.selection import with_kept

if TYPE_CHECKING:
    from pyro_vae.training.loop import Trainer


@dataclass
class Within:
    """Where an epoch stands between two of its steps.

    Attributes:
        first_step: the step before its first.
        seconds: how long it has taken.
        read: the running sum of losses at the last logging point.
        total: the running sum of losses, on the device.
        random: the states of the generators of every device in use, by name; empty at the epoch's beginning.
        skipped: how many of its steps were left out, on the device.
    """

    first_step: int
    seconds: float
    read: float
    total: Tensor
    random: dict[str, Tensor]
    skipped: Tensor


State = tuple[dict[str, Tensor], dict[str, Any]]


def save_weights(path: Path, weights: dict[str, Tensor], noise: float | None = None) -> None:
    """The weights that are kept, and the noise of the value that they were chosen by."""
    write_tensors(path / WEIGHTS, weights, None if noise is None else {"noise": noise})


def save_checkpoint(path: Path, trainer: Trainer, within: Within | None = None) -> None:
    """Weights, optimizer, moving average, counters; within an epoch also its sums and random generators."""
    write_tensors(path / CHECKPOINT, *state_of(trainer, within))


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of the generators that training on ``device`` draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    """Put them back."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])


def state_of(trainer: Trainer, within: Within | None = None) -> State:
    """Tensors (not copied) and plain values from which :func:`restore` goes on."""
    if trainer.captured is not None:
        trainer.captured.finish()
    tensors = {f"program.{name}": t for name, t in trainer.program.state_dict().items()}
    for index, (name, p) in enumerate(trainer.program.named_parameters()):
        for key, value in trainer.optimizer.state.get(p, {}).items():
            tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value)
        if trainer.average is not None and name in trainer.average.values:
            tensors[f"average.{index}"] = trainer.average.values[name]
    if trainer.average is not None:
        tensors |= {f"buffer.{name}": trainer.average.values[name] for name in trainer.average.moving}
    state: dict[str, Any] = {
        "step": trainer.step,
        "epoch": trainer.epoch,
        "best_loss": trainer.best_loss,
        "best_epoch": trainer.best_epoch,
    }
    if within is not None:
        tensors["within.total"] = within.total
        if trainer.settings.skip_gradients is not None:
            tensors["within.skipped"] = within.skipped
        tensors |= {f"random.{name}": t for name, t in within.random.items()}
        state["within"] = {k: getattr(within, k) for k in ("first_step", "seconds", "read")}
    return tensors, state


def restore(trainer: Trainer, tensors: dict[str, Tensor], state: dict[str, Any]) -> Within | None:
    """Put a trainer where :func:`state_of` found it, in place; returns where the epoch stands, if it is within one."""
    trainer.program.load_state_dict(_under("program.", tensors))
    trainer.step, trainer.epoch = state["step"], state["epoch"]
    trainer.best_loss, trainer.best_epoch = float(state["best_loss"]), state["best_epoch"]
    saved_state = _under("optimizer.", tensors)
    if not saved_state:
        trainer.optimizer.state.clear()
    parameters = list(trainer.program.named_parameters())
    for name, tensor in saved_state.items():
        index, key = name.split(".", 1)
        _, parameter = parameters[int(index)]
        own = trainer.optimizer.state[parameter]
        if key in own:  # a captured step holds on to these very tensors
            own[key].copy_(tensor)
        else:
            own[key] = tensor.to(_place(trainer, parameter, key), copy=True)
    if trainer.average is not None:
        averaged = {parameters[int(index)][0]: t for index, t in _under("average.", tensors).items()}
        trainer.average.fill(averaged | _under("buffer.", tensors))
    if "within" not in state:
        return None
    total = tensors["within.total"].to(trainer.device, copy=True)
    skipped = tensors.get("within.skipped", torch.zeros((), dtype=torch.int64)).to(trainer.device, copy=True)
    return Within(**state["within"], total=total, random=_under("random.", tensors), skipped=skipped)


def fits(program: nn.Module, weights: dict[str, Tensor]) -> bool:
    """Whether a program can take these weights, by name and shape."""
    return {n: t.shape for n, t in program.state_dict().items()} == {n: t.shape for n, t in weights.items()}


def resume_from(path: Path, trainer: Trainer) -> None:
    """Put a trainer where the checkpoint of a run left off; metrics written after it are cut."""
    if trainer.ranks.first:
        remove_temporaries(path, FILES)
    where = path / CHECKPOINT
    if not any((path / name).exists() for name in (CHECKPOINT, WEIGHTS, METRICS)):
        return  # killed before there was anything to go on from: begin again
    tensors, state = read_tensors(where, lambda found, state: _admit(trainer, found, state, where))
    metrics = read_metrics(path) if state["epoch"] else []
    if len(metrics) < state["epoch"]:
        raise damaged(where, f"it is from epoch {state['epoch']}, and the metrics end at epoch {len(metrics)}")
    try:
        trainer.within = restore(trainer, tensors, state)
        if trainer.within is not None:
            with torch.random.fork_rng(devices=[trainer.device] if trainer.device.type == "cuda" else []):
                set_random_state(trainer.within.random, trainer.device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise damaged(where, error) from None
    if trainer.epoch:
        expected = trainer.program.state_dict()
        best, _ = read_tensors(path / WEIGHTS, lambda found, _: match(expected, found, str(path / WEIGHTS)))
        trainer.best = {name: t.to(trainer.device) for name, t in best.items()}
    trainer.metrics = with_kept(metrics[: trainer.epoch])
    trainer.checkpoint_epoch = trainer.epoch
    if trainer.ranks.first:
        write_metrics(path, trainer.metrics)


def _place(trainer: Trainer, parameter: Tensor, key: str) -> torch.device:
    group = trainer.optimizer.param_groups[0]
    on_device = key not in ("step", "mu_product") or group.get("fused") or group.get("capturable")
    return parameter.device if on_device else torch.device("cpu")


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _admit(trainer: Trainer, found: dict[str, Outline], state: Any, where: Path) -> None:
    """:class:`UserError` for a checkpoint that is not one of this program and these settings; nothing is read before."""
    try:
        wrong = _wrong_counters(trainer, state)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        wrong = f"its counters: {error!r}"
    if wrong:
        raise damaged(where, wrong)
    program = {n.removeprefix("program."): o for n, o in found.items() if n.startswith("program.")}
    match(trainer.program.state_dict(), program, str(where))
    expected: dict[str, Outline] = {}
    for index, p in enumerate(trainer.program.parameters()):
        if any(
            name.startswith(f"optimizer.{index}.") for name in found
        ):  # none for a parameter without a gradient so far
            kept = state_of_one(trainer.settings.optimizer, trainer.settings.lr, p)
            expected |= {f"optimizer.{index}.{key}": outline for key, outline in kept.items()}
        # a callback may have trained what is frozen to begin with
        if trainer.average is not None and (p.requires_grad or f"average.{index}" in found):
            expected[f"average.{index}"] = Outline.of(p)
    if trainer.average is not None:
        expected |= {f"buffer.{name}": Outline.of(trainer.average.values[name]) for name in trainer.average.moving}
    if "within" in state:
        expected["within.total"] = Outline((), torch.float32 if trainer.device.type == "mps" else torch.float64)
        if trainer.settings.skip_gradients is not None:
            expected["within.skipped"] = Outline((), torch.int64)
        generators = {n for n in found if n in ("random.cpu", "random.cuda", "random.mps")}
        expected |= {n: Outline(found[n].shape[:1], torch.uint8) for n in generators | {"random.cpu"}}
    rest = {n: o for n, o in found.items() if not n.startswith("program.")}
    for name in sorted(set(expected) | set(rest)):
        if rest.get(name) != expected.get(name):
            raise damaged(where, f"{name!r} is {rest.get(name)} where {expected.get(name)} is expected")


def _wrong_counters(trainer: Trainer, state: Any) -> str | None:
    """What is wrong with the plain values of a checkpoint, or None."""
    step, epoch = state["step"], state["epoch"]
    within = state.get("within", {"first_step": step, "seconds": 0.0, "read": 0.0})
    numbers = [state["best_loss"], within["seconds"], within["read"]]
    if not all(type(n) is int and n >= 0 for n in [step, epoch, state["best_epoch"], within["first_step"]]):
        return "its counters are no whole numbers"
    if not all(type(n) in (int, float) and not math.isnan(n) for n in numbers):
        return "its counters are no numbers"
    begin = min(epoch * trainer.steps_per_epoch, trainer.total_steps)
    if within["first_step"] != begin or not begin <= step <= min(begin + trainer.steps_per_epoch, trainer.total_steps):
        return f"step {step} is not in the epoch after epoch {epoch}"
    if state["best_epoch"] > epoch:
        return "its counters contradict each other"
    return "it has more than a checkpoint" if len(within) != 3 else None
