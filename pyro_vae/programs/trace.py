"""What a Program is, and how the library runs one.

A Program is an ``nn.Module`` with two methods, ``model(x)`` and ``guide(x)`` (``model(x, y)``, ``guide(x, y)`` if it is
conditional), or what ``pv.adopt`` makes of functions. Rows are an axis of all sites, each row stands for itself, one site
observes x, and the guide has all latents of the model: docs/programs.md says what is asked and why.

The library adds a plate of samples at dim -2: latents then arrive as ``(num_samples, batch, *event)`` while x stays ``(batch,
*event)``. A program that does not take that has samples folded into its rows (:mod:`pyro_vae.programs.folding`). Whatever is put
into Pyro's global parameter store (``pyro.module`` does) stays in a private one. :mod:`pyro_vae.programs.contract` holds a
program to all this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Protocol, TypeVar, runtime_checkable

import pyro
import pyro.nn.module
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_vae.errors import ProgramError, UserError
from pyro_vae.memory import keep_freed
from pyro_vae.precision import no_denormals, products
from pyro_vae.programs.columns import Columns, layout_of
from pyro_vae.programs.folding import FOLDS, ONCE, folded, require_no_statistics, without_plates
from pyro_vae.programs.folding import innermost as innermost
from pyro_vae.programs.masks import unmasked
from pyro_vae.seeding import ONE_THREAD

T = TypeVar("T")
Traced = Any  # a poutine.Trace, whose nodes Pyro types more narrowly than they are

OBSERVED = "x"
DATA_PLATE = "data"
SAMPLE_PLATE = "num_samples"
WHOLE = "_pyro_vae_whole"  # in the __dict__ of a program that takes its data as whole numbers alone, which it looks up


@runtime_checkable
class Program(Protocol):
    """The pair of Pyro programs; see the module's text for what they keep."""

    def model(self, x: Tensor, *y: Tensor) -> Any:
        """p(z) p(x | z)."""

    def guide(self, x: Tensor, *y: Tensor) -> Any:
        """q(z | x)."""


@contextmanager
def isolated(validate: bool = False) -> Iterator[None]:
    """Run Pyro code without a trace in its global state: a private parameter store, and flags that are put back.

    Pyro's stack of handlers is one for all threads, of which one at a time runs.
    """
    with (
        ONE_THREAD,
        pyro.get_param_store().scope(),
        pyro.settings.context(module_local_params=True),
        _local_state_for_all_modules(),
        pyro.validation_enabled(validate),
    ):
        yield


@contextmanager
def _local_state_for_all_modules() -> Iterator[None]:
    """Let PyroModules run with local parameters that were made under Pyro's default, global ones.

    Only a PyroModule that is made while the setting is on gets the private store that it is entered with; others find this one,
    which is empty and is forgotten afterwards, as their class's.
    """
    context = getattr(pyro.nn.module, "_Context", None)
    if context is None or hasattr(context, "param_state"):  # inside another of these
        yield
        return
    context.param_state = {"params": {}, "constraints": {}}
    try:
        yield
    finally:
        del context.param_state


@contextmanager
def evaluating(program: Any) -> Iterator[None]:
    """Evaluation mode (dropout off), no gradients, full products and no denormal numbers, put back on leaving; threads wait."""
    keep_freed()
    with ONE_THREAD:
        modes = [(m, m.training) for m in program.modules()] if isinstance(program, nn.Module) else []
        for module, _ in modes:
            _set_mode(module, False)
        try:
            with torch.no_grad(), products("full"), no_denormals():
                yield
        finally:
            for module, mode in modes:
                _set_mode(module, mode)


def _set_mode(module: nn.Module, training: bool) -> None:
    own = module.__dict__
    if "training" in own:
        own["training"] = training  # which takes nn.Module.__setattr__ 2 us, for each of some dozens of modules
    else:  # a script, which keeps it elsewhere
        module.training = training


