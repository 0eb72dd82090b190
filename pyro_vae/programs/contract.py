"""Hold a program, and the data that it is given, to the contract of :mod:`pyro_vae.programs.trace`."""

from __future__ import annotations

from typing import Any, NoReturn

import pyro
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from pyro_vae.errors import DataError, UserError
from pyro_vae.programs.auxiliary import check_auxiliary
from pyro_vae.programs.conditions import check_conditions
from pyro_vae.programs.given import require_rows, require_y
from pyro_vae.programs.reading import check_reading
from pyro_vae.programs.rows import check_rows
from pyro_vae.programs.sites import check_latents, check_log_prob, check_shapes, check_sites
from pyro_vae.programs.trace import (
    DATA_PLATE,
    OBSERVED,
    SAMPLE_PLATE,
    Program,
    Terms,
    Traced,
    Traces,
    arguments,
    device_of,
    draw_terms,
    dtype_of,
    evaluating,
    innermost,
    is_random,
    isolated,
    latent_sites,
    needs_y,
    takes_y,
    to_program,
    trace,
    y_to_program,
)
from pyro_vae.seeding import derive_seed, seeded

__all__ = [
    "DATA_PLATE", "OBSERVED", "SAMPLE_PLATE", "Program", "Terms", "Traced", "Traces", "admit", "arguments", "check",
    "check_model", "check_observed", "device_of", "draw_terms", "dtype_of", "evaluating", "is_random", "isolated",
    "latent_sites", "needs_y", "refuse_run", "require_gradients", "require_latents", "require_program",
    "require_rows", "require_y", "takes_y", "trace",
]  # fmt: skip

ROWS = 8  # of data that a program is run on to be checked
ROWS_ALONE = 16  # that a model draws to be checked: numbers of two values must differ somewhere
SCANNED_ROWS = 10_000  # of data whose values are looked at at once
MISSING = (
    "the data have NaN or infinite values (first in row {0}); remove or impute them, or give the program a likelihood that "
    "leaves missing entries out (dist.NanMaskedNormal, .mask) and a guide that reads around them"
)


def require_program(program: Any) -> None:
    """:class:`UserError` unless ``program`` is a module with a model and a guide."""
    missing = [name for name in ("model", "guide") if not callable(getattr(program, name, None))]
    if missing or not isinstance(program, nn.Module):
        raise UserError(
            f"expected a Program, an nn.Module with methods model(x) and guide(x); {type(program).__name__} "
            + (f"has no {' and no '.join(missing)}" if missing else "is no nn.Module")
        )


def require_gradients(program: Any) -> None:
    """:class:`UserError` where a program's tensors were made in inference mode, and no derivative can pass through them."""
    for name, tensor in (*program.named_parameters(), *program.named_buffers()):
        if tensor.is_inference():
            raise UserError(
                f"{name!r} was made inside of torch.inference_mode(), and derivatives are needed here: make the program "
                "outside of it, or hand over copy.deepcopy(program)"
            )


def require_latents(traces: Traces, what: str) -> None:
    """:class:`UserError` where a program has no latents, or none of any element, and ``what`` is about them."""
    if not any(site["fn"].event_shape.numel() for site in latent_sites(traces.model).values()):
        raise UserError(f"{what} is about latents, and the program has none: log_likelihood and sample do without")


def admit(program: Any, x: Any, y: Any = None, *, support: bool = True) -> Traces:
    """Hold a program and all rows of its data to the contract: what every public function that takes data begins with.

    Args:
        program: the Program.
        x: data ``(N, *event)``, on any device and in any dtype.
        y: what a conditional program is conditioned on, ``(N, ...)``.
        support: whether the values must be in the likelihood's support: not where they are encoded and not scored.

    Returns:
        The traces of a run on the first rows.

    Raises:
        UserError: of :func:`check`, for any row.
    """
    require_program(program)
    require_rows(x, program)
    require_y(program, len(x), y)

    def part(rows: slice) -> tuple[Tensor, Tensor | None]:
        return to_program(program, x[rows]), y_to_program(program, y, rows)

    traces = check(program, *part(slice(0, ROWS)), support=support)
    for first in range(0, len(x), SCANNED_ROWS):
        check_observed(traces, *part(slice(first, first + SCANNED_ROWS)), first=first, support=support)
    if y is not None:
        check_conditions(program, y, lambda rows: (to_program(program, x[rows]), y_to_program(program, y[rows])))
    return traces


