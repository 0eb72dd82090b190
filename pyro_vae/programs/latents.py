"""Through a program and back: encode, decode, sample and reconstruct, for any Program."""

from __future__ import annotations

import math
import operator
import warnings
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import Categorical

from pyro_vae.errors import DataError, UserError
from pyro_vae.programs.contract import admit, check_model, require_program, require_y
from pyro_vae.programs.given import require_dense
from pyro_vae.programs.trace import (
    OBSERVED,
    SAMPLE_PLATE,
    AtValues,
    Program,
    Traced,
    arguments,
    device_of,
    dtype_of,
    evaluating,
    factors,
    innermost,
    isolated,
    latent_sites,
    to_program,
    y_to_program,
)
from pyro_vae.seeding import derive_seed, seeded
from pyro_vae.signatures import checked

__all__ = [
    "AtValues", "Latents", "decode", "encode", "mean_of", "point_of", "reconstruct", "require_joint_draws", "sample",
    "sample_latents", "sample_latents_like", "to_program",
]  # fmt: skip

MEAN_DRAWS = 64  # draws that stand in for the mean of a distribution that has no closed form for it
Latents = Tensor | dict[str, Tensor]


def mean_of(fn: Any) -> Tensor:
    """The mean of a distribution, or of 64 draws of it where it has no closed form."""
    try:
        mean = fn.mean
    except NotImplementedError:
        mean = None
    if mean is None or not torch.isfinite(mean).all():
        draws = fn.sample((MEAN_DRAWS,))
        mean = (draws if draws.is_floating_point() else draws.to(torch.get_default_dtype())).mean(0)
    return mean


def point_of(fn: Any) -> Tensor:
    """One value to stand for a latent's distribution: its mean, or the mode where it is the number of a class.

    An average of class numbers is no class, and what looks a class up (an embedding) cannot take it.
    """
    if isinstance(innermost(fn), Categorical) and innermost(fn).event_shape == ():
        mode: Tensor = innermost(fn).probs.argmax(-1)
        return mode.expand(fn.batch_shape + fn.event_shape)
    return mean_of(fn)


@checked
def encode(
    program: Program, x: Tensor, y: Tensor | None = None, *, num_samples: int | None = None, seed: int = 0
) -> Latents:
    """The latents that the guide gives to x.

    Args:
        program: any Program.
        x: data ``(N, *event)``.
        y: what a conditional program is conditioned on.
        num_samples: draws per image; None for the mean of each site given the means of those before it (of a site that draws
            class numbers, the most probable one).
        seed: of the draws; torch's generators are put back.

    Returns:
        ``(N, *latent)``, with draws ``(num_samples, N, *latent)``; for several latent sites a dict of these by name. Sites of the
        guide alone are not among them.

    Raises:
        UserError: data of another shape, missing ones (NaN), no rows; a program that breaks the contract.
    """
    if num_samples is not None:
        _require_count("encode", num_samples)
    admitted = admit(program, x, y, support=False)
    _require_range(admitted.model.nodes[OBSERVED]["fn"], x)
    sites = latent_sites(admitted.model)
    args = arguments(to_program(program, x), y_to_program(program, y))
    with evaluating(program), isolated(), seeded(derive_seed("encoded latents", seed), device_of(program)):
        if num_samples is None:
            with AtValues({}, default=point_of):
                traced = poutine.trace(program.guide).get_trace(*args)
        else:
            with pyro.plate(SAMPLE_PLATE, num_samples, dim=-2):
                traced = poutine.trace(program.guide).get_trace(*args)
    return _one_or_dict({n: s["value"] for n, s in latent_sites(traced).items() if n in sites})


def _require_range(fn: Any, x: Tensor) -> None:
    """:class:`DataError` for values that no datum of a bounded support comes near: bytes for a program of numbers in [0, 1]."""
    support = innermost(fn).support
    low, high = (0, 1) if support is constraints.boolean else (
        getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    )  # fmt: skip
    if isinstance(low, Tensor) or isinstance(high, Tensor) or low is None or high is None:
        return
    least, most = float(x.nan_to_num(float(low)).min()), float(x.nan_to_num(float(low)).max())
    if least < 2 * low - high or most > 2 * high - low:
        raise DataError(
            f"the data go from {least:.4g} to {most:.4g}, and the program's are in [{low:g}, {high:g}]: prepare them as those "
            "that it was trained on, data.observed(split), or x / 255 for bytes"
        )