def arguments(x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
    """What a program is called with."""
    return (x,) if y is None else (x, y)


def device_of(program: Any) -> torch.device:
    """Where the program's parameters lie, or its floating buffers if it has none (the CPU if it has neither)."""
    return place_of(program)[0]


def dtype_of(program: Any) -> torch.dtype:
    """The floating dtype of the program's parameters, or of its buffers if it has none (float32 if it has neither).

    An adopted program whose parameters are made when it first runs has the dtype of the first data that it was given.
    """
    return place_of(program)[1]


def place_of(program: Any) -> tuple[torch.device, torch.dtype]:
    """:func:`device_of` and :func:`dtype_of`, found together: every call asks for both."""
    device = None
    for tensor in _held(program, "_parameters"):
        device = tensor.device if device is None else device
        if tensor.is_floating_point():
            return device, tensor.dtype
    for tensor in _held(program, "_buffers"):
        if tensor.is_floating_point():
            return device or tensor.device, tensor.dtype
    return device or torch.device("cpu"), getattr(program, "first_dtype", None) or torch.float32


def _held(program: nn.Module, kind: str) -> Iterator[Tensor]:
    """All tensors of a kind in the order of modules, without their names, over which torch takes most of the time."""
    todo: list[Any] = [program]
    while todo:
        module = todo.pop()
        if module is not None:
            yield from (t for t in getattr(module, kind).values() if t is not None)
            todo += reversed(list(module._modules.values()))


def to_program(program: Any, x: Tensor) -> Tensor:
    """The tensor x on the program's device; integers and other floats in its dtype."""
    device, dtype = place_of(program)
    return x.to(device=device, dtype=dtype)


def y_to_program(program: Any, y: Tensor | None, rows: slice = slice(None)) -> Tensor | None:
    """Rows of what a program is conditioned on, on its device; floats in its dtype, labels and flags as they are."""
    if y is None:
        return None
    device, dtype = place_of(program)
    return y[rows].detach().to(device=device, dtype=dtype if y.is_floating_point() else None)


@dataclass(frozen=True)
class Terms:
    """The log-density terms of one pass, each ``(num_samples, batch)``, in nats.

    ``log_weight = log_likelihood + log_prior - log_guide``: log p(x | z) + log p(z) - log q(z | x). ``log_prior`` is that of
    the latent sites alone; everything else that the model scores, its ``pyro.factor`` included, counts with the likelihood,
    so that ``log_guide - log_prior`` is KL(q || p) in expectation, whatever factors there are.
    """

    log_likelihood: Tensor
    log_prior: Tensor
    log_guide: Tensor

    @property
    def log_weight(self) -> Tensor:
        """Log p(x, z) - log q(z | x)."""
        return self.log_likelihood + self.log_prior - self.log_guide


@dataclass(frozen=True)
class Traces:
    """One execution of the guide, and of the model with the guide's latents; of ``program``, where it is known.

    ``known`` holds what functions found out of it (:func:`found_once`).
    """

    model: Traced = field(default_factory=poutine.Trace)
    guide: Traced = field(default_factory=poutine.Trace)
    program: Any = None
    known: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def terms(self, num_samples: int, batch: int) -> Terms:
        """Every site's log-density, summed by what it is."""
        log_likelihood = sum_log_prob(self.model, num_samples, batch, latent=False)
        return Terms(
            log_likelihood=log_likelihood,
            log_prior=sum_log_prob(self.model, num_samples, batch, latent=True, like=log_likelihood),
            log_guide=sum_log_prob(self.guide, num_samples, batch, like=log_likelihood),
        )


def found_once(function: Callable[[Traces], T]) -> Callable[[Traces], T]:
    """The function, whose finding is kept with the traces that it looks at; nobody may change it."""

    @wraps(function)
    def find(traces: Traces) -> T:
        if function not in traces.known:
            traces.known[function] = function(traces)
        found: T = traces.known[function]
        return found

    return find


def trace(program: Program, x: Tensor, y: Tensor | None = None, *, num_samples: int) -> Traces:
    """Run the guide, then the model on the guide's latents, with ``num_samples`` joint draws; inside :func:`isolated`."""
    guide = run(program.guide, x, y, num_samples=num_samples)
    return Traces(run(program.model, x, y, num_samples=num_samples, at=guide), guide, program)


def run(
    part: Callable[..., Any],
    x: Tensor,
    y: Tensor | None = None,
    *,
    num_samples: int | None = None,
    at: Any = None,
    once: bool = True,
    shown: Tensor | None = None,
) -> Traced:
    """Run a program's model or guide; inside :func:`isolated`.

    Args:
        part: ``program.model`` or ``program.guide``, or what is called as they are.
        x: data ``(batch, *event)``, in the program's dtype and on its device.
        y: what a conditional program is conditioned on.
        num_samples: of the outer plate; None to run without one.
        at: where the latent sites are put: values by name, the trace of another run, or a handler of Pyro that is entered
            around the run. A site that it does not name is drawn.
        once: whether a guide of one site, whose samples are folded into rows, may be run once for all of them.
        shown: of a record, what the program is called with in place of x, to which its sites are held all the same.

    Returns:
        The trace: what was drawn and observed at each site, and from what.
    """
    owner = getattr(part, "__self__", None)
    dims = None if owner is None else vars(owner).get(FOLDS)
    layout, axes = layout_of(owner, x), x.dim()
    if layout is None and owner is not None and vars(owner).get(WHOLE, False):
        x = x.to(torch.int64)
    columns: Columns | None = None
    if layout is not None:
        name = part.__name__
        at = latent_values(at) if isinstance(at, poutine.Trace) else at
        columns = Columns(layout, x, name == "guide", at, trusting=shown is None)
        part, x = columns.reading(part), x if shown is None else shown
        part.__name__ = name
    if isinstance(dims, dict):
        batch = num_samples or 1
        alone = once and batch > 1 and part.__name__ == "guide" and dims.get((ONCE, axes), False)
        part = folded(part, num_samples, len(x), dims.setdefault(part.__name__, {}), alone)
        require_no_statistics(owner, batch)
        if batch > 1 and not alone:
            x = x.expand(batch, *x.shape).flatten(0, 1)
            y = None if y is None else y.expand(batch, *y.shape).flatten(0, 1)
        num_samples = None
        at = without_plates(at) if isinstance(at, poutine.Trace) else at
    if isinstance(at, poutine.Trace):
        part, at = poutine.replay(part, trace=at), None
    handler = AtValues(at) if isinstance(at, dict) else nullcontext() if at is None else at
    plate = nullcontext() if num_samples is None else pyro.plate(SAMPLE_PLATE, num_samples, dim=-2)
    with plate, handler, nullcontext() if columns is None else columns:
        try:
            traced = poutine.trace(part).get_trace(*arguments(x, y))
        except UserError as error:  # without the shapes that Pyro adds to its text
            raise (error.__cause__ if isinstance(error.__cause__, UserError) else error) from None
    if columns is not None:
        columns.mark(traced)
    return traced


def draw_terms(program: Program, x: Tensor, y: Tensor | None = None, *, num_samples: int) -> Terms:
    """Terms ``(num_samples, batch)`` of fresh draws from the guide."""
    with isolated():
        return trace(program, x, y, num_samples=num_samples).terms(num_samples, x.shape[0])


def is_random(site: dict[str, Any]) -> bool:
    """Whether a site of a trace is a sample statement of the user's (no plate, parameter or ``deterministic``)."""
    return (
        site["type"] == "sample"
        and type(site["fn"]).__name__ != "_Subsample"
        and not site["infer"].get("_deterministic", False)
    )


def latent_sites(traced: Traced) -> dict[str, dict[str, Any]]:
    """The unobserved sample sites of a trace, by name, in the order of execution."""
    return {n: s for n, s in traced.nodes.items() if is_random(s) and not s["is_observed"]}


def latent_values(traced: Traced, num_samples: int | None = None, batch: int = 1) -> dict[str, Tensor]:
    """The values of the latent sites of a trace, by name; expanded to ``(num_samples, batch, *event)`` where it is said."""
    sites = latent_sites(traced)
    if num_samples is None:
        return {n: s["value"] for n, s in sites.items()}
    return {n: s["value"].expand(num_samples, batch, *s["fn"].event_shape) for n, s in sites.items()}


def observation(traced: Traced) -> str:
    """The name of the site of a model's trace that observes the data; :class:`ProgramError` where there is none."""
    return observations(traced)[0]


def observations(traced: Traced) -> list[str]:
    """The names of all sites that observe data: several, where these are the columns of a record."""
    found = [str(n) for n, s in traced.nodes.items() if is_random(s) and s["is_observed"] and not is_factor(s)]
    if not found:
        raise ProgramError(f"model: no observed site; write pyro.sample({OBSERVED!r}, ..., obs=x)")
    return found


def factors(traced: Traced) -> list[str]:
    """The names of the ``pyro.factor`` statements of a trace."""
    return [n for n, s in traced.nodes.items() if is_random(s) and is_factor(s)]


def is_factor(site: dict[str, Any]) -> bool:
    """Whether a random site is a ``pyro.factor``: a log-density of nothing."""
    return isinstance(innermost(site["fn"]), Unit)


def site_log_prob(
    site: dict[str, Any], value: Tensor | None = None, *, mask: bool = True, scale: bool = False
) -> Tensor:
    """The log-density of a site of a trace: the one place where a site's distribution is asked for one.

    Args:
        site: of a trace.
        value: to score in place of the site's own.
        mask: whether elements that are masked, by the site or in its distribution, count as 0; or are scored like others.
        scale: whether to multiply by the site's scale (``poutine.scale``), as an objective does and an evaluation does not.
    """
    fn, value = site["fn"] if mask else unmasked(site["fn"]), site["value"] if value is None else value
    log_prob: Tensor = fn.log_prob(value, *site["args"], **site["kwargs"])
    kept = site["mask"] if mask else site.get("drawn")  # what was given was not drawn
    kept = kept.to(log_prob.device) if isinstance(kept, Tensor) else kept
    found: Tensor = scale_and_mask(log_prob, site["scale"] if scale else 1.0, kept)
    return found


def log_probs(traced: Traced, *, scale: bool = False) -> dict[str, Tensor]:
    """The log-density of every random site of a trace by name, as far as they broadcast; masked, and scaled where asked."""
    return {n: site_log_prob(site, scale=scale) for n, site in traced.nodes.items() if is_random(site)}


def sum_log_prob(
    traced: Traced, num_samples: int, batch: int, *, latent: bool | None = None, like: Tensor | None = None
) -> Tensor:
    """The log-densities of sites added up, ``(num_samples, batch)``: of the latent ones, of all others, or (None) of all.

    Where there are none, they are zeros on the device of ``like``.
    """
    parts = [
        site_log_prob(site)
        for site in traced.nodes.values()
        if is_random(site) and latent in (None, not site["is_observed"])
    ]
    total = sum(parts[1:], parts[0]) if parts else torch.zeros((), device=None if like is None else like.device)
    return total.expand(num_samples, batch)


class AtValues(Messenger):
    """Give latent sites a value: the one listed, or else what ``default`` makes of the site's distribution."""

    def __init__(self, values: dict[str, Tensor], default: Any = None) -> None:
        super().__init__()
        self.values, self.default = values, default

    def _pyro_sample(self, msg: Any) -> None:
        if not is_random(msg) or msg["is_observed"]:
            return
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True
        elif self.default is not None:
            msg["value"], msg["done"] = self.default(msg["fn"]), True