def check(program: Any, x: Tensor, y: Tensor | None = None, *, support: bool = True) -> Traces:
    """Run a program, under Pyro's own validation, and hold it to the contract.

    Args:
        program: the Program.
        x: a few rows of data ``(batch, *event)``, in the program's dtype and on its device.
        y: what a conditional program is conditioned on, ``(batch, ...)``.
        support: whether x must be in the support of the likelihood.

    Returns:
        The traces of that run, with two samples.

    Raises:
        ProgramError: a site outside the plate, a subsampled plate, ``pyro.param``, no observed site ``x`` or a second one, a
            latent that the guide lacks, a random site that the model lacks, an observation or latent whose shape fits its
            distribution by broadcasting alone, a log-density of the wrong shape, a model that reads x,
            an observation that is other than x, a density of one row that depends on other rows or is random.
        UserError: the program cannot take a tensor of this shape, or values like these.
    """
    require_program(program)
    require_y(program, len(x), y)
    with seeded(derive_seed("contract"), x.device), evaluating(program):
        try:
            with isolated(validate=is_validation_enabled()):
                traces = trace(program, x, y, num_samples=2)
        except UserError:
            raise
        except Exception as error:
            refuse_run(program, x, y, error)
        check_sites(program, traces, x.shape[0])
        check_latents(traces)
        check_shapes(traces, x)
    # again, for what distributions say of values that are legal and not theirs: a guide may draw where the model cannot be
    with seeded(derive_seed("contract: densities"), x.device), evaluating(program), isolated():
        if not support:
            x = _inside(traces.model.nodes[OBSERVED]["fn"], x)
        traces = trace(program, x, y, num_samples=2)
        check_observed(traces, x, y, support=support)  # before a log-density is asked for values that it need not have
        for part, traced in (("model", traces.model), ("guide", traces.guide)):
            for name, site in traced.nodes.items():
                if is_random(site):
                    check_log_prob(part, name, site, x.shape[0])
        check_auxiliary(program, traces, x, y)
        few = slice(0, ROWS)
        latents = {n: s["value"][:, few] for n, s in latent_sites(traces.guide).items()}
        few_y = None if y is None else y[few]
        check_reading(program, x[few], few_y, latents)
        check_rows(program, x, y)
    return traces


def check_model(program: Any, event_shape: tuple[int, ...], y: Tensor | None = None) -> None:
    """Hold the model alone to the contract, on data that it draws itself: what functions that take no data begin with.

    Args:
        program: the Program.
        event_shape: of one datum.
        y: what a conditional program is conditioned on, ``(N, ...)``.

    Raises:
        ProgramError, UserError: of :func:`check`, as far as the model goes.
    """
    y = None if y is None else y_to_program(program, y[torch.arange(ROWS_ALONE, device=y.device) % len(y)])
    x = torch.zeros(ROWS_ALONE, *event_shape, device=device_of(program), dtype=dtype_of(program))
    with seeded(derive_seed("contract of a model alone"), x.device), evaluating(program), isolated():
        fn = _model_alone(program, x, y).model.nodes[OBSERVED]["fn"]
        if fn.event_shape.numel() == x[0].numel():
            drawn = fn.sample()
            x = drawn.expand(2, len(x), *fn.event_shape)[0].reshape(x.shape).to(x.dtype)
        traces = _model_alone(program, x, y)
        check_shapes(traces, x)
        for name, site in traces.model.nodes.items():
            if is_random(site):
                check_log_prob("model", name, site, len(x))
        check_reading(program, x, y, {n: s["value"] for n, s in latent_sites(traces.model).items()})
        check_rows(program, x, y, alone=True)


def _model_alone(program: Any, x: Tensor, y: Tensor | None) -> Traces:
    try:
        with pyro.plate(SAMPLE_PLATE, 2, dim=-2):
            traced = poutine.trace(program.model).get_trace(*arguments(x, y))
    except UserError:
        raise
    except Exception as error:
        refuse_run(program, x, y, error)
    traces = Traces(traced, poutine.Trace(), program)
    check_sites(program, traces, len(x))
    return traces


_EVENT_AXES = "; every axis but that of the data plate is an event axis: write .to_event(n)"


def refuse_run(program: Any, x: Tensor, y: Tensor | None, error: Exception) -> NoReturn:
    """:class:`UserError` that says why a program does not run on data x, given y."""
    if not torch.isfinite(x).all():
        raise DataError(MISSING.format(_first_bad(x))) from error
    if y is not None and y.is_floating_point() and not torch.isfinite(y).all():
        raise DataError(
            f"y has NaN or infinite values (first in row {_first_bad(y)}), which the program does not take: impute them, or "
            "leave such rows out"
        ) from error
    said = " ".join(str(error).partition("Trace Shapes:")[0].split())[:300]  # Pyro appends the whole trace
    kind = None if y is None else str(y.dtype).removeprefix("torch.")
    beside = "" if y is None else f" and y of shape {tuple(y.shape[1:])} per row, {kind}"
    raise UserError(
        f"the program {type(program).__name__} does not run on data of shape {tuple(x.shape[1:])} per row{beside}: "
        f"{type(error).__name__}: {said}" + (_EVENT_AXES if "Shape mismatch inside plate" in said else "")
    ) from error


