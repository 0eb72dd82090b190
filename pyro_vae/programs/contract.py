"""Hold a program, and the data that it is given, to the contract of :mod:`pyro_vae.programs.trace`."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from pyro.distributions import constraints
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from pyro_vae.errors import DataError, ProgramError, UserError
from pyro_vae.programs.auxiliary import check_auxiliary
from pyro_vae.programs.reading import check_reading
from pyro_vae.programs.trace import (
    DATA_PLATE,
    OBSERVED,
    SAMPLE_PLATE,
    Program,
    Terms,
    Traced,
    Traces,
    accepts_y,
    arguments,
    device_of,
    draw_terms,
    dtype_of,
    evaluating,
    innermost,
    is_factor,
    is_random,
    isolated,
    latent_sites,
    needs_y,
    site_log_prob,
    takes_y,
    to_program,
    trace,
)
from pyro_vae.seeding import derive_seed, seeded

__all__ = [
    "DATA_PLATE", "OBSERVED", "SAMPLE_PLATE", "Program", "Terms", "Traced", "Traces", "admit", "arguments", "check",
    "check_observed", "device_of", "draw_terms", "dtype_of", "evaluating", "is_random", "isolated", "latent_sites", "needs_y",
    "require_program", "require_rows", "require_y", "takes_y", "trace",
]  # fmt: skip

ROWS = 8  # of data that a program is run on to be checked
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


def require_dense(x: Tensor, what: str) -> None:
    """:class:`DataError` for a tensor that does not hold all its numbers, one after the other, as real ones."""
    kind = (
        "nested" if x.is_nested
        else "complex" if x.is_complex()
        else "quantized" if x.is_quantized
        else "empty shell on the meta device" if x.device.type == "meta"
        else str(x.layout).removeprefix("torch.").replace("_", " ") if x.layout != torch.strided
        else None
    )  # fmt: skip
    if kind is not None:
        remedy = {"complex": "give real and imaginary parts as numbers of their own, torch.view_as_real(x)"}.get(
            kind, "convert it, x.to_dense() of a sparse one"
        )
        raise DataError(f"{what}: expected a dense tensor of real numbers, got a {kind} one; {remedy}")


def require_rows(x: Any, program: Any = None) -> None:
    """:class:`UserError` unless ``x`` is a dense tensor ``(N, *event)`` of one row at least, of the event shape if known."""
    if not isinstance(x, Tensor):
        raise UserError(f"expected data as a torch tensor (N, *event), got {type(x).__name__}")
    require_dense(x, "the data")
    shape, expected = tuple(x.shape), getattr(program, "event_shape", None)
    whole = f"(N, {', '.join(map(str, expected or ()))})"
    if expected is not None and shape == tuple(expected):
        raise UserError(f"expected data {whole}, got a lone datum of shape {shape}: give it a batch axis, x[None]")
    if x.dim() < 2 or len(x) == 0:
        lone = (
            "; a lone datum needs a batch axis, x[None], and N numbers an event axis, x[:, None]" if x.dim() < 2 else ""
        )
        raise UserError(f"expected data (N, *event) with at least one row, got {shape}{lone}")
    if expected is not None and shape[1:] != tuple(expected):
        raise UserError(f"expected data {whole}, as {type(program).__name__}.event_shape says, got {shape}")


def require_y(program: Any, num_rows: int, y: Any) -> None:
    """:class:`UserError` unless ``y`` is what the program takes: a tensor of as many rows as x, or None."""
    if y is None:
        if needs_y(program):
            raise UserError("the program is conditional, model(x, y): give y, one row for each row of x")
        return
    if not accepts_y(program):
        raise UserError(f"{type(program).__name__} takes no y: its model has one argument; leave y out")
    if not isinstance(y, Tensor) or y.dim() < 1 or len(y) != num_rows:
        got = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise UserError(f"expected y as a torch tensor ({num_rows}, ...), one row for each row of x, got {got}")


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
        return to_program(program, x[rows]), None if y is None else y[rows].to(device_of(program))

    traces = check(program, *part(slice(0, ROWS)), support=support)
    for first in range(0, len(x), SCANNED_ROWS):
        check_observed(traces, *part(slice(first, first + SCANNED_ROWS)), first=first, support=support)
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
            distribution by broadcasting alone, a log-density of the wrong shape, a model that reads x.
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
            _refuse_run(program, x, error)
        _check_sites(program, traces, x.shape[0])
        _check_latents(traces)
        _check_shapes(traces, x)
    # again, for what distributions say of values that are legal and not theirs: a guide may draw where the model cannot be
    with seeded(derive_seed("contract: densities"), x.device), evaluating(program), isolated():
        traces = trace(program, x, y, num_samples=2)
        check_observed(traces, x, y, support=support)  # before a log-density is asked for values that it need not have
        for part, traced in (("model", traces.model), ("guide", traces.guide)):
            for name, site in traced.nodes.items():
                if is_random(site):
                    _check_log_prob(part, name, site, x.shape[0])
        check_auxiliary(program, traces, x, y)
        few = slice(0, ROWS)
        latents = {n: s["value"][:, few] for n, s in latent_sites(traces.guide).items()}
        check_reading(program, x[few], None if y is None else y[few], latents)
    return traces


_EVENT_AXES = "; every axis but that of the data plate is an event axis: write .to_event(n)"


def _refuse_run(program: Any, x: Tensor, error: Exception) -> NoReturn:
    if not torch.isfinite(x).all():
        raise DataError(MISSING.format(_first_bad(x))) from error
    said = " ".join(str(error).partition("Trace Shapes:")[0].split())  # Pyro appends the whole trace
    raise UserError(
        f"the program {type(program).__name__} does not run on data of shape {tuple(x.shape[1:])} per row: "
        f"{type(error).__name__}: {said}" + (_EVENT_AXES if "Shape mismatch inside plate" in said else "")
    ) from error


def _check_sites(program: Any, traces: Traces, batch: int) -> None:
    """Where the sites stand, and which are observed."""
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
                _check_plate(part, name, site)
            if is_random(site):
                _check_place(part, name, site, batch)
    observed = traces.model.nodes.get(OBSERVED)
    if observed is None or not is_random(observed) or not observed["is_observed"]:
        raise ProgramError(f"model: no observed site; write pyro.sample({OBSERVED!r}, ..., obs=x)")
    for part, traced in (("model", traces.model), ("guide", traces.guide)):
        for name, site in traced.nodes.items():
            if not is_random(site) or not site["is_observed"] or is_factor(site):
                continue
            if part == "guide":
                raise ProgramError(
                    f"guide: the site {name!r} is observed, and q(z | x) has none; leave obs out, or the site"
                )
            if name != OBSERVED:
                raise ProgramError(
                    f"model: a second observed site {name!r} beside {OBSERVED!r}: what would be reported is the density of both; "
                    "make them one site, or hand it over as y and condition on it"
                )


def _check_latents(traces: Traces) -> None:
    """The guide's sites are the model's, each of the same event shape."""
    model, guide = latent_sites(traces.model), latent_sites(traces.guide)
    missing = set(model) - set(guide)
    if missing:
        raise ProgramError(f"guide: no site for the model's latent {sorted(missing)[0]!r}; sample it under that name")
    extra = [n for n, s in guide.items() if n not in model and not s["infer"].get("is_auxiliary")]
    if extra:
        raise ProgramError(f"guide: the site {extra[0]!r} is no latent of the model; rename it or mark it is_auxiliary")
    for name, site in model.items():
        ours, theirs = tuple(guide[name]["fn"].event_shape), tuple(site["fn"].event_shape)
        if ours != theirs:
            raise ProgramError(
                f"guide: the site {name!r} has event shape {ours}, and the model's {theirs}; they would fit by broadcasting "
                "alone: give both one shape, with .expand and .to_event(n)"
            )


def _check_plate(part: str, name: str, site: dict[str, Any]) -> None:
    size, subsample = site["fn"].size, site["fn"].subsample_size
    if subsample not in (None, size):
        raise ProgramError(
            f"{part}: the plate {name!r} is subsampled ({subsample} of {size}); the library does the minibatching: write "
            f"pyro.plate({DATA_PLATE!r}, x.shape[0], dim=-1)"
        )


def _check_place(part: str, name: str, site: dict[str, Any], batch: int) -> None:
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


def _check_shapes(traces: Traces, x: Tensor) -> None:
    """The observation is x, and has the shape of its distribution without broadcasting."""
    site = traces.model.nodes[OBSERVED]
    fn, value = site["fn"], site["value"]
    expected, got = (len(x), *fn.event_shape), tuple(value.shape)
    if got != expected:
        more = len(got) - len(expected)
        remedy = "give them one shape, with .expand or .reshape"
        if more > 0:
            remedy = f"make the last {'axis an event axis' if more == 1 else 'axes event axes'} of the data with .to_event(n)"
        elif more < 0:
            remedy = "drop the axes that the data lack (.squeeze, or fewer in .to_event)"
        raise ProgramError(
            f"model: at the site {OBSERVED!r} the observation has shape {got}, and the distribution, with event shape "
            f"{tuple(fn.event_shape)}, takes {expected}: they would fit by broadcasting alone; {remedy}"
        )
    if got != tuple(x.shape):
        same = value.numel() == x.numel() and torch.equal(
            value.to(x.dtype).nan_to_num(), x.nan_to_num().reshape(value.shape)
        )
        if not same:
            raise ProgramError(
                f"model: the site {OBSERVED!r} observes a tensor of shape {got}, and the data are {tuple(x.shape)}; write obs=x, "
                "and prepare the data before they are handed over"
            )


def _check_log_prob(part: str, name: str, site: dict[str, Any], batch: int) -> None:
    shape = tuple(site_log_prob(site).shape)
    if len(shape) > 2 or any(have not in (1, want) for have, want in zip(shape[::-1], (batch, 2), strict=False)):
        raise ProgramError(
            f"{part}: log_prob of the site {name!r} has shape {shape} where (num_samples, batch) = (2, {batch}) was "
            "expected; make the other axes event axes with .to_event(n)"
        )


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
    if name == "Bernoulli":
        advice = f"binarize grey levels (--binarization dynamic, or data.observed of a binarized data set), or {advice}"
    elif base.support is constraints.nonnegative_integer:
        advice = f"keep counts in a file of float32, since whole numbers are read as grey levels, or {advice}"
    raise DataError(
        f"the data hold {value_there}, outside the support of the {name} likelihood at the site {OBSERVED!r} (first in row "
        f"{_number(first, row)}); {advice}"
    )
