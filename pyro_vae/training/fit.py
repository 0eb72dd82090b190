"""Train a Program by SVI."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch.utils.data import TensorDataset

from pyro_vae import memory, registry
from pyro_vae.data import Data
from pyro_vae.data.columned import for_program
from pyro_vae.data.given import given
from pyro_vae.data.names import SPLITS
from pyro_vae.data.record import Record, record_of
from pyro_vae.errors import DataError, UserError, warn
from pyro_vae.evaluation.degenerate import DegenerateFitWarning, degenerate
from pyro_vae.inductor import usable_cache
from pyro_vae.objectives.own import OwnObjective
from pyro_vae.paths import expanded
from pyro_vae.precision import require_precision
from pyro_vae.programs.adopted import take_dtype
from pyro_vae.programs.columns import layout_of, packed, placed
from pyro_vae.programs.contract import require_gradients, require_program
from pyro_vae.programs.door import with_inputs
from pyro_vae.programs.given import require_rows
from pyro_vae.programs.labels import needs_y, takes_y
from pyro_vae.programs.trace import dtype_of
from pyro_vae.seeding import derive_seed, seeded
from pyro_vae.signatures import checked
from pyro_vae.spec import validated
from pyro_vae.training.admission import admit
from pyro_vae.training.checkpoint import resume_from, save_checkpoint
from pyro_vae.training.devices import resolve_device
from pyro_vae.training.distributed import join, restarted
from pyro_vae.training.due import Due
from pyro_vae.training.files import write_text
from pyro_vae.training.kept import keep, read_content
from pyro_vae.training.loop import Trainer
from pyro_vae.training.progress import Progress
from pyro_vae.training.rehearsal import require_kept
from pyro_vae.training.run import (
    SPEC,
    WEIGHTS,
    Run,
    claimed,
    create,
    discard,
    make_record,
    read_record,
    remember_parent,
    remember_shape,
    require_free,
    take_recorded,
)
from pyro_vae.training.settings import BEFORE, FUNCTION, Settings, parse_objective
from pyro_vae.training.source import Source, make_source
from pyro_vae.training.standardize import rows_of, standardized
from pyro_vae.training.tensorboard import tensorboard as event_files

Callback = Callable[[dict[str, Any]], Any]
LOOKED_AT = 500  # training rows, evenly spaced
SETTLED = 500  # steps: after fewer, latents that tell nothing of the data are only untrained


@checked
def fit(
    program: Any,
    data: Any,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    out: str | Path | None = None,
    device: str | torch.device = "auto",
    resume: bool = False,
    callback: Callback | None = None,
    progress: bool = False,
    inputs: Any = None,
    validation: float | None = None,
    checkpoint_epochs: int | None = None,
    checkpoint_minutes: float | None = None,
    tensorboard: bool | str | Path = False,
    **settings: Any,
) -> Run:
    """Train a program in place by stochastic variational inference, and keep its best weights, or the last.

    Args:
        program: any Program: what :func:`pyro_vae.build` returns, or a module of yours with ``model(x)`` and ``guide(x)``.
        data: a data set of :func:`pyro_vae.load_data`, or its path; a tensor ``(N, *event)``, array, DataFrame, sparse matrix or
            list, or ``(x, y)`` of two, all of whose rows train; or a map-style ``torch.utils.data.Dataset`` (or a DataLoader of
            one) whose items are x, or start with x; or a :class:`pyro_vae.Record`, a dict of tensors, or a Dataset of dicts of
            columns, which is read whole.
        epochs: passes over the training rows, 50 unless ``steps`` is given.
        steps: optimizer steps, instead of epochs.
        out: the run directory to write; None to keep everything in memory.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``mps``, or a ``torch.device``; the program is moved
            there and stays.
        resume: go on from the checkpoint in ``out``, which must have been made with the same settings; but with more ``epochs``
            a run goes on beyond its end, with the rates that the schedule has in a run of that length.
        callback: called with the metrics of every epoch; training stops early where it returns True. It may change the
            program (an attribute, what requires a gradient, a submodule): the next epoch trains it as it then is.
        progress: draw a progress bar with the current ELBO on standard error.
        inputs: of an adopted program, tensors with a row for each row of data by the name of their argument.
        validation: of a tensor or array, how many rows, or which share of them, are held back to choose the weights by.
        checkpoint_epochs, checkpoint_minutes: how often a checkpoint is made; as often as it costs little where both are None.
        tensorboard: write the metrics as TensorBoard event files into ``out/tensorboard``, or into the folder given.
        settings: any field of :class:`pyro_vae.training.settings.Settings`: ``batch_size``, ``lr``, ``objective``, ``schedule``,
            ``optimizer``, ``clip_norm``, ``skip_gradients``, ``accumulate``, ``average``, ``patience``, ``keep``,
            ``standardize``, ``compile``, ``precision``, ``seed``. ``objective`` and ``schedule`` may be functions.

    Returns:
        The run; ``run.program is program``.

    Raises:
        UserError: data that the likelihood or a network cannot take, a setting out of range, an output directory that
            cannot be used.
        NumericalError: a loss or gradient became NaN or infinite: at which step, site and parameter; the last checkpoint
            is kept, and the program is left as it was before.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the step under way and a checkpoint; ``.status`` is the exit status that
            is usual. A second one ends at once.

    What is frozen (``requires_grad``) stays so. Submodules in evaluation mode stay in it, unless all are; modes are put back.

    Warns:
        DegenerateFitWarning: a fit of 500 steps or more has collapsed, or is nonsense: see :mod:`pyro_vae.evaluation.degenerate`.

    Under ``torchrun`` every process calls this with the same arguments; each takes its slice of every batch.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.build("ppca", "linear", (3,), latent_dim=2)
        >>> run = pv.fit(vae, torch.randn(100, 3), epochs=2, batch_size=50)
        >>> len(run.metrics)
        2
    """
    require_program(program)
    require_gradients(program)
    whole = record_of(data)
    data = _packed(program, whole)
    if inputs is not None:
        data = _beside(program, data, inputs)
    take_dtype(program, data.tensors[0] if isinstance(data, TensorDataset) else data)
    if callback is not None and not callable(callback):
        raise UserError(f"expected callback to be a function of an epoch's metrics, got {type(callback).__name__}")
    due = Due(checkpoint_epochs, checkpoint_minutes)
    if out is not None and not isinstance(out, (str, os.PathLike)):
        raise UserError(f"expected out to be the path of a run directory, got {type(out).__name__}")
    if epochs is not None and steps is not None:
        raise UserError("give epochs or steps, not both")
    ranks, path = join(), expanded(out).absolute() if out is not None else None
    callback = _watching(callback, tensorboard, path) if ranks.first else callback
    if path is not None and restarted() and ranks.shared((path / SPEC).is_file()):
        resume = True
    if resume and path is None:
        raise UserError("resume needs out, the run directory to go on from")
    old = read_record(path) if resume and path is not None else {}
    settings = {**{k: v for k, v in BEFORE.items() if old and k not in old.get("training", {})}, **settings}
    if "objective" in settings:
        parse_objective(settings["objective"])  # whose errors name the objective
    chosen = validated(
        Settings, {"epochs": None if steps else epochs if epochs is not None else 50, "steps": steps, **settings}, "fit"
    )
    target = resolve_device(device)
    require_precision(chosen.precision, target, dtype_of(program))
    require_kept(program)
    data = given(data, validation)
    whole, data = (data, _columned(program, data)) if isinstance(data, Data) else (whole, data)
    if isinstance(data, torch.Tensor):
        require_rows(data, program)
    source = make_source(data, takes_y(program), target, dtype_of(program), needs_y(program))
    objective = _objective(chosen, settings.get("objective"))
    schedule = _schedule(chosen, settings.get("schedule"))
    batch = max(1, min(chosen.batch_size, source.num_rows) // ranks.size)
    program.to(target)
    if old:
        take_recorded(program, old)
    with usable_cache(), nullcontext() if old else standardized(program, data, source, chosen.standardize, chosen.seed):
        event_shape, moving = admit(program, data, source, objective, batch)
        _require_possible(objective, chosen, ranks.size, batch, event_shape)
        if layout_of(program, rows_of(data)) is not None:  # of its own x, or how many numbers a row of all columns has
            own = whole.event_shape if isinstance(whole, Data) else event_shape[-1:]
            event_shape = tuple(getattr(program, "event_shape", None) or own)
        content = keep(whole if isinstance(whole, Data) else data)
        record = make_record(program, event_shape, data, chosen, content)
        trainer = Trainer(
            program, source, chosen, objective, target, path, ranks, moving=moving, schedule=schedule,
            due=due,
        )  # fmt: skip
        if chosen.patience is not None and trainer.validation is None:
            raise UserError(
                f"patience = {chosen.patience} needs a validation split to watch, and these data have none: leave patience out, "
                "or train on a data set of load_data with validation rows"
            )
        if path is not None and old:
            _require_same(record, old, path)
            recorded = read_content(path, old)
            if recorded is not None:
                recorded.require_same(content, f"cannot resume {path}: the data given")
                content, record["rows"] = recorded, old.get("rows", record["rows"])
            record.pop("lineage", None)
            record |= {"lineage": old["lineage"]} if "lineage" in old else {}
        elif path is not None and ranks.first:
            require_free(path)
    with usable_cache(), claimed(path) if path is not None and ranks.first else nullcontext():
        if path is not None and resume:
            resume_from(path, trainer)
            if old and ranks.first and extended(record, old):
                write_text(path / SPEC, tomli_w.dumps(record))
        elif path is not None and ranks.first:
            create(path, record, content, lambda: save_checkpoint(path, trainer))
        if layout_of(program, rows_of(data)) is None:
            remember_shape(program, event_shape)
        take_recorded(program, record)
        try:
            with Progress(trainer.total_steps, trainer.step, visible=progress and ranks.first) as bar:
                trainer.run(bar, callback)
        except DataError:  # of a row that is looked at when it is read
            if path is not None and ranks.first and not resume and not trainer.metrics:
                discard(path)
            raise
    if path is not None and ranks.first and (path / WEIGHTS).is_file():
        remember_parent(program, path)
    if ranks.first and trainer.step >= SETTLED:
        _say_what_degenerated(program, source, target, chosen.seed)
    return Run(
        program,
        path,
        record,
        trainer.metrics,
        content,
        trainer.noise,
        whole if isinstance(whole, Data | Record) else data,
    )


def _packed(program: Any, data: Any) -> Any:
    """A record as the tensor that stands for it."""
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Mapping | Record):
        return _packed(program, record_of(data[0])), data[1]
    return packed(program, data) if isinstance(data, Record) else data


def _columned(program: Any, data: Data) -> Data:
    """A data set whose rows are records, or are such for this program, as tensors that stand for them."""
    data = for_program(program, data)
    if data.columns is None:
        return data
    parts: dict[str, Any] = {s: placed(program, data.columns, data.stored(s)[:]) for s in SPLITS}
    return replace(data, **parts)


def _say_what_degenerated(program: Any, source: Source, device: torch.device, seed: int) -> None:
    """Warn of latents that tell nothing of the training data, or of which nothing is made."""
    count = min(source.num_rows, LOOKED_AT)
    with seeded(derive_seed("rows of a finished fit", seed), device):
        x, y = source.batch(torch.arange(count) * source.num_rows // count)
    for line in degenerate(program, x, y, seed=seed):
        warn(line, DegenerateFitWarning)


def _beside(program: Any, data: Any, inputs: Any) -> TensorDataset:
    """Rows of data with inputs in the place of y."""
    tensors = data.tensors if isinstance(data, TensorDataset) else (data,)
    if not 1 <= len(tensors) <= 2 or not isinstance(tensors[0], torch.Tensor):
        raise UserError(f"inputs go beside a tensor of data, or a TensorDataset of x and y, got {type(data).__name__}")
    return TensorDataset(tensors[0], with_inputs(program, tensors[1] if len(tensors) == 2 else None, inputs))


def _require_possible(objective: Any, chosen: Settings, size: int, batch: int, event_shape: tuple[int, ...]) -> None:
    if (size > 1 or chosen.accumulate > 1) and objective.compares_images:
        raise UserError(
            f"the objective {chosen.objective.name!r} compares the images of a batch with each other, and cannot be cut into "
            "slices: train it in one process, without accumulate"
        )
    rows = batch * int(getattr(objective, "num_particles", 1))
    memory.require(4 * rows * math.prod(event_shape), f"a step of {rows:,} images times particles")


def _objective(settings: Settings, given: Any = None) -> Any:
    block = settings.objective
    if block.name == FUNCTION:
        if not callable(given):
            raise UserError(f"the objective was a function, {block.options['of']}: hand it over, objective=")
        return OwnObjective(given)
    return registry.get("objectives", block.name)(**registry.validate("objectives", block.name, block.options))


def _schedule(settings: Settings, given: Any) -> Callable[[int], float] | None:
    if settings.schedule.name != FUNCTION:
        return None
    if not callable(given):
        raise UserError(f"the schedule was a function, {settings.schedule.options['of']}: hand it over, schedule=")
    return given


def _watching(callback: Callback | None, tensorboard: bool | str | Path, path: Path | None) -> Callback | None:
    """The callback, and one that writes event files."""
    if not tensorboard:
        return callback
    if tensorboard is True and path is None:
        raise UserError("tensorboard=True writes into the run directory: give out, or a folder, tensorboard=...")
    write = event_files(
        path / "tensorboard" if tensorboard is True and path is not None else expanded(str(tensorboard))
    )

    def both(metrics: dict[str, Any]) -> Any:
        write(metrics)
        return None if callback is None else callback(metrics)

    return both


def extended(new: dict[str, Any], old: dict[str, Any]) -> bool:
    """Whether a run is to go on beyond its end; the lengths that it had before are then in its record."""
    before, now = (record.get("training", {}).get("epochs") for record in (old, new))
    if before is None or now is None or before == now:
        return False
    lineage = old.get("lineage", {})
    longer = lineage.get("epochs_before", [])
    new["lineage"] = {**lineage, "epochs_before": [*(longer if isinstance(longer, list) else []), before]}
    return True


def _require_same(new: dict[str, Any], old: dict[str, Any], path: Path) -> None:
    for table in ("program", "model", "guide", "data", "training"):
        now, then = new.get(table) or {}, {**(BEFORE if table == "training" else {}), **(old.get(table) or {})}
        longer = table == "training" and (then.get("epochs") or math.inf) < (now.get("epochs") or 0)
        for key in sorted(set(now) | set(then)):
            if now.get(key) != then.get(key) and not (longer and key == "epochs"):
                raise UserError(
                    f"cannot resume {path}: {table}.{key} was {then.get(key)!r} and is now {now.get(key)!r}; give the same "
                    "settings (more epochs are taken), or another --out; the program of pv.load (--from) "
                    "begins with the weights"
                )
