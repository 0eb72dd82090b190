"""The figures of ``evaluate --method ais`` and ``--method bdmc``: those of importance weighting, and what annealing adds."""

from __future__ import annotations

import time
from typing import Any

from pyro_vae.data import Data
from pyro_vae.evaluation import consistency
from pyro_vae.evaluation.ais import AnnealedLogLikelihood, annealed_log_likelihood, guide_bound
from pyro_vae.evaluation.anneal import Checkpoint, Progress
from pyro_vae.evaluation.bdmc import bidirectional
from pyro_vae.evaluation.evaluate import ACTIVE_IMAGES, active_units, bits_per_dim, chosen_rows, y_of
from pyro_vae.evaluation.path import Start
from pyro_vae.programs.contract import Program
from pyro_vae.seeding import derive_seed


def evaluate_annealed(
    program: Program,
    data: Data,
    *,
    split: str = "test",
    limit: int | None = None,
    num_chains: int = 16,
    num_distributions: int = 1000,
    num_leapfrog: int = 10,
    start: Start = "prior",
    seed: int = 0,
    simulated: bool = False,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
    simulated_checkpoint: Checkpoint | None = None,
) -> tuple[dict[str, Any], AnnealedLogLikelihood]:
    """NLL of a split by annealing, with everything that stands beside it.

    Args:
        program: any Program with continuous latents.
        data: the data set it was trained on, prepared as it was then.
        split: ``train``, ``validation`` or ``test``.
        limit: evaluate a random subset of so many images, the same for every program.
        num_chains, num_distributions, num_leapfrog, start, seed: see
            :func:`~pyro_vae.evaluation.ais.annealed_log_likelihood`.
        simulated: also sandwich log p(x) of as many images simulated from the model, by bidirectional Monte Carlo.
        progress: called with images' worth of work done; adds up to the number of images, twice that if ``simulated``.
        checkpoint, simulated_checkpoint: where to keep and find unfinished work.

    Returns:
        The figures of ``evaluate --json``, undefined ones None, and the per-image result they were made of.
    """
    begin = time.perf_counter()
    rows = chosen_rows(len(data.stored(split)), limit)
    x = data.observed(split, rows=rows)
    y = y_of(program, data, split, rows)
    train_rows = chosen_rows(len(data.train), ACTIVE_IMAGES)
    train_y = y_of(program, data, "train", train_rows)
    how: dict[str, Any] = {
        "num_chains": num_chains,
        "num_distributions": num_distributions,
        "num_leapfrog": num_leapfrog,
        "start": start,
        "seed": seed,
        "progress": progress,
    }
    result = annealed_log_likelihood(program, x, y, checkpoint=checkpoint, **how)
    figures = result.summary()
    if simulated:
        bounds = bidirectional(
            program, len(x), y, event_shape=tuple(x.shape[1:]), checkpoint=simulated_checkpoint, **how
        )
        weighted = guide_bound(program, bounds.x, y, derive_seed("importance weights of simulated data", seed))
        claims = consistency.of_bounds(bounds.lower, bounds.upper, weighted.log_likelihood)
        against = consistency.forbidden(claims)
        consistency.warn([message for message in against if message not in bounds.warnings], stacklevel=2)
        figures |= bounds.summary() | {"method": "bdmc", "warnings": [*against, *figures["warnings"]]}
    figures |= {
        "bits_per_dim": bits_per_dim(program, data, result.nll, x[:2], None if y is None else y[:2]),
        "active_units": active_units(program, data.observed("train", rows=train_rows), train_y),
        "split": split,
        "binarization": data.binarization,
        "dequantization": data.dequantization,
        "seed": seed,
        "chunk_size": result.chunk_size,
        "seconds": round(time.perf_counter() - begin, 3),
    }
    return figures, result
