"""What went wrong in a step whose loss or gradient is not finite: which site, and which parameter.

By the time a loss is read, the step at fault is past and its parameters are lost. So the epoch is gone through once more, from a
copy of the state it began with, to the step before the fault; that step is then taken with every part looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyro_vae.programs.trace import is_random, isolated, observation, site_log_prob, trace
from pyro_vae.training.checkpoint import random_state, set_random_state
from pyro_vae.training.source import Batch

if TYPE_CHECKING:
    from pyro_vae.training.loop import Trainer

ADVICE = "lower lr, set clip_norm, or give the likelihood's scale a higher floor"


@dataclass(frozen=True)
class Fault:
    """Where a step failed, as clauses of a sentence."""

    what: str  # "the loss" or "a gradient"
    site: str | None
    parameter: str | None

    def __str__(self) -> str:
        site = self.site or "no single site is at fault, so that it is the objective's own arithmetic"
        parameter = f"; the parameter at fault is {self.parameter}" if self.parameter else ""
        return f"{site}{parameter}"


def all_finite(parameters: list[nn.Parameter]) -> bool:
    """Whether every number of some tensors is finite."""
    return bool(torch.isfinite(torch.stack(torch._foreach_norm([p for p in parameters if p.numel()], math.inf))).all())


def examine(
    trainer: Trainer, batch: Batch, gradients: Callable[[Batch], Tensor], previous: dict[str, Tensor] | None = None
) -> Fault | None:
    """Compute one step's gradients, looking at every part; None where all is finite.

    ``previous`` is what the parameters were a step before.
    """
    before = random_state(trainer.device)
    loss = gradients(batch)
    if not bool(torch.isfinite(loss)):
        set_random_state(before, trainer.device)
        return _in_loss(trainer, batch, previous or {})
    named = trainer.program.named_parameters()
    bad = [n for n, p in named if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
    if not bad:
        return None
    set_random_state(before, trainer.device)
    return _in_gradient(trainer, batch, bad)


def _in_loss(trainer: Trainer, batch: Batch, previous: dict[str, Tensor]) -> Fault:
    broken = [n for n, p in trainer.program.named_parameters() if not bool(torch.isfinite(p).all())]
    with _first_broken_module(trainer.program) as modules, torch.no_grad():
        sites = list(_sites(trainer, batch))
    site = next((text for text, terms in sites if not all(bool(torch.isfinite(t).all()) for t in terms)), None)
    if broken:
        return Fault("the loss", site, f"{broken[0]!r}, which is not finite itself")
    for name, p in trainer.program.named_parameters():
        if name in previous and _cures(trainer, batch, p, previous[name]):
            moved = float((p.detach() - previous[name]).abs().max())
            return Fault("the loss", site, f"{name!r}, which the step before moved by up to {moved:.3g}")
    if modules:
        name, module = modules[0]
        own = [(n, p.detach()) for n, p in module.named_parameters(recurse=False)]
        key, p = max(own, key=lambda item: float(item[1].abs().max()))
        return Fault("the loss", site, f"'{name}.{key}', up to {float(p.abs().max()):.3g}, whose layer overflows")
    return Fault("the loss", site, _parameter_of_site(trainer, batch))


@torch.no_grad()
def _cures(trainer: Trainer, batch: Batch, p: Tensor, previous: Tensor) -> bool:
    """Whether all is finite with one parameter as it was a step before."""
    now = p.clone()
    p.copy_(previous)
    try:
        return all(bool(torch.isfinite(t).all()) for _, terms in _sites(trainer, batch) for t in terms)
    finally:
        p.copy_(now)


def _in_gradient(trainer: Trainer, batch: Batch, bad: list[str]) -> Fault:
    parameters = dict(trainer.program.named_parameters())
    named = f"{bad[-1]!r}" + (f" (and {len(bad) - 1} before it)" if len(bad) > 1 else "")  # the nearest to the output
    for text, (_, log_prob) in _sites(trainer, batch):
        if log_prob.requires_grad:
            (grad,) = torch.autograd.grad(log_prob.sum(), parameters[bad[-1]], retain_graph=True, allow_unused=True)
            if grad is not None and not bool(torch.isfinite(grad).all()):
                return Fault("a gradient", f"{text} has a derivative that is not finite", named)
    return Fault("a gradient", None, named)


def _parameter_of_site(trainer: Trainer, batch: Batch) -> str | None:
    """The parameter nearest to the first log-density that is not finite: the last in the program's order."""
    named = [(n, p) for n, p in trainer.program.named_parameters() if p.requires_grad]
    for _, (_, log_prob) in _sites(trainer, batch):
        if log_prob.requires_grad and not bool(torch.isfinite(log_prob).all()):
            grads = torch.autograd.grad(log_prob.sum(), [p for _, p in named], retain_graph=True, allow_unused=True)
            moves = [(n, g) for (n, _), g in zip(named, grads, strict=True) if g is not None and bool(g.ne(0).any())]
            broken = [n for n, g in moves if not bool(torch.isfinite(g).all())] or [n for n, _ in moves]
            return repr(broken[-1]) if broken else None
    return None


def _sites(trainer: Trainer, batch: Batch) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Every site of one pass with the step's own noise: what to call it, its value and its log-density."""
    particles = int(getattr(trainer.objective, "num_particles", 1))
    before = random_state(trainer.device)
    with isolated():
        traces = trace(trainer.program, *batch, num_samples=particles)
    set_random_state(before, trainer.device)
    for part, traced in (("guide", traces.guide), ("model", traces.model)):
        for name, site in traced.nodes.items():
            if not is_random(site):
                continue
            log_prob = site_log_prob(site)
            if part == "guide" and not bool(torch.isfinite(site["value"]).all()):
                count = _count(site["value"].flatten(2).any(-1) if site["value"].dim() > 2 else site["value"])
                yield f"at the site {name!r} the guide draws values that are not finite", (site["value"], log_prob)
                continue
            what = "log p(x | z)" if part == "model" and name == observation(traced) else f"the {part}'s log-density"
            count = _count(log_prob)
            lost = f" is not finite for {count} of {len(batch[0])} images" if count else ""
            yield f"at the site {name!r} {what}{lost}", (site["value"], log_prob)


def _count(log_prob: Tensor) -> int:
    lost = ~torch.isfinite(log_prob)
    return int((lost.any(0) if lost.dim() > 1 else lost).sum())


@contextmanager
def _first_broken_module(program: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """The modules with parameters of their own that made, of finite inputs, what is not finite; in the order they ran."""
    found: list[tuple[str, nn.Module]] = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            broken = [not bool(torch.isfinite(t).all()) for t in (*inputs, output) if isinstance(t, Tensor)]
            if broken and broken[-1] and not any(broken[:-1]):
                found.append((name, module))

        return look

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in program.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
