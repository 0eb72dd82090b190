"""What is tried before the first step, so that no work is lost after it: a pass in training mode, and keeping the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyro_vae.errors import UserError, warn
from pyro_vae.objectives.base import Objective
from pyro_vae.training.files import DTYPES
from pyro_vae.training.modes import in_training


def rehearse(program: Any, objective: Objective, x: Tensor, y: Tensor | None, batch: int) -> list[str]:
    """Compute the objective once as a step will, on rows of which a minibatch has ``batch``.

    Args:
        program: the Program; it is left as it was, its buffers too.
        objective: what is to be minimised.
        x: a few rows ``(n, *event)``.
        y: what a conditional program is conditioned on.
        batch: rows of a minibatch; no more than these are taken.

    Returns:
        The names of the buffers that training changes.

    Raises:
        UserError: the pass fails (BatchNorm has no statistics of one row, say), an embedding has sparse gradients, or the loss
            depends on no parameter.
    """
    for name, module in program.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            raise UserError(
                f"{name!r} has sparse gradients, which the optimizers here do not take: make it with sparse=False"
            )
    x, y = x[:batch], None if y is None else y[:batch]
    with _buffers_kept(program) as before, in_training(program), torch.enable_grad():
        try:
            _, surrogate = objective(program, x, y, 0)
        except UserError:
            raise
        except Exception as error:
            said = " ".join(str(error).partition("Trace Shapes:")[0].split())[:200]
            one = "; give minibatches of more rows (batch_size), or more data" if len(x) == 1 else ""
            raise UserError(
                f"a training step of {type(program).__name__} fails on a minibatch of {len(x)} row{'s'[: len(x) != 1]}: "
                f"{type(error).__name__}: {said}{one}"
            ) from error
        if not surrogate.requires_grad:
            raise UserError(
                "nothing to train: no parameter has a part in the loss; they are frozen, or of sites that are conditioned on"
            )
        moved = [n for n, b in program.named_buffers() if n in before and not _equal(b, before[n])]
    lost = sorted(set(moved) - set(program.state_dict()))
    if lost:
        warn(
            f"training changes the buffer {lost[0]!r}, which is not kept with the weights (persistent=False), so that a run "
            "loaded or resumed is another: register it as a persistent buffer if it matters",
            UserWarning,
        )
    return moved


def require_kept(program: nn.Module) -> None:
    """:class:`UserError` where a program's weights cannot be written to a file, or not be put back."""
    for name, tensor in (*program.named_parameters(), *program.named_buffers()):
        if is_lazy(tensor) or tensor.is_meta:
            raise UserError(
                f"{name!r} has no values yet ({'a lazy module' if is_lazy(tensor) else 'it is on the meta device'}): give the "
                "module its sizes, or its weights, before training"
            )
    state = program.state_dict()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise UserError(
                f"{name!r} of the program's state is {type(tensor).__name__}, and a run keeps tensors alone: make it a "
                "buffer, or leave it out of the state (get_extra_state)"
            )
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in DTYPES.values():
            kind = "sparse" if tensor.layout != torch.strided else str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{name!r} is {kind}, which a run's files cannot hold: keep it as a dense tensor of another dtype, or register "
                "it with persistent=False if it is made anew with the program"
            )
    try:
        program.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
    except (RuntimeError, AttributeError, KeyError, TypeError, NotImplementedError) as error:
        said = " ".join(str(error).split())[:240]
        raise UserError(
            f"the weights of {type(program).__name__} could not be put back after training: {said}; a buffer made by expand() "
            "needs .contiguous() or .clone()"
        ) from error


@contextmanager
def _buffers_kept(program: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The buffers' values, which are put back on leaving."""
    own = [(module, name, b) for module in program.modules() for name, b in module.named_buffers(recurse=False)]
    before = {name: b.clone() for name, b in program.named_buffers()}
    values = {id(b): before[name] for name, b in program.named_buffers()}
    try:
        yield before
    finally:
        with torch.no_grad():
            for module, name, b in own:
                if getattr(module, name) is not b:
                    setattr(module, name, b)
                if not _equal(b, values[id(b)]):
                    b.copy_(values[id(b)])


def _equal(a: Tensor, b: Tensor) -> bool:
    try:
        return torch.equal(a, b)
    except RuntimeError:  # dtypes that torch does not compare
        return a.shape == b.shape and a.dtype == b.dtype and a.cpu().tolist() == b.cpu().tolist()