@checked
def decode(
    program: Program, z: Latents, y: Tensor | None = None, *, mean: bool = True, event_shape: Any = None, seed: int = 0
) -> Tensor:
    """The data that the model makes of latents z.

    Args:
        program: any Program.
        z: ``(N, *latent)`` or ``(num_samples, N, *latent)``; a dict by site name where there are several, those left out
            being drawn from the model.
        y: what a conditional program is conditioned on.
        mean: the mean of p(x | z), or a draw from it.
        event_shape: of one datum, where the program does not say it as ``program.event_shape``.
        seed: of the draws; torch's generators are put back.

    Returns:
        ``(N, *event)``, or ``(num_samples, N, *event)``.

    Raises:
        UserError: latents that are no tensors, or of other names or shapes; a program that does not say the shape of a datum.
    """
    require_program(program)
    for value in z.values() if isinstance(z, dict) else [z]:
        if not isinstance(value, Tensor):
            raise UserError(f"decode: expected latents as a torch tensor or a dict of them, got {type(value).__name__}")
        require_dense(value, "latents")
    require_y(program, None, y)
    device, dtype = device_of(program), dtype_of(program)
    event_shape = event_shape_of(program, event_shape)
    check_model(program, event_shape, y)
    with evaluating(program), isolated(), seeded(derive_seed("decoded data", seed), device):
        names = latent_sites(prior_trace(program, 1, y[:1] if y is not None else None, event_shape))
        if isinstance(z, Tensor):
            if len(names) != 1:
                raise UserError(f"the program has the latents {list(names)}: give decode a dict of them by name")
            z = {next(iter(names)): z}
        unknown = set(z) - set(names)
        if unknown or not z:
            raise UserError(f"decode: expected latents among {list(names)}, got {sorted(z)}")
        values = {n: v.to(device=device, dtype=dtype if v.is_floating_point() else None) for n, v in z.items()}
        name, value = next(iter(values.items()))
        event = names[name]["fn"].event_shape
        leading = value.shape[: value.dim() - len(event)]
        if tuple(value.shape[len(leading) :]) != tuple(event) or len(leading) not in (1, 2) or 0 in leading:
            raise UserError(
                f"decode: expected {name!r} of shape (N, {', '.join(map(str, event))}), got {tuple(value.shape)}"
            )
        require_y(program, leading[-1], y)
        with AtValues(values):
            if len(leading) == 2:
                with pyro.plate(SAMPLE_PLATE, leading[0], dim=-2):
                    traced = prior_trace(program, leading[1], y, event_shape)
            else:
                traced = prior_trace(program, leading[0], y, event_shape)
        return _observation(traced, mean, tuple(leading), event_shape)


@checked
def sample(
    program: Program,
    num_samples: int = 64,
    y: Tensor | None = None,
    *,
    mean: bool = False,
    event_shape: Any = None,
    seed: int = 0,
) -> Tensor:
    """Draws ``(num_samples, *event)`` from the model: z from the prior, then x from p(x | z), or its mean.

    A ``pyro.factor`` of the model has no part in them, and a warning says so: they are draws of p(z) p(x | z), and not of a joint
    distribution that the factor weighs.
    """
    require_program(program)
    _require_count("sample", num_samples)
    require_y(program, num_samples, y)
    event_shape = event_shape_of(program, event_shape)
    check_model(program, event_shape, y)
    with evaluating(program), isolated(), seeded(derive_seed("sampled data", seed), device_of(program)):
        traced = prior_trace(program, num_samples, y, event_shape)
        if found := factors(traced):
            warnings.warn(
                f"the model's pyro.factor {found[0]!r} has no part in samples: they are draws of p(z) p(x | z) alone; draw from "
                "posteriors (pv.posterior), which it has a part in",
                UserWarning,
                stacklevel=3,
            )
        return _observation(traced, mean, (num_samples,), event_shape)


@checked
def sample_latents(
    program: Program, num_samples: int, y: Tensor | None = None, *, event_shape: Any = None, seed: int = 0
) -> dict[str, Tensor]:
    """Draws of every latent site from the prior, ``(num_samples, *latent)`` each, by name.

    The prior is the law of the latent sites alone: a ``pyro.factor`` counts with the likelihood, and has no part in it.
    """
    require_program(program)
    _require_count("sample_latents", num_samples)
    require_y(program, num_samples, y)
    event_shape = event_shape_of(program, event_shape)
    check_model(program, event_shape, y)
    with evaluating(program), isolated(), seeded(derive_seed("latents of the prior", seed), device_of(program)):
        traced = prior_trace(program, num_samples, y, event_shape)
    return {n: s["value"] for n, s in latent_sites(traced).items()}


