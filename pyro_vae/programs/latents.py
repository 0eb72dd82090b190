"""Through a program and back: encode, decode, sample and reconstruct, for any Program."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.errors import UserError
from pyro_vae.programs.contract import (
    OBSERVED,
    SAMPLE_PLATE,
    Program,
    Traced,
    arguments,
    device_of,
    dtype_of,
    evaluating,
    is_random,
    isolated,
    latent_sites,
    require_program,
)
from pyro_vae.seeding import derive_seed, seeded

MEAN_DRAWS = 64  # draws that stand in for the mean of a distribution that has no closed form for it
Latents = Tensor | dict[str, Tensor]


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


def to_program(program: Any, x: Tensor) -> Tensor:
    """The tensor x on the program's device; integers and other floats in its dtype."""
    return x.to(device=device_of(program), dtype=dtype_of(program))


def encode(
    program: Program, x: Tensor, y: Tensor | None = None, *, num_samples: int | None = None, seed: int = 0
) -> Latents:
    """The latents that the guide gives to x.

    Args:
        program: any Program.
        x: data ``(N, *event)``.
        y: what a conditional program is conditioned on.
        num_samples: draws per image; None for the mean of each site given the means of those before it.
        seed: of the draws; torch's generators are put back.

    Returns:
        ``(N, *latent)``, with draws ``(num_samples, N, *latent)``; for several latent sites a dict of these by name.
    """
    require_program(program)
    args = arguments(to_program(program, x), y)
    with evaluating(program), isolated(), seeded(derive_seed("encoded latents", seed), device_of(program)):
        if num_samples is None:
            with AtValues({}, default=mean_of):
                traced = poutine.trace(program.guide).get_trace(*args)
        else:
            with pyro.plate(SAMPLE_PLATE, num_samples, dim=-2):
                traced = poutine.trace(program.guide).get_trace(*args)
    return _one_or_dict({n: s["value"] for n, s in latent_sites(traced).items()})


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
    """
    require_program(program)
    device, dtype = device_of(program), dtype_of(program)
    event_shape = event_shape_of(program, event_shape)
    with evaluating(program), isolated(), seeded(derive_seed("decoded data", seed), device):
        names = latent_sites(_prior_trace(program, 1, y[:1] if y is not None else None, event_shape))
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
        if tuple(value.shape[len(leading) :]) != tuple(event) or len(leading) not in (1, 2):
            raise UserError(
                f"decode: expected {name!r} of shape (N, {', '.join(map(str, event))}), got {tuple(value.shape)}"
            )
        with AtValues(values):
            if len(leading) == 2:
                with pyro.plate(SAMPLE_PLATE, leading[0], dim=-2):
                    traced = _prior_trace(program, leading[1], y, event_shape)
            else:
                traced = _prior_trace(program, leading[0], y, event_shape)
        return _observation(traced, mean, (*leading, *event_shape))


def sample(
    program: Program,
    num_samples: int = 64,
    y: Tensor | None = None,
    *,
    mean: bool = False,
    event_shape: Any = None,
    seed: int = 0,
) -> Tensor:
    """Draws ``(num_samples, *event)`` from the model: z from the prior, then x from p(x | z), or its mean."""
    require_program(program)
    if num_samples < 1:
        raise UserError(f"sample: expected num_samples of at least 1, got {num_samples}")
    event_shape = event_shape_of(program, event_shape)
    with evaluating(program), isolated(), seeded(derive_seed("sampled data", seed), device_of(program)):
        traced = _prior_trace(program, num_samples, y, event_shape)
        return _observation(traced, mean, (num_samples, *event_shape))


def sample_latents(
    program: Program, num_samples: int, y: Tensor | None = None, *, event_shape: Any = None, seed: int = 0
) -> dict[str, Tensor]:
    """Draws of every latent site from the prior, ``(num_samples, *latent)`` each, by name."""
    require_program(program)
    event_shape = event_shape_of(program, event_shape)
    with evaluating(program), isolated(), seeded(derive_seed("latents of the prior", seed), device_of(program)):
        traced = _prior_trace(program, num_samples, y, event_shape)
    return {n: s["value"] for n, s in latent_sites(traced).items()}


def sample_latents_like(program: Program, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
    """A draw of every latent site from the prior for each row of x, with gradients off, from the generators as they stand."""
    with isolated(), torch.no_grad():
        traced = poutine.trace(program.model).get_trace(*arguments(x, y))
    return {n: s["value"] for n, s in latent_sites(traced).items()}


def reconstruct(
    program: Program, x: Tensor, y: Tensor | None = None, *, num_samples: int | None = None, seed: int = 0
) -> Tensor:
    """The mean of p(x | z) at the guide's mean ``(N, *event)``, or at draws from it ``(num_samples, N, *event)``."""
    z = encode(program, x, y, num_samples=num_samples, seed=seed)
    return decode(program, z, y, event_shape=tuple(x.shape[1:]), seed=seed)


def _prior_trace(program: Program, batch: int, y: Tensor | None, event_shape: tuple[int, ...]) -> Traced:
    """The model on an empty x: nothing but its shape, device and dtype is read."""
    x = torch.zeros(batch, *event_shape, device=device_of(program), dtype=dtype_of(program))
    return poutine.trace(program.model).get_trace(*arguments(x, y))


def _observation(traced: Traced, mean: bool, shape: tuple[int, ...]) -> Tensor:
    fn = traced.nodes[OBSERVED]["fn"]
    return (mean_of(fn) if mean else fn.sample()).expand(shape)


def event_shape_of(program: Any, event_shape: Any) -> tuple[int, ...]:
    """The shape of a datum: the one given, or what the program says; :class:`UserError` where neither is."""
    shape = event_shape if event_shape is not None else getattr(program, "event_shape", None)
    if shape is None:
        raise UserError(
            f"{type(program).__name__} does not say the shape of a datum: set program.event_shape or pass event_shape="
        )
    return tuple(int(n) for n in shape)


def _one_or_dict(values: dict[str, Tensor]) -> Latents:
    return next(iter(values.values())) if len(values) == 1 else values
