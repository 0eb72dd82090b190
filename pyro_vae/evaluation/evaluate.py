"""Everything that is reported of a program on a split of a data set, as plain numbers."""

from __future__ import annotations

import math
import time
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_vae.data import Data
from pyro_vae.data.alike import columns_like, observed_like
from pyro_vae.data.columned import for_program, in_columns
from pyro_vae.data.given import as_data
from pyro_vae.data.preparation import published_generator
from pyro_vae.errors import UserError
from pyro_vae.evaluation import consistency
from pyro_vae.evaluation.activity import told, unit_activity
from pyro_vae.evaluation.ais import annealed_log_likelihood, guide_bound
from pyro_vae.evaluation.anneal import Checkpoint, Progress
from pyro_vae.evaluation.bdmc import bidirectional
from pyro_vae.evaluation.degenerate import degenerate
from pyro_vae.evaluation.importance import log_likelihood
from pyro_vae.evaluation.layers import collapsed_layers, kl_of_layers
from pyro_vae.evaluation.methods import Annealing, ImportanceSampling, taking
from pyro_vae.evaluation.result import LogLikelihood
from pyro_vae.programs.columns import layout_of, taken
from pyro_vae.programs.door import admitted, door
from pyro_vae.programs.labels import needs_y, takes_y
from pyro_vae.programs.trace import Program, observations
from pyro_vae.seeding import derive_seed
from pyro_vae.signatures import checked

ACTIVE_IMAGES = 500
SUBSET_SEED = 20_140_414  # of --limit: the same images for every run