def sample_latents_like(program: Program, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
    """A draw of every latent site from the prior for each row of x, with gradients off, from the generators as they stand."""
    with isolated(), torch.no_grad():
        traced = poutine.trace(program.model).get_trace(*arguments(x, y))
    return {n: s["value"] for n, s in latent_sites(traced).items()}


@checked
def reconstruct(
    program: Program, x: Tensor, y: Tensor | None = None, *, num_samples: int | None = None, seed: int = 0
) -> Tensor:
    """The mean of p(x | z) at the guide's mean ``(N, *event)``, or at draws from it ``(num_samples, N, *event)``."""
    z = encode(program, x, y, num_samples=num_samples, seed=seed)
    return decode(program, z, y, event_shape=tuple(x.shape[1:]), seed=seed)


def require_joint_draws(program: Program, what: str, y: Tensor | None = None, *, event_shape: Any = None) -> None:
    """:class:`UserError` where z ~ p(z), x ~ p(x | z) are no draws of the joint density: where there is a ``pyro.factor``.

    ``what`` needs such draws, and is named in the message. A second observed site is refused everywhere.
    """
    require_program(program)
    require_y(program, None, y)
    event_shape = event_shape_of(program, event_shape)
    with evaluating(program), isolated(), seeded(derive_seed("factors of the model"), device_of(program)):
        traced = prior_trace(program, 1, None if y is None else y[:1], event_shape)
    if not any(site["fn"].event_shape.numel() for site in latent_sites(traced).values()):
        raise UserError(f"{what} is about latents, and the program has none: log_likelihood and sample do without")
    if found := factors(traced):
        raise UserError(
            f"{what} needs draws of the joint p(x, z), and the model's pyro.factor {found[0]!r} weighs the draws of p(z) "
            "p(x | z): they are none; write what it says as a distribution of a site, or use importance weighting or annealing"
        )


def _require_count(what: str, num_samples: int) -> None:
    if num_samples < 1:
        raise UserError(f"{what}: expected num_samples of at least 1, got {num_samples}")


def prior_trace(program: Program, batch: int, y: Tensor | None, event_shape: tuple[int, ...]) -> Traced:
    """The model on an empty x: nothing but its shape, device and dtype is read."""
    x = torch.zeros(batch, *event_shape, device=device_of(program), dtype=dtype_of(program))
    try:
        return poutine.trace(program.model).get_trace(*arguments(x, y_to_program(program, y)))
    except (UserError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
        said = " ".join(str(error).partition("Trace Shapes:")[0].split())[:240]
        beside = "" if y is None else f" and y of shape {tuple(y.shape)}, {str(y.dtype).removeprefix('torch.')}"
        raise UserError(
            f"the model of {type(program).__name__} does not run on {batch} rows of event_shape {tuple(event_shape)}{beside}: "
            f"{type(error).__name__}: {said}"
        ) from error


def _observation(traced: Traced, mean: bool, leading: tuple[int, ...], event_shape: tuple[int, ...]) -> Tensor:
    """Data of the site x ``(*leading, *event_shape)``; the site may see a datum flattened."""
    fn = traced.nodes[OBSERVED]["fn"]
    if fn.event_shape.numel() != math.prod(event_shape):
        raise UserError(
            f"the model makes data of shape {tuple(fn.event_shape)}, and event_shape is {tuple(event_shape)}"
        )
    rows = tuple(fn.batch_shape)
    if len(rows) > len(leading) or any(n not in (1, of) for n, of in zip(rows[::-1], leading[::-1], strict=False)):
        raise UserError(
            f"the model makes data of batch shape {rows} where {tuple(leading)} was expected: latents, or y, have an axis that "
            "it spreads over the rows; give them the shape that it was written for"
        )
    found: Tensor = mean_of(fn) if mean else fn.sample()
    if bool(found.isnan().any()):
        raise UserError(
            "the model makes data that are NaN: expected latents, y and parameters that are finite; look for missing ones there"
        )
    return found.reshape(*rows, *event_shape).expand(*leading, *event_shape)


def event_shape_of(program: Any, event_shape: Any) -> tuple[int, ...]:
    """The shape of a datum: the one given, or what the program says; :class:`UserError` where neither is."""
    shape = event_shape if event_shape is not None else getattr(program, "event_shape", None)
    if shape is None:
        raise UserError(
            f"{type(program).__name__} does not say the shape of a datum: set program.event_shape or pass event_shape="
        )
    try:
        found = tuple(operator.index(n) for n in shape)
    except TypeError:
        found = (-1,)
    if isinstance(shape, str) or any(n < 1 for n in found):
        raise UserError(f"expected event_shape as whole numbers of at least 1, (C, H, W), say, got {shape!r}")
    return found


def _one_or_dict(values: dict[str, Tensor]) -> Latents:
    return next(iter(values.values())) if len(values) == 1 else values
