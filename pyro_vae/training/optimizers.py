"""Any of torch's optimizers, by name and with its options; and what a checkpoint keeps of one."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from pyro_vae.errors import UserError, nearest
from pyro_vae.spec import Block, read_block
from pyro_vae.training.files import Outline

CLOSURES = {"lbfgs", "sparseadam"}  # that need the loss computed anew, or gradients that are not made here
OURS = {
    "params",
    "lr",
    "fused",
    "foreach",
    "capturable",
    "differentiable",
    "maximize",
}  # options that are not the user's
FUSED = {"adam", "adamw", "sgd", "adagrad"}
ADAMS = ("adam", "adamw", "adamax")  # whose first beta one-cycle moves
OPTIMIZERS: dict[str, type[Optimizer]] = {
    name.lower(): cls
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer and name.lower() not in CLOSURES
}


def parse_optimizer(value: Any) -> Block:
    """A name, ``"name:option=value,..."``, a table with a name, or a class of ``torch.optim``, held to what torch takes."""
    if inspect.isclass(value) and issubclass(value, Optimizer):
        value = value.__name__.lower()
    if isinstance(value, Optimizer):
        raise UserError(
            f"an optimizer is made when training begins: give its name and options, '{type(value).__name__.lower()}:key=value'"
        )
    block = read_block("optimizers", value)
    if block.name not in OPTIMIZERS:
        raise UserError(f"unknown optimizer {block.name!r}: {nearest(block.name, OPTIMIZERS)}")
    known = set(inspect.signature(OPTIMIZERS[block.name]).parameters) - OURS
    for key in block.options:
        if key not in known:
            hint = "lr is a setting of its own" if key == "lr" else nearest(key, known)
            raise UserError(f"optimizer {block.name!r} has no option {key!r}: {hint}")
    _make(block, [nn.Parameter(torch.zeros(2, 2))], 1e-3)
    return block


def make_optimizer(block: Block, lr: float, parameters: list[nn.Parameter]) -> Optimizer:
    """The optimizer of a name and options, fused where PyTorch has it so."""
    if not parameters:
        raise UserError("the program has no parameter that requires a gradient: there is nothing to train")
    fused = block.name in FUSED and parameters[0].device.type in ("cpu", "cuda")
    return _make(block, parameters, lr, **({"fused": True} if fused else {}))


def state_of_one(block: Block, lr: float, parameter: nn.Parameter) -> dict[str, Outline]:
    """What the optimizer keeps of a parameter after a step, by name: found by taking one on zeros."""
    own = nn.Parameter(torch.zeros_like(parameter, device="cpu"))
    own.grad = torch.zeros_like(own)
    optimizer = make_optimizer(block, lr, [own])
    optimizer.step()
    return {key: Outline.of(torch.as_tensor(value)) for key, value in optimizer.state[own].items()}


def _make(block: Block, parameters: list[nn.Parameter], lr: float, **extra: Any) -> Optimizer:
    options: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in block.options.items()}
    try:
        return OPTIMIZERS[block.name](parameters, lr=lr, **options, **extra)  # type: ignore[call-arg]
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"optimizer {block}: {' '.join(str(error).split())[:160]}") from None
