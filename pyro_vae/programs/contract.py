"""What a Program is, and how the library runs one.

A Program is an ``nn.Module`` with two methods, ``model(x)`` and ``guide(x)`` (``model(x, y)``, ``guide(x, y)`` if it is
conditional), in which

* every ``pyro.sample`` stands inside ``pyro.plate("data", x.shape[0], dim=-1)``, never subsampled;
* every other axis is an event axis;
* the observation is ``pyro.sample("x", ..., obs=x)``, and the guide samples every latent of the model;
* parameters are parameters of the module.

The library adds an outer plate at dim -2 for samples: latents then arrive as ``(num_samples, batch, *event)`` while x
stays ``(batch, *event)``. Whatever a program puts into Pyro's global parameter store (``pyro.module`` does) stays in a
private one; ``pyro.param`` is refused, because such a parameter belongs to no module.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import pyro
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from pyro_vae.errors import ProgramError, UserError
from pyro_vae.memory import keep_freed
from pyro_vae.precision import no_denormals
from pyro_vae.seeding import ONE_THREAD, derive_seed, seeded

Traced = Any  # a poutine.Trace, whose nodes Pyro types more narrowly than they are

OBSERVED = "x"
DATA_PLATE = "data"
SAMPLE_PLATE = "num_samples"


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
        pyro.validation_enabled(validate),
    ):
        yield


@contextmanager
def evaluating(program: Any) -> Iterator[None]:
    """Evaluation mode (dropout off), no gradients and no denormal numbers, put back on leaving; other threads wait."""
    keep_freed()
    with ONE_THREAD:
        modes = {module: module.training for module in program.modules()} if isinstance(program, nn.Module) else {}
        for module in modes:
            module.training = False
        try:
            with torch.no_grad(), no_denormals():
                yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def arguments(x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
    """What a program is called with."""
    return (x,) if y is None else (x, y)


def takes_y(program: Any) -> bool:
    """Whether a program is conditional: its model has a second positional argument without a default."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [p for p in inspect.signature(program.model).parameters.values() if p.kind in positional]
    return len(parameters) > 1 and parameters[1].default is inspect.Parameter.empty


def device_of(program: Any) -> torch.device:
    """Where the program's parameters lie (the CPU if it has none)."""
    return next((p.device for p in program.parameters()), torch.device("cpu"))


def dtype_of(program: Any) -> torch.dtype:
    """The floating dtype of the program's parameters (float32 if it has none)."""
    return next((p.dtype for p in program.parameters() if p.is_floating_point()), torch.float32)


def require_program(program: Any) -> None:
    """:class:`UserError` unless ``program`` is a module with a model and a guide."""
    missing = [name for name in ("model", "guide") if not callable(getattr(program, name, None))]
    if missing or not isinstance(program, nn.Module):
        raise UserError(
            f"expected a Program, an nn.Module with methods model(x) and guide(x); {type(program).__name__} "
            + (f"has no {' and no '.join(missing)}" if missing else "is no nn.Module")
        )


def require_rows(x: Any) -> None:
    """:class:`UserError` unless ``x`` is a tensor ``(N, *event)`` of at least one row and finite numbers."""
    if not isinstance(x, Tensor):
        raise UserError(f"expected data as a torch tensor (N, *event), got {type(x).__name__}")
    if x.dim() < 2 or len(x) == 0:
        raise UserError(f"expected data (N, *event) with at least one row, got {tuple(x.shape)}")
    _require_finite(x)


def _require_finite(x: Tensor) -> None:
    if not torch.isfinite(x).all():
        row = int((~torch.isfinite(x)).flatten(1).any(1).nonzero()[0])
        raise UserError(f"the data have NaN or infinite values (first in row {row}); remove or impute them")


@dataclass(frozen=True)
class Terms:
    """The log-density terms of one pass, each ``(num_samples, batch)``, in nats.

    ``log_weight = log_likelihood + log_prior - log_guide``: log p(x | z) + log p(z) - log q(z | x). Factors of the
    model count with the prior, factors of the guide with the guide.
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
    """One execution of the guide, and of the model with the guide's latents."""

    model: Traced
    guide: Traced

    def terms(self, num_samples: int, batch: int) -> Terms:
        """Every site's log-density, summed by what it is."""
        return Terms(
            log_likelihood=_sum(self.model, num_samples, batch, lambda name, site: name == OBSERVED),
            log_prior=_sum(self.model, num_samples, batch, lambda name, site: name != OBSERVED),
            log_guide=_sum(self.guide, num_samples, batch, lambda name, site: True),
        )


def trace(program: Program, x: Tensor, y: Tensor | None = None, *, num_samples: int) -> Traces:
    """Run the guide, then the model on the guide's latents, with ``num_samples`` joint draws; inside :func:`isolated`."""
    args = arguments(x, y)
    with pyro.plate(SAMPLE_PLATE, num_samples, dim=-2):
        guide = poutine.trace(program.guide).get_trace(*args)
        model = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(*args)
    return Traces(model, guide)


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


def _sum(traced: Traced, num_samples: int, batch: int, chosen: Any) -> Tensor:
    total: Tensor | float = 0.0
    for name, site in traced.nodes.items():
        if is_random(site) and chosen(name, site):
            log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
            if site["mask"] is not None:
                log_prob = log_prob.where(torch.as_tensor(site["mask"], device=log_prob.device), log_prob.new_zeros(()))
            total = total + log_prob
    if not isinstance(total, Tensor):
        total = torch.zeros(())
    return total.expand(num_samples, batch)


