"""Everything that is reported of a program on a split of a data set, as plain numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_vae.data import Data
from pyro_vae.data.given import as_data
from pyro_vae.data.preparation import published_generator
from pyro_vae.errors import UserError
from pyro_vae.evaluation.activity import told, unit_activity
from pyro_vae.evaluation.importance import log_likelihood
from pyro_vae.evaluation.result import LogLikelihood
from pyro_vae.programs.contract import check
from pyro_vae.programs.trace import OBSERVED, Program, needs_y, takes_y, to_program
from pyro_vae.signatures import checked

ACTIVE_IMAGES = 500
SUBSET_SEED = 20_140_414  # of --limit: the same images for every run


@checked
def evaluate(
    program: Program,
    data: Any,
    *,
    split: str = "test",
    num_samples: int = 5000,
    target_se: float | None = None,
    limit: int | None = None,
    seed: int = 0,
    chunk_size: int | None = None,
    precision: str = "full",
    noise: str = "random",
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, Any], LogLikelihood]:
    """Importance-weighted NLL of a split, with everything that stands beside it.

    Args:
        program: any Program.
        data: the data set it was trained on, prepared as it was then; of a tensor, array, table or Dataset all rows are the
            test split.
        split: ``train``, ``validation`` or ``test``.
        num_samples: K.
        limit: evaluate a random subset of so many images, the same for every program.
        seed: of the importance samples; the data are drawn with a seed of their own.
        target_se, chunk_size, precision, noise: see :func:`log_likelihood`.
        progress: called with the number of images after every block.

    Returns:
        The figures of ``evaluate --json``, and the per-image result they were made of.
    """
    start = time.perf_counter()
    data = as_data(data)
    rows = chosen_rows(len(data.stored(split)), limit)
    x = data.observed(split, rows=rows)
    y = y_of(program, data, split, rows)
    train_rows = chosen_rows(len(data.train), ACTIVE_IMAGES)
    # before the work of hours, which what cannot be counted does not undo
    observed_train = data.observed("train", rows=train_rows)
    activity = told(unit_activity(program, observed_train, y_of(program, data, "train", train_rows)))
    result = log_likelihood(
        program, x, y, num_samples=num_samples, target_se=target_se, seed=seed, chunk_size=chunk_size, precision=precision,
        noise=noise, progress=progress,
    )  # fmt: skip
    figures = result.summary()
    figures |= {
        "bits_per_dim": bits_per_dim(program, data, result.nll, x[:2], None if y is None else y[:2]),
        "active_units": activity.counts,
        "warnings": [*figures["warnings"], *activity.warnings],
        "split": split,
        "binarization": data.binarization,
        "dequantization": data.dequantization,
        "seed": seed,
        "chunk_size": result.chunk_size,
        "seconds": round(time.perf_counter() - start, 3),
    }
    return figures, result


def chosen_rows(num_rows: int, limit: int | None) -> Tensor:
    """All rows, or a random subset of ``limit`` rows by a fixed seed, in file order."""
    if num_rows == 0:
        raise UserError("the split has no rows: choose another --split")
    if limit is None or limit >= num_rows:
        return torch.arange(num_rows)
    if limit < 1:
        raise UserError(f"expected limit of at least 1, got {limit}")
    return torch.randperm(num_rows, generator=published_generator(SUBSET_SEED))[:limit].sort().values


def bits_per_dim(program: Program, data: Data, nll: float, x: Tensor, y: Tensor | None = None) -> float | None:
    """NLL in bits per dimension of the stored levels; None where a density was put on data with no levels to return to.

    A probability of levels needs no more than its unit; a density of dequantized data, p(levels) >= the integral over
    the bin, adds log(levels) per dimension (Theis, van den Oord & Bethge 2016, https://arxiv.org/abs/1511.01844).
    """
    dims = math.prod(data.event_shape)
    with torch.no_grad():
        support = check(program, to_program(program, x), y).model.nodes[OBSERVED]["fn"].support
    if support.is_discrete:
        return nll / (dims * math.log(2))
    if data.log_jacobian is not None:
        return (nll + data.log_jacobian) / (dims * math.log(2))
    return None


def active_units(program: Program, x: Tensor, y: Tensor | None = None) -> list[int | None]:
    """Per latent site, the units whose guide mean varies over the images x by more than 0.01; None where a site has no mean.

    A unit whose variance is not told from 0.01 by 1,024 draws per image is counted on the side its estimate falls, with a
    warning: see :func:`~pyro_vae.evaluation.activity.unit_activity`.
    Burda, Grosse & Salakhutdinov 2016, https://arxiv.org/abs/1509.00519, section 5.2: A_u = Cov_x(E_q[u | x]) > 0.01, over 500
    training images in their code.
    """
    return told(unit_activity(program, x, y)).counts


def y_of(program: Program, data: Data, split: str, rows: Tensor) -> Tensor | None:
    """What a program is given beside these rows: their labels, if it takes y and there are any; None for others.

    Raises:
        UserError: a program that cannot go without y, and data without labels.
    """
    if needs_y(program) or (takes_y(program) and data.labels.get(split) is not None):
        return labels_of(data, split, rows)
    return None


def labels_of(data: Data, split: str, rows: Tensor) -> Tensor:
    """What a conditional program is conditioned on: the labels of these rows; :class:`UserError` where there are none."""
    labels = data.labels.get(split)
    if labels is None:
        raise UserError(f"the program is conditional, model(x, y), and {data.name} has no labels")
    return labels[rows]