@checked
@taking(ImportanceSampling)
def evaluate(
    program: Program,
    data: Any,
    *,
    method: ImportanceSampling | Annealing | None = None,
    split: str = "test",
    limit: int | None = None,
    simulated: bool = False,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
    simulated_checkpoint: Checkpoint | None = None,
    **options: Any,
) -> tuple[dict[str, Any], LogLikelihood]:
    """NLL of a split by importance sampling, or by annealing, with everything that stands beside it.

    Args:
        program: any Program; with continuous latents for annealing.
        data: the data set it was trained on, prepared as it was then; of a tensor, array, table or Dataset all rows are the
            test split.
        method: how log p(x) is estimated, with its options; the data are drawn with a seed of their own.
        split: ``train``, ``validation`` or ``test``.
        limit: evaluate a random subset of so many images, the same for every program.
        simulated: of annealing: also sandwich log p(x) of as many images simulated from the model, by bidirectional Monte Carlo.
        progress: called with images' worth of work done; adds up to the number of images, twice that if ``simulated``.
        checkpoint, simulated_checkpoint: of annealing: where to keep and find unfinished work.
        options: those of :func:`log_likelihood`, in place of ``method``.

    Returns:
        The figures of ``evaluate --json``, undefined ones None, and the per-image result they were made of.
    """
    start = time.perf_counter()
    data = for_program(program, as_data(data))
    if method is not None and options:
        raise UserError(f"give {next(iter(options))} to the method, as an option of {type(method).__name__}")
    method = ImportanceSampling(**options) if method is None else method
    if not isinstance(method, ImportanceSampling | Annealing):
        got = type(method).__name__
        raise UserError(f"expected method as ImportanceSampling(...) or Annealing(...), got {got}")
    if isinstance(method, ImportanceSampling) and (simulated or checkpoint or simulated_checkpoint):
        raise UserError("simulated images and checkpoints are for annealing: give method=Annealing(...)")
    if simulated and data.columns is not None:
        raise UserError(
            "which entries of a simulated row are missing, no model says: leave simulated out (bdmc) for records"
        )
    rows = chosen_rows(len(data.stored(split)), limit)
    x, y = rows_for(program, data, split, rows)
    train_rows = chosen_rows(len(data.train), ACTIVE_IMAGES)
    # before the work of hours, which what cannot be counted does not undo
    observed_train, y_train = rows_for(program, data, "train", train_rows)
    activity = told(unit_activity(program, observed_train, y_train))
    against: list[str] = []
    if isinstance(method, ImportanceSampling):
        result = log_likelihood(program, x, y, progress=progress, **vars(method))
    else:
        result = annealed_log_likelihood(program, x, y, progress=progress, checkpoint=checkpoint, **vars(method))
    figures = {"method": "iw"} | result.summary()
    if simulated and isinstance(method, Annealing):
        bounds = bidirectional(
            program, len(x), y, event_shape=tuple(x.shape[1:]), progress=progress, checkpoint=simulated_checkpoint,
            **vars(method),
        )  # fmt: skip
        weighted = guide_bound(program, bounds.x, y, derive_seed("importance weights of simulated data", method.seed))
        claims = consistency.of_bounds(bounds.lower, bounds.upper, weighted.log_likelihood)
        against = list(consistency.forbidden(claims))
        consistency.tell([message for message in against if message not in bounds.warnings])
        figures |= bounds.summary() | {"method": "bdmc"}
    degenerated = degenerate(program, observed_train, y_train, activity=activity, kl=float(result.kl.mean()))
    layers = kl_of_layers(program, x, y, seed=method.seed)
    figures |= {
        "bits_per_dim": bits_per_dim(program, data, result.nll, x[:2], None if y is None else y[:2]),
        "active_units": activity.counts,
        "kl_per_layer": layers,
        "warnings": [
            *against,
            *figures["warnings"],
            *activity.warnings,
            *degenerated,
            *collapsed_layers(activity, layers),
        ],
        "split": split,
        "binarization": data.binarization,
        "dequantization": data.dequantization,
        "seed": method.seed,
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
    if data.columns is not None:  # of different units
        return None
    dims = math.prod(data.event_shape)
    if gives_probabilities(program, x, y):
        return nll / (dims * math.log(2))
    if data.log_jacobian is not None:
        return (nll + data.log_jacobian) / (dims * math.log(2))
    return None


@door(scored=False, records=True)
def gives_probabilities(program: Program, x: Tensor, y: Tensor | None = None) -> bool:
    """Whether a program gives data, or all columns of a record, a probability, and not a density."""
    model = admitted().model
    return all(model.nodes[name]["fn"].support.is_discrete for name in observations(model))


def rows_for(program: Program, data: Data, split: str, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """These rows of a split as a program takes them, and y: the one place that gives rows, be they tensors or records.

    Args:
        program: the Program.
        data: as :func:`~pyro_vae.data.columned.for_program` makes them for it.
        split: ``train``, ``validation`` or ``test``.
        rows: their numbers ``(n,)``.

    Returns:
        x ``(n, *event)``, of records packed (:mod:`pyro_vae.programs.columns`), and y or None.
    """
    return taken(program, data.observed(split, rows=rows)), y_of(program, data, split, rows)


def rows_like(
    program: Program,
    ours: Data,
    theirs: Data,
    split: str,
    rows: Tensor | None = None,
    streams: Literal["place", "content"] = "place",
) -> tuple[Tensor, Tensor | None]:
    """Rows of other data as a program takes them, prepared as those of its run were, and y: for rows that are to be scored.

    Of a program that reads columns, and data that have none, the column beside x is missing: it is log p(x) that is asked for.

    Args:
        program: the Program.
        ours: how the data of its run were prepared (:meth:`pyro_vae.training.run.Run.prepared_like`).
        theirs: the other data.
        split: of theirs.
        rows: which of it; all where None.
        streams: what a row is prepared by where anything is drawn: its place, or its content.
    """
    index = torch.arange(len(theirs.stored(split))) if rows is None else rows
    how: dict[str, Any] = {"rows": index, "streams": streams}
    if theirs.columns:
        theirs = columns_like(ours, theirs)
    x = theirs.observed(split, **how) if theirs.columns else observed_like(ours, theirs, split, **how)
    shapes = getattr(program, "columns", None)
    if shapes and theirs.columns is None:
        whole = Data(theirs.name, x[:0], x[:0], x, levels=None)
        x = in_columns(whole, shapes, type(program).__name__, labelled=False).observed("test")
    return taken(program, x), y_of(program, theirs, split, index)


def comparable(program: Program, *parts: Tensor) -> tuple[Tensor, ...]:
    """Rows of several data as they are; of records the columns alone that no row of any lacks, whose log p compares.

    Raises:
        UserError: records that have no such column.
    """
    layouts = [layout_of(program, part) for part in parts]
    records = [layout.unpacked(part) for layout, part in zip(layouts, parts, strict=True) if layout is not None]
    if not records:
        return parts
    whole = [{n for n in r if bool(r.present[n].reshape(len(r), -1).any(1).all())} for r in records]
    names = set.intersection(*whole)
    if not names:
        raise UserError("no column is present in all rows of all data: log p of what is present does not compare")
    return tuple(taken(program, record.only(names)) for record in records)


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
