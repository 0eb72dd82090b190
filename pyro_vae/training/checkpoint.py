"""The newest state of training in one file, tensors and text only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_vae.errors import UserError
from pyro_vae.training.files import read_tensors, write_tensors
from pyro_vae.training.run import CHECKPOINT, WEIGHTS, fill, read_metrics, write_metrics

if TYPE_CHECKING:
    from pyro_vae.training.loop import Trainer


def save_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """The best weights so far."""
    write_tensors(path / WEIGHTS, weights)


def save_checkpoint(path: Path, trainer: Trainer) -> None:
    """Weights, optimizer, moving average and counters after an epoch."""
    tensors = {f"program.{name}": t for name, t in trainer.program.state_dict().items()}
    for index, p in enumerate(trainer.parameters):
        for key, value in trainer.optimizer.state.get(p, {}).items():
            tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value)
    for index, average in enumerate(trainer.average or []):
        tensors[f"average.{index}"] = average
    groups = [{k: v for k, v in g.items() if k != "params"} for g in trainer.optimizer.param_groups]
    state = {
        "step": trainer.step,
        "epoch": trainer.epoch,
        "best_loss": trainer.best_loss,
        "best_epoch": trainer.best_epoch,
        "groups": groups,
        "schedule": _plain(trainer.schedule.state_dict()),
    }
    write_tensors(path / CHECKPOINT, tensors, state)


def resume_from(path: Path, trainer: Trainer) -> None:
    """Put a trainer where the checkpoint of a run left off; metrics written after it are cut."""
    if not (path / CHECKPOINT).is_file():
        return  # killed within its first epoch: begin again
    tensors, state = read_tensors(path / CHECKPOINT)
    where = str(path / CHECKPOINT)
    fill(trainer.program, _under("program.", tensors), where)
    try:
        trainer.step, trainer.epoch = int(state["step"]), int(state["epoch"])
        trainer.best_loss, trainer.best_epoch = float(state["best_loss"]), int(state["best_epoch"])
        for group, saved in zip(trainer.optimizer.param_groups, state["groups"], strict=True):
            group.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})
        trainer.schedule.load_state_dict(state["schedule"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} is damaged ({error!r}): train again") from None
    for name, tensor in _under("optimizer.", tensors).items():
        index, key = name.split(".", 1)
        parameter = trainer.parameters[int(index)]
        # counters stay where fused optimizers keep them; moments go where the parameters are
        trainer.optimizer.state[parameter][key] = tensor.to(parameter.device) if tensor.dim() else tensor
    for name, tensor in _under("average.", tensors).items():
        if trainer.average is not None:
            trainer.average[int(name)].copy_(tensor)
    best, _ = read_tensors(path / WEIGHTS)
    trainer.best = {name: t.to(trainer.device) for name, t in best.items()}
    trainer.metrics = read_metrics(path)[: trainer.epoch]
    write_metrics(path, trainer.metrics)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """What JSON can hold of a schedule's state: its counters; what it was made with is made again."""

    def holds(value: Any) -> bool:
        try:
            json.dumps(value)
        except TypeError:
            return False
        return True

    return {k: v for k, v in state.items() if holds(v)}
