"""What a model says of latents that are given: their log-densities, and the data they would make."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pyro_vae.programs.columns import layout_of
from pyro_vae.programs.latents import expected, mean_of
from pyro_vae.programs.trace import (
    OBSERVED,
    Program,
    Traced,
    evaluating,
    isolated,
    latent_values,
    log_probs,
    observation,
    run,
    sum_log_prob,
)
from pyro_vae.programs.walk import at_once, spans
from pyro_vae.seeding import derive_seed, seeded

Arrays = dict[str, np.ndarray]
Groups = dict[str, Arrays]  # of a tree


def draw_from_guide(program: Program, x: Tensor, y: Tensor | None, num_samples: int, seed: int) -> Groups:
    """Joint draws of the model's latents from the guide, as :func:`score` gives them; and log q(z | x), as ``log_guide``.

    Auxiliary sites of the guide count in its density, and are not returned.
    """
    found = []
    with evaluating(program), isolated():
        for span, size in parts(num_samples, x):
            with seeded(derive_seed("draws of the guide", seed, span.start), x.device):
                guide = run(program.guide, x, y, num_samples=size)
            scored = _scored(run(program.model, x, y, num_samples=size, at=guide), size, x)
            found.append({**scored, "log_guide": {OBSERVED: host(sum_log_prob(guide, size, len(x)))}})
    return {group: concatenated([part[group] for part in found]) for group in found[0]}


def draw_from_prior(program: Program, x: Tensor, y: Tensor | None, num_samples: int, seed: int) -> Arrays:
    """Draws of every latent from the model, ``(num_samples, batch, *latent)`` by site; of x the shape is used."""
    values: list[Arrays] = []
    with evaluating(program), isolated():
        for span, size in parts(num_samples, x):
            with seeded(derive_seed("draws of the prior", seed, span.start), x.device):
                traced = run(program.model, x, y, num_samples=size)
            values.append({n: host(v) for n, v in latent_values(traced, size, len(x)).items()})
    return concatenated(values)


def score(program: Program, x: Tensor, y: Tensor | None, latents: Arrays) -> Groups:
    """Latents ``(num_samples, batch, *latent)`` by site with their log-densities ``(num_samples, batch)``, as groups of a tree.

    ``log_likelihood`` is log p(x | z) with the model's factors, as in :class:`pyro_vae.programs.trace.Terms`; ``log_prior`` the
    log-density of each latent site given those before it.
    """
    found = [_scored(traced, size, x) for traced, size in _traces(program, x, y, latents)]
    return {group: concatenated([part[group] for part in found]) for group in found[0]}


def _scored(model: Traced, size: int, x: Tensor) -> Groups:
    latents, terms = latent_values(model, size, len(x)), log_probs(model)
    log_likelihood = sum((t for n, t in terms.items() if n not in latents), x.new_zeros(size, len(x)))
    return {
        "posterior": {n: host(v) for n, v in latents.items()},
        "log_likelihood": {OBSERVED: host(log_likelihood)},
        "log_prior": {n: host(terms[n].expand(size, len(x))) for n in latents},
    }


def predict(program: Program, x: Tensor, y: Tensor | None, latents: Arrays, *, mean: bool, seed: int) -> Arrays:
    """For each latent a draw from p(x | z), or its mean: ``(num_samples, batch, *event)`` by site; of x the shape is used.

    Of a record, of every column that is a site, whether it is present or not; in the place of the mean of class numbers stand
    the probabilities of the classes.
    """
    found, layout = [], layout_of(program, x)
    for index, (traced, size) in enumerate(_traces(program, x, y, latents)):
        if layout is None:
            shapes = {observation(traced): tuple(x.shape[1:])}
        else:
            shapes = {c.name: c.shape for c in layout.columns if c.name in layout.sites}
        values = Arrays()
        with seeded(derive_seed("predictions", seed, index), x.device):
            for name, shape in shapes.items():
                fn = traced.nodes[name].get("whole", traced.nodes[name]["fn"])
                value = expected(fn) if mean and layout is not None else mean_of(fn) if mean else fn.sample()
                own = value.shape[len(fn.batch_shape) + len(fn.event_shape) :]
                values[name] = host(value.reshape(*fn.batch_shape, *shape, *own).expand(size, len(x), *shape, *own))
        found.append(values)
    return concatenated(found)


def parts(num_samples: int, x: Tensor) -> Iterator[tuple[slice, int]]:
    """The samples that are drawn in one pass for all of x, and how many they are."""
    return ((s, s.stop - s.start) for s in spans(num_samples, at_once("posterior draws", math.prod(x.shape))))


def _traces(program: Program, x: Tensor, y: Tensor | None, latents: Arrays) -> Iterator[tuple[Traced, int]]:
    for span, size in parts(len(next(iter(latents.values()))), x):
        values = {n: torch.from_numpy(v[span]).to(x.device) for n, v in latents.items()}
        with evaluating(program), isolated():
            with seeded(
                derive_seed("what no latent says", span.start), x.device
            ):  # entries of records that are missing
                traced = run(program.model, x, y, num_samples=size, at=values)
            yield traced, size


def concatenated(arrays: list[Arrays], axis: int = 0) -> Arrays:
    """Arrays by name, joined along an axis."""
    return {name: np.concatenate([part[name] for part in arrays], axis) for name in arrays[0]}


def host(tensor: Tensor) -> np.ndarray:
    """A tensor as an array on the host, in its dtype (bfloat16, which NumPy lacks, in float32)."""
    tensor = tensor.detach().cpu().resolve_neg()
    return np.ascontiguousarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())