def check_observed(
    traces: Traces, x: Tensor, y: Tensor | None = None, *, first: int | Tensor = 0, support: bool = True
) -> None:
    """Hold rows of data to the likelihood.

    Args:
        traces: what :func:`check` returned for the program.
        x: rows of data ``(batch, *event)``, as the program sees them.
        y: of these rows, for a conditional program: asked for where entries are missing.
        first: the number of the first row, for the message, or the numbers of all rows.
        support: whether the values are looked at beyond that they are there.

    Raises:
        DataError: values outside the support of the site ``x``; missing or infinite ones (NaN), unless the program gives rows
            with such a finite density: it knows what to do with them.
    """
    bad = ~torch.isfinite(x).reshape(len(x), -1).all(1)
    if bool(bad.any()) and not _knows_missing(traces, x[bad], None if y is None else y[bad]):
        raise DataError(MISSING.format(_number(first, _first_bad(x))))
    if support:
        _check_support(traces.model.nodes[OBSERVED]["fn"], x, first)


def _inside(fn: Any, x: Tensor) -> Tensor:
    """Rows of data, those outside of the likelihood's support replaced by draws of it."""
    if fn.event_shape.numel() != x[0].numel():
        return x
    rows = fn.support.check(x.reshape(len(x), *fn.event_shape))
    if rows.shape != x.shape[:1] or bool(rows.all()):
        return x
    drawn = fn.sample().expand(2, len(x), *fn.event_shape)[0].reshape(x.shape).to(x.dtype)
    return torch.where(rows.reshape(-1, *[1] * (x.dim() - 1)) | ~torch.isfinite(x), x, drawn)


def _number(first: int | Tensor, row: int) -> int:
    return int(first[row]) if isinstance(first, Tensor) else first + row


def _first_bad(x: Tensor) -> int:
    return int((~torch.isfinite(x)).reshape(len(x), -1).any(1).nonzero()[0])


def _knows_missing(traces: Traces, x: Tensor, y: Tensor | None) -> bool:
    """Whether a program gives these rows, which are not finite, log-densities that are."""
    program = traces.program
    if program is None or (y is None and needs_y(program)):
        return False
    try:
        with seeded(derive_seed("missing entries"), x.device), evaluating(program), isolated():
            terms = trace(program, x, y, num_samples=2).terms(2, len(x))
    except Exception:  # a program that was not written for them fails in any way
        return False
    return bool(torch.isfinite(terms.log_weight).all()) and bool(torch.isfinite(terms.log_guide).all())


def _check_support(fn: Any, x: Tensor, first: int | Tensor) -> None:
    value = x.reshape(len(x), *fn.event_shape) if fn.event_shape.numel() == x[0].numel() else x
    try:
        inside = fn.support.check(value)
    except RuntimeError:  # bounds that differ by row: those of the rows that the program ran on
        return
    if tuple(inside.shape) != (len(x),) or bool(inside.all()):  # other shapes: bounds that differ by draw
        return
    base = innermost(fn)
    outside = ~inside & torch.isfinite(value).reshape(len(x), -1).all(1)
    by_element = base.support.check(value) | value.isnan() if base.support.event_dim == 0 else inside
    if by_element.shape == value.shape and not bool(by_element.all()):
        outside = ~by_element
    if not bool(outside.any()):
        return
    row = int(outside.reshape(len(x), -1).any(1).nonzero()[0])
    value_there = f"{float(value[outside][0]):.4g}" if outside.shape == value.shape else "rows"
    name = type(base).__name__
    advice = "choose a likelihood whose support holds the data (normal: all numbers)"
    if float(value.nan_to_num(0.0).max()) > 1 and bool(
        (value.nan_to_num(0.0) == value.nan_to_num(0.0).abs().round()).all()
    ):
        advice = "for counts choose poisson or negative-binomial, for grey levels give bytes"
    elif name == "Bernoulli":
        advice = f"binarize grey levels (--binarization dynamic, or data.observed of a binarized data set), or {advice}"
    elif base.support is constraints.nonnegative_integer:
        advice = f"keep counts in a file of float32, since whole numbers are read as grey levels, or {advice}"
    raise DataError(
        f"the data hold {value_there}, outside the support of the {name} likelihood at the site {OBSERVED!r} (first in row "
        f"{_number(first, row)}); {advice}"
    )