def check(program: Any, x: Tensor, y: Tensor | None = None) -> Traces:
    """Run a program once, under Pyro's own validation, and hold it to the contract.

    Args:
        program: the Program.
        x: a few rows of data ``(batch, *event)``, in the program's dtype and on its device.
        y: what a conditional program is conditioned on, ``(batch, ...)``.

    Returns:
        The traces of that run, with two samples.

    Raises:
        ProgramError: a site outside the plate, a subsampled plate, ``pyro.param``, no observed site ``x``, a latent
            that the guide lacks, a log-density of the wrong shape.
        UserError: the program cannot take a tensor of this shape, or values like these.
    """
    require_program(program)
    with seeded(derive_seed("contract"), x.device), evaluating(program), isolated(validate=is_validation_enabled()):
        try:
            traces = trace(program, x, y, num_samples=2)
        except UserError:
            raise
        except Exception as error:
            said = " ".join(str(error).partition("Trace Shapes:")[0].split())  # Pyro appends the whole trace
            raise UserError(
                f"the program {type(program).__name__} does not run on data of shape {tuple(x.shape[1:])} per row: "
                f"{type(error).__name__}: {said}" + (_EVENT_AXES if "Shape mismatch inside plate" in said else "")
            ) from error
        if OBSERVED in traces.model.nodes and traces.model.nodes[OBSERVED]["is_observed"]:
            check_observed(traces, x)  # before any log-density is asked for a value that it need not have
        _check_sites(program, traces, x.shape[0])
    return traces


_EVENT_AXES = "; every axis but that of the data plate is an event axis: write .to_event(n)"


def _check_sites(program: Any, traces: Traces, batch: int) -> None:
    own = {id(p) for p in program.parameters()}
    for part, traced in (("model", traces.model), ("guide", traces.guide)):
        for name, site in traced.nodes.items():
            if (
                site["type"] == "param"
                and id(getattr(site["value"], "unconstrained", lambda v=site["value"]: v)()) not in own
            ):
                raise ProgramError(
                    f"{part}: pyro.param({name!r}) belongs to no module; make it an nn.Parameter of {type(program).__name__}"
                )
            if site["type"] == "sample" and type(site["fn"]).__name__ == "_Subsample" and name != SAMPLE_PLATE:
                _check_plate(part, name, site, batch)
            if is_random(site):
                _check_site(part, name, site, batch)
    observed = traces.model.nodes.get(OBSERVED)
    if observed is None or not observed["is_observed"]:
        raise ProgramError(f"model: no observed site; write pyro.sample({OBSERVED!r}, ..., obs=x)")
    missing = set(latent_sites(traces.model)) - set(latent_sites(traces.guide))
    if missing:
        raise ProgramError(f"guide: no site for the model's latent {sorted(missing)[0]!r}; sample it under that name")
    extra = [
        n
        for n, s in latent_sites(traces.guide).items()
        if n not in latent_sites(traces.model) and not s["infer"].get("is_auxiliary")
    ]
    if extra:
        raise ProgramError(f"guide: the site {extra[0]!r} is no latent of the model; rename it or mark it is_auxiliary")


def _check_plate(part: str, name: str, site: dict[str, Any], batch: int) -> None:
    size, subsample = site["fn"].size, site["fn"].subsample_size
    if subsample not in (None, size):
        raise ProgramError(
            f"{part}: the plate {name!r} is subsampled ({subsample} of {size}); the library does the minibatching: write "
            f"pyro.plate({DATA_PLATE!r}, x.shape[0], dim=-1)"
        )


def _check_site(part: str, name: str, site: dict[str, Any], batch: int) -> None:
    frames = [f for f in site["cond_indep_stack"] if f.name != SAMPLE_PLATE]
    if not any(f.dim == -1 and f.size == batch for f in frames):
        raise ProgramError(
            f"{part}: the site {name!r} stands outside the data plate; write it inside "
            f"pyro.plate({DATA_PLATE!r}, x.shape[0], dim=-1)"
        )
    if len(frames) > 1:
        extra = next(f for f in frames if not (f.dim == -1 and f.size == batch))
        raise ProgramError(
            f"{part}: the site {name!r} is in a second plate {extra.name!r}; make that axis an event axis"
        )
    shape = tuple(site["fn"].log_prob(site["value"]).shape)
    if len(shape) > 2 or any(have not in (1, want) for have, want in zip(shape[::-1], (batch, 2), strict=False)):
        raise ProgramError(
            f"{part}: log_prob of the site {name!r} has shape {shape} where (num_samples, batch) = (2, {batch}) was "
            "expected; make the other axes event axes with .to_event(n)"
        )


def check_observed(traces: Traces, x: Tensor) -> None:
    """:class:`UserError` if x has values outside the support of the site ``x``, or values that are not finite."""
    _require_finite(x)
    fn = traces.model.nodes[OBSERVED]["fn"]
    if bool(fn.support.check(x).all()):
        return
    base = fn
    while hasattr(base, "base_dist"):
        base = base.base_dist
    name = type(base).__name__
    inside = base.support.check(x) if base.support.event_dim == 0 else torch.zeros_like(x, dtype=torch.bool)
    value = f"{float(x[~inside][0]):.4g}" if inside.shape == x.shape and not bool(inside.all()) else "rows"
    advice = "choose a likelihood whose support holds the data (normal: all numbers)"
    if name == "Bernoulli":
        advice = f"binarize grey levels (--binarization dynamic, or data.observed of a binarized data set), or {advice}"
    elif base.support is constraints.nonnegative_integer:
        advice = f"keep counts in a file of float32, since whole numbers are read as grey levels, or {advice}"
    raise UserError(
        f"the data hold {value}, outside the support of the {name} likelihood at the site {OBSERVED!r}; {advice}"
    )
