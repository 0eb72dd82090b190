"""What a model says of latents that are given: their log-densities, and the data they would make."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pyro_vae.programs.latents import mean_of
from pyro_vae.programs.trace import (
    OBSERVED,
    Program,
    Traced,
    evaluating,
    isolated,
    latent_sites,
    latent_values,
    log_probs,
    run,
    sum_log_prob,
)
from pyro_vae.programs.walk import at_once, spans
from pyro_vae.seeding import derive_seed, seeded

Arrays = dict[str, np.ndarray]


def draw_from_guide(
    program: Program, x: Tensor, y: Tensor | None, num_samples: int, seed: int
) -> tuple[Arrays, np.ndarray]:
    """Joint draws of the model's latents from the guide, ``(num_samples, batch, *latent)`` by site, and log q(z | x) of each.

    Auxiliary sites of the guide count in its density, and are not returned.
    """
    values: list[Arrays] = []
    log_guide: list[np.ndarray] = []
    with evaluating(program), isolated():
        with seeded(derive_seed("site names"), x.device):
            names = list(latent_sites(run(program.model, x, y)))
        for first, size in parts(num_samples, x):
            with seeded(derive_seed("draws of the guide", seed, first), x.device):
                traced = run(program.guide, x, y, num_samples=size)
            log_guide.append(host(sum_log_prob(traced, size, len(x))))
            drawn = latent_values(traced, size, len(x))
            values.append({n: host(drawn[n]) for n in names})
    return {n: np.concatenate([v[n] for v in values]) for n in names}, np.concatenate(log_guide)


def draw_from_prior(program: Program, x: Tensor, y: Tensor | None, num_samples: int, seed: int) -> Arrays:
    """Draws of every latent from the model, ``(num_samples, batch, *latent)`` by site; of x the shape is used."""
    values: list[Arrays] = []
    with evaluating(program), isolated():
        for first, size in parts(num_samples, x):
            with seeded(derive_seed("draws of the prior", seed, first), x.device):
                traced = run(program.model, x, y, num_samples=size)
            values.append({n: host(v) for n, v in latent_values(traced, size, len(x)).items()})
    return {n: np.concatenate([v[n] for v in values]) for n in values[0]}


def score(program: Program, x: Tensor, y: Tensor | None, latents: Arrays) -> tuple[np.ndarray, Arrays]:
    """log p(x | z) ``(num_samples, batch)``, and the log-density of each latent site given those before it, by name.

    Factors of the model count with the likelihood, as in :class:`pyro_vae.programs.trace.Terms`.
    """
    log_likelihood: list[np.ndarray] = []
    log_prior: list[Arrays] = []
    for traced, size in _traces(program, x, y, latents):
        terms, latent = log_probs(traced), latent_sites(traced)
        zero = x.new_zeros(size, len(x))
        log_likelihood.append(host(sum((t for n, t in terms.items() if n not in latent), zero)))
        log_prior.append({n: host(terms[n].expand(size, len(x))) for n in latent})
    joined = {n: np.concatenate([t[n] for t in log_prior]) for n in log_prior[0]}
    return np.concatenate(log_likelihood), joined


def predict(program: Program, x: Tensor, y: Tensor | None, latents: Arrays, *, mean: bool, seed: int) -> np.ndarray:
    """For each latent a draw from p(x | z), or its mean: ``(num_samples, batch, *event)``; of x the shape is used."""
    found = []
    for index, (traced, size) in enumerate(_traces(program, x, y, latents)):
        fn = traced.nodes[OBSERVED]["fn"]
        with seeded(derive_seed("predictions", seed, index), x.device):
            value = mean_of(fn) if mean else fn.sample()
        found.append(host(value.reshape(*fn.batch_shape, *x.shape[1:]).expand(size, *x.shape)))
    return np.concatenate(found)


def parts(num_samples: int, x: Tensor) -> Iterator[tuple[int, int]]:
    """(first, size) of the samples that are drawn in one pass for all of x."""
    for span in spans(num_samples, at_once("posterior draws", math.prod(x.shape))):
        yield span.start, span.stop - span.start


def _traces(program: Program, x: Tensor, y: Tensor | None, latents: Arrays) -> Iterator[tuple[Traced, int]]:
    num_samples = len(next(iter(latents.values())))
    for first, size in parts(num_samples, x):
        values = {n: torch.from_numpy(v[first : first + size]).to(x.device) for n, v in latents.items()}
        with evaluating(program), isolated():
            yield run(program.model, x, y, num_samples=size, at=values), size


def host(tensor: Tensor) -> np.ndarray:
    """A tensor as an array on the host, in its dtype (bfloat16, which NumPy lacks, in float32)."""
    tensor = tensor.detach().cpu().resolve_neg()
    return np.ascontiguousarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())
