"""Through a program and back: encode, decode, sample and reconstruct, for any Program."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import ProjectedNormal
from torch import Tensor
from torch.distributions import Categorical

from pyro_vae.errors import UserError, nearest, said, warn
from pyro_vae.programs.adopted import Adopted, data_among
from pyro_vae.programs.autoregressive import watched
from pyro_vae.programs.columns import Layout, layout_of
from pyro_vae.programs.door import admitted, door
from pyro_vae.programs.folding import ByRow
from pyro_vae.programs.given import event_shape_of, require_dense, require_y
from pyro_vae.programs.temperature import Tempered
from pyro_vae.programs.trace import (
    AtValues,
    Program,
    Traced,
    device_of,
    evaluating,
    factors,
    innermost,
    isolated,
    latent_sites,
    latent_values,
    observation,
    place_of,
    run,
    to_program,
    y_to_program,
)
from pyro_vae.seeding import derive_seed, seeded

__all__ = [
    "AtValues", "Latents", "decode", "encode", "mean_of", "point_of", "reconstruct", "sample",
    "sample_latents", "sample_latents_like", "to_program",
]  # fmt: skip

MEAN_DRAWS = 64  # draws that stand in for the mean of a distribution that has no closed form for it
Latents = Tensor | dict[str, Tensor]


def mean_of(fn: Any) -> Tensor:
    """The mean of a distribution, or of 64 draws of it where it has no closed form (or Pyro calls a direction its mean)."""
    try:
        mean = None if isinstance(innermost(fn), ProjectedNormal) else fn.mean
    except NotImplementedError:
        mean = None
    if mean is None or not torch.isfinite(mean).all():
        try:
            draws = fn.sample((MEAN_DRAWS,))
        except NotImplementedError:  # a class that is drawn from by calling it alone
            draws = torch.stack([fn() for _ in range(MEAN_DRAWS)])
        mean = (draws if draws.is_floating_point() else draws.to(torch.get_default_dtype())).mean(0)
    return mean


def expected(fn: Any) -> Tensor:
    """The mean of a distribution; of class numbers the probabilities of the classes."""
    base = innermost(fn)
    if isinstance(base, torch.distributions.Categorical):
        probs: Tensor = base.probs
        return probs.expand(*fn.batch_shape, *fn.event_shape, probs.shape[-1])
    return mean_of(fn)


def point_of(fn: Any) -> Tensor:
    """One value to stand for a latent's distribution: its mean, or the mode where it is the number of a class.

    An average of class numbers is no class, and what looks a class up (an embedding) cannot take it.
    """
    if isinstance(fn, ByRow):
        return fn.outer(point_of(fn.base_dist))
    if isinstance(innermost(fn), Categorical) and innermost(fn).event_shape == ():
        mode: Tensor = innermost(fn).probs.argmax(-1)
        return mode.expand(fn.batch_shape + fn.event_shape)
    return mean_of(fn)


@door(scored=False, latents="encode", records=True)
def encode(
    program: Program, x: Tensor, y: Tensor | None = None, *, num_samples: int | None = None, seed: int = 0
) -> Latents:
    """The latents that the guide gives to x.

    Args:
        program: any Program.
        x: data ``(N, *event)``, or a record, of which missing columns that the guide draws are latents.
        y: what a conditional program is conditioned on.
        num_samples: draws per image; None for the mean of each site given the means of those before it (of a site that draws
            class numbers, the most probable one; of angles, the direction of their mean, however little is known of it). Of a
            site without a mean in closed form (a flow) it is the average of 64 draws, whose standard error is an eighth of the
            latent's standard deviation under the guide.
        seed: of the draws; torch's generators are put back.

    Returns:
        ``(N, *latent)``, with draws ``(num_samples, N, *latent)``; for several latent sites a dict of these by name. Sites of the
        guide alone are not among them.

    Raises:
        UserError: data of another shape, missing ones (NaN), no rows; a program that breaks the contract.
    """
    found = encoded_sites(program, x, y, num_samples=num_samples, seed=seed)
    return next(iter(found.values())) if len(found) == 1 else found


def encoded_sites(
    program: Program, x: Tensor, y: Tensor | None = None, *, num_samples: int | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """What :func:`encode` returns, by the names of the sites also where there is one."""
    if num_samples is not None:
        _require_count("encode", num_samples)
    at = AtValues({}, default=point_of) if num_samples is None else None
    x = to_program(program, x)
    with evaluating(program), isolated(), seeded(derive_seed("encoded latents", seed), x.device):
        traced = run(program.guide, x, y_to_program(program, y), num_samples=num_samples, at=at)
    return {n: s["value"] for n, s in latent_sites(traced).items() if not s["infer"].get("is_auxiliary")}


@door(data=False, latents="decode")
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
    return _decoded(program, z, y, mean, event_shape_of(program, event_shape), seed)


def _decoded(
    program: Program,
    z: Latents,
    y: Tensor | None,
    mean: bool,
    event_shape: tuple[int, ...],
    seed: int,
    x: Tensor | None = None,
) -> Tensor:
    for value in z.values() if isinstance(z, dict) else [z]:
        if not isinstance(value, Tensor):
            raise UserError(f"decode: expected latents as a torch tensor or a dict of them, got {type(value).__name__}")
        require_dense(value, "latents")
    (device, dtype), names = place_of(program), latent_sites(admitted().model)
    with evaluating(program), isolated(), seeded(derive_seed("decoded data", seed), device):
        if isinstance(z, Tensor):
            if len(names) != 1:
                raise UserError(f"the program has the latents {list(names)}: give decode a dict of them by name")
            z = {next(iter(names)): z}
        unknown = set(z) - set(names)
        if unknown or not z:
            raise UserError(f"decode: expected latents among {list(names)}, got {sorted(z)}")
        if not mean or set(names) - set(z):  # a first run that draws, so that what a seed draws is what it always was
            prior_trace(program, 1, None if y is None else y[:1], event_shape)
        values = {n: v.to(device=device, dtype=dtype if v.is_floating_point() else None) for n, v in z.items()}
        name, value = next(iter(values.items()))
        event = names[name]["fn"].event_shape
        leading = value.shape[: value.dim() - len(event)]
        if tuple(value.shape[len(leading) :]) != tuple(event) or len(leading) not in (1, 2) or 0 in leading:
            raise UserError(
                f"decode: expected {name!r} of shape (N, {', '.join(map(str, event))}), got {tuple(value.shape)}"
            )
        require_y(program, leading[-1], y)
        num_samples = leading[0] if len(leading) == 2 else None
        traced = prior_trace(program, leading[-1], y, event_shape, x, num_samples=num_samples, at=values)
        return _observation(traced, mean, tuple(leading), event_shape)


@door(data=False)
def sample(
    program: Program,
    num_samples: int = 64,
    y: Tensor | None = None,
    *,
    mean: bool = False,
    event_shape: Any = None,
    seed: int = 0,
    temperature: float = 1.0,
    shared: str | None = None,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """Draws ``(num_samples, *event)`` from the model: z from the prior, then x from p(x | z), or its mean.

    Without latents they are draws whatever ``mean`` says: every mean would be the same.

    Args:
        program: any Program.
        num_samples: how many.
        y: what a conditional program is conditioned on, ``(num_samples, ...)``.
        mean: the mean of p(x | z), or a draw from it.
        event_shape: of one datum, where the program does not say it as ``program.event_shape``.
        seed: of the draws; torch's generators are put back.
        temperature: by which the scales of all latents' priors are multiplied, where they have some.
        shared: a latent of a hierarchy: all draws have it, and what the model draws before it, in common; what is left to chance
            is what the layers below it decide.
        progress: called with the part that is done where x is drawn place by place.

    A ``pyro.factor`` of the model has no part in them, and a warning says so: they are draws of p(z) p(x | z), and not of a joint
    distribution that the factor weighs.
    """
    _require_count("sample", num_samples)
    event_shape = event_shape_of(program, event_shape)
    with (
        evaluating(program),
        isolated(),
        seeded(derive_seed("sampled data", seed), device_of(program)),
        watched(progress),
    ):
        at: Any = None if temperature == 1 else Tempered(temperature)
        if shared is not None:
            at = _shared(program, num_samples, y, event_shape, shared, at)
        traced = prior_trace(program, num_samples, y, event_shape, at=at)
        if temperature != 1 and not latent_sites(traced):
            raise UserError("temperature is of the latents' priors, and the program has no latents: leave it out")
        if found := factors(traced):
            warn(
                f"the model's pyro.factor {found[0]!r} has no part in samples: they are draws of p(z) p(x | z) alone; draw from "
                "posteriors (pv.posterior), which it has a part in",
                UserWarning,
            )
        return _observation(traced, mean and bool(latent_sites(traced)), (num_samples,), event_shape)


def _shared(program: Program, num: int, y: Tensor | None, event_shape: tuple[int, ...], name: str, at: Any) -> Any:
    """A handler that gives one draw of a latent, and of those before it, to all rows; those after it are drawn by ``at``."""
    if y is not None and bool((y != y[:1]).any()):
        raise UserError("shared gives one draw of a latent to all rows, whose y must then be one: give rows of one y")
    values = latent_values(prior_trace(program, 1, None if y is None else y[:1], event_shape, at=at))
    if name not in values:
        raise UserError(f"shared = {name!r}: {nearest(name, values)}")
    names = list(values)
    first = {n: values[n].expand(num, *values[n].shape[1:]) for n in names[: names.index(name) + 1]}
    return AtValues(first, default=None if at is None else at.draw)


@door(data=False)
def sample_latents(
    program: Program, num_samples: int, y: Tensor | None = None, *, event_shape: Any = None, seed: int = 0
) -> dict[str, Tensor]:
    """Draws of every latent site from the prior, ``(num_samples, *latent)`` each, by name.

    The prior is the law of the latent sites alone: a ``pyro.factor`` counts with the likelihood, and has no part in it.
    """
    _require_count("sample_latents", num_samples)
    event_shape = event_shape_of(program, event_shape)
    with evaluating(program), isolated(), seeded(derive_seed("latents of the prior", seed), device_of(program)):
        return latent_values(prior_trace(program, num_samples, y, event_shape))


def sample_latents_like(program: Program, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
    """A draw of every latent site from the prior for each row of x, with gradients off, from the generators as they stand."""
    with isolated(), torch.no_grad():
        return latent_values(run(program.model, x, y))


@door(scored=False, latents="a reconstruction", records=True)
def reconstruct(
    program: Program, x: Tensor, y: Tensor | None = None, *, num_samples: int | None = None, seed: int = 0
) -> Any:
    """The mean of p(x | z) at the guide's mean ``(N, *event)``, or at draws from it ``(num_samples, N, *event)``.

    Of a record a dict of these by column, whether it is present or not; of class numbers their probabilities.
    """
    z = encoded_sites(program, x, y, num_samples=num_samples, seed=seed)
    if (layout := layout_of(program, x)) is not None:
        return _columns(program, layout, z, x, y, num_samples, seed)
    return _decoded(program, z, y, True, tuple(x.shape[1:]), seed, to_program(program, x))


def _columns(
    program: Program, layout: Layout, z: dict[str, Tensor], x: Tensor, y: Tensor | None, num: int | None, seed: int
) -> dict[str, Tensor]:
    """The mean of every column given latents, ``(N, *column)`` or ``(num, N, *column)``."""
    x, found = to_program(program, x), {}
    with evaluating(program), isolated(), seeded(derive_seed("reconstructed columns", seed), x.device):
        model = run(program.model, x, y_to_program(program, y), num_samples=num, at=z)
        for column in layout.columns:
            if column.name not in layout.sites:
                continue
            fn = model.nodes[column.name].get("whole", model.nodes[column.name]["fn"])
            mean = expected(fn)
            rows, own = fn.batch_shape, mean.shape[len(fn.batch_shape) + len(fn.event_shape) :]
            leading = (len(x),) if num is None else (num, len(x))
            found[column.name] = mean.reshape(*rows, *column.shape, *own).expand(*leading, *column.shape, *own)
    return found


def _require_count(what: str, num_samples: int) -> None:
    if num_samples < 1:
        raise UserError(f"{what}: expected num_samples of at least 1, got {num_samples}")


def prior_trace(
    program: Program, batch: int, y: Tensor | None, event_shape: tuple[int, ...], x: Tensor | None = None, **how: Any
) -> Traced:
    """:func:`run` of the model on an empty x, where there is none: nothing but its shape, device and dtype is read."""
    if x is None:
        x = data_among(program, y_to_program(program, y))
    if x is None:
        device, dtype = place_of(program)
        x = torch.zeros(batch, *event_shape, device=device, dtype=dtype)
    try:
        return run(program.model, x, y_to_program(program, y), **how)
    except (UserError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
        beside = "" if y is None else f" and y of shape {tuple(y.shape)}, {str(y.dtype).removeprefix('torch.')}"
        raise UserError(
            f"the model of {type(program).__name__} does not run on {batch} rows of event_shape {tuple(event_shape)}{beside}: "
            f"{said(error, 240)}"
        ) from error


def _observation(traced: Traced, mean: bool, leading: tuple[int, ...], event_shape: tuple[int, ...]) -> Tensor:
    """Data of the site x ``(*leading, *event_shape)``; the site may see a datum flattened."""
    fn = traced.nodes[observation(traced)]["fn"]
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
    try:
        found: Tensor = mean_of(fn) if mean else fn.sample()
    except RuntimeError as error:
        program = admitted().program
        name = program.data_name(program.constants) if isinstance(program, Adopted) else "x"
        raise UserError(
            f"the model's {type(innermost(fn)).__name__} cannot be drawn from ({said(error, 120)}): a total count that it reads "
            "from the batch is 0 where there are no data; hand over rows that have one, under the name of the data: "
            f"pv.adopt(program) and inputs={{{name!r}: x}}"
        ) from error
    if bool(found.isnan().any()):
        raise UserError(
            "the model makes data that are NaN: expected latents, y and parameters that are finite; look for missing ones there"
        )
    return found.reshape(*rows, *event_shape).expand(*leading, *event_shape)
