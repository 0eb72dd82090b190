"""Train a Program by SVI."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from pyro_vae import memory, registry
from pyro_vae.data import Data
from pyro_vae.errors import DataError, UserError
from pyro_vae.precision import require_precision
from pyro_vae.programs.contract import check, check_observed, require_program, require_rows
from pyro_vae.programs.trace import Traces, device_of, dtype_of, needs_y, takes_y, to_program
from pyro_vae.seeding import ONE_THREAD
from pyro_vae.spec import parse_block, validated
from pyro_vae.training.checkpoint import resume_from, save_checkpoint
from pyro_vae.training.devices import resolve_device
from pyro_vae.training.distributed import join, restarted
from pyro_vae.training.kept import keep, read_content
from pyro_vae.training.loop import Trainer
from pyro_vae.training.progress import Progress
from pyro_vae.training.run import (
    FILES,
    SPEC,
    Run,
    claimed,
    create,
    make_record,
    read_record,
    remember_shape,
    require_free,
)
from pyro_vae.training.settings import Settings
from pyro_vae.training.source import Source, make_source

CHECKED_ELEMENTS = 2**22  # of data held to the likelihood's support at once
FEW = 8  # rows of a step that is tried before training
Callback = Callable[[dict[str, Any]], Any]


def fit(
    program: Any,
    data: Any,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    resume: bool = False,
    callback: Callback | None = None,
    progress: bool = False,
    **settings: Any,
) -> Run:
    """Train a program in place by stochastic variational inference, and keep its best weights.

    Args:
        program: any Program: what :func:`pyro_vae.build` returns, or a module of yours with ``model(x)`` and ``guide(x)``.
        data: a data set of :func:`pyro_vae.load_data`; a tensor ``(N, *event)``, all of whose rows train; or a map-style
            ``torch.utils.data.Dataset`` whose items are x, or start with x. Every row is held to the likelihood's support: before
            training, and those of a Dataset when they are first read. Labels are handed over as y to a program that takes it.
        epochs: passes over the training rows, 50 unless ``steps`` is given.
        steps: optimizer steps, instead of epochs.
        out: the run directory to write; None to keep everything in memory.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``mps``; the program is moved there and stays.
        resume: go on from the checkpoint in ``out``, which must have been made with the same settings.
        callback: called with the metrics of every epoch; training stops early where it returns True.
        progress: draw a progress bar with the current ELBO on standard error.
        settings: any field of :class:`pyro_vae.training.settings.Settings`: ``batch_size``, ``lr``, ``objective``, ``schedule``,
            ``optimizer``, ``clip_norm``, ``average``, ``patience``, ``compile``, ``precision``,
            ``seed``.

    Returns:
        The run; ``run.program is program``.

    Raises:
        UserError: data that the likelihood or a network cannot take, a setting out of range, an output directory that
            cannot be used.
        NumericalError: a loss or gradient became NaN or infinite: at which step, site and parameter; the last checkpoint
            is kept, and the program is left as it was before.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the step under way and a checkpoint; ``.status`` is the exit status that
            is usual. A second one ends at once.

    Under ``torchrun`` every process calls this with the same arguments; each takes its slice of every batch.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.build("ppca", "linear", (3,), latent_dim=2)
        >>> run = pv.fit(vae, torch.randn(100, 3), epochs=2, batch_size=50)
        >>> len(run.metrics)
        2
    """
    require_program(program)
    if epochs is not None and steps is not None:
        raise UserError("give epochs or steps, not both")
    if "objective" in settings:
        settings["objective"] = parse_block("objectives", settings["objective"])
    chosen = validated(
        Settings, {"epochs": None if steps else epochs if epochs is not None else 50, "steps": steps, **settings}, "fit"
    )
    target, ranks = resolve_device(device), join()
    require_precision(chosen.precision, target, dtype_of(program))
    path = Path(out) if out is not None else None
    if isinstance(data, torch.Tensor):
        require_rows(data, program)
    source = make_source(data, takes_y(program), target, dtype_of(program), needs_y(program))
    objective = _objective(chosen)
    event_shape = _admit(program.to(target), data, source, objective, chosen.batch_size)
    if ranks.size > 1 and getattr(objective, "compares_images", False):
        raise UserError(
            f"the objective {chosen.objective.name!r} compares the images of a batch with each other, and cannot be cut into "
            "slices: train it in one process"
        )
    rows = min(chosen.batch_size, source.num_rows) * int(getattr(objective, "num_particles", 1)) // ranks.size
    memory.require(4 * rows * math.prod(event_shape), f"a step of {rows:,} images times particles")
    content = keep(data)
    record = make_record(program, event_shape, data, chosen, content)
    trainer = Trainer(program, source, chosen, objective, target, path, ranks)
    if path is not None and restarted() and ranks.shared((path / SPEC).is_file()):
        resume = True
    if resume:
        if path is None:
            raise UserError("resume needs out, the run directory to go on from")
        old = read_record(path)
        _require_same(record, old, path)
        recorded = read_content(path, old)
        if recorded is not None:
            recorded.require_same(content, f"cannot resume {path}: the data given")
            content, record["rows"] = recorded, old.get("rows", record["rows"])
    elif path is not None and ranks.first:
        require_free(path)
    with claimed(path) if path is not None and ranks.first else nullcontext():
        if path is not None and resume:
            resume_from(path, trainer)
        elif path is not None and ranks.first:
            create(path, record, content, lambda: save_checkpoint(path, trainer))
        remember_shape(program, event_shape)
        with Progress(trainer.total_steps, trainer.step, visible=progress and ranks.first) as bar:
            try:
                trainer.run(bar, callback)
            except DataError:  # of a Dataset, whose items are read as it goes
                if path is not None and ranks.first and not resume and trainer.epoch == 0:
                    _remove(path)
                raise
    return Run(program, path, record, trainer.metrics, content)


def _objective(settings: Settings) -> Any:
    block = settings.objective
    return registry.get("objectives", block.name)(**registry.validate("objectives", block.name, block.options))


def _admit(program: Any, data: Any, source: Source, objective: Any, batch_size: int) -> tuple[int, ...]:
    """Hold a program to its contract and objective, and the data to the likelihood's support, before anything is written."""
    with ONE_THREAD, torch.random.fork_rng(devices=[] if not torch.cuda.is_available() else None):
        x, y = source.batch(torch.arange(min(FEW, source.num_rows)))
        traces = check(program, x, y)
        _examine(traces, source, x[0].numel())
        last = source.num_rows % batch_size or min(batch_size, source.num_rows)  # the smallest minibatch
        _try_step(program, objective, x[:last], None if y is None else y[:last], source.num_rows)
    if isinstance(data, Data) and data.levels and data.binarization == "none" and data.dequantization == "none":
        support = traces.model.nodes["x"]["fn"].support
        if not support.is_discrete:
            _warn_lattice(data)
    return tuple(x.shape[1:])


def _examine(traces: Traces, source: Source, elements: int) -> None:
    """Hold every row to the likelihood: now, or as a Dataset gives them."""
    size = max(1, CHECKED_ELEMENTS // max(1, elements))

    def examine(x: torch.Tensor, y: torch.Tensor | None, rows: torch.Tensor) -> None:
        check_observed(traces, x, y, first=rows)
        _require_squares(x)

    if not source.fresh:
        source.examine = examine
        return
    levels = source.levels()
    if levels is not None:
        with contextlib.suppress(DataError):  # not every level that there could be is legal: rows are looked at
            for some in levels.split(size):
                check_observed(traces, source.prepare(some))
            return
    for first in range(0, source.num_rows, size):
        rows = torch.arange(first, min(first + size, source.num_rows))
        examine(*source.batch(rows), rows)
    held_out = source.validation()
    if held_out is None:
        return
    x, y = held_out
    program = traces.program
    for first in range(0, len(x), size):
        part = slice(first, first + size)
        block, block_y = to_program(program, x[part]), None if y is None else y[part].to(device_of(program))
        try:
            check_observed(traces, block, block_y, first=first)
        except DataError as error:
            raise DataError(f"in the validation split {error}") from None


def _try_step(program: Any, objective: Any, x: torch.Tensor, y: torch.Tensor | None, num_rows: int) -> None:
    """Compute the objective once on the smallest minibatch, or 8 rows of it; buffers stay as they were."""
    buffers = [(b, b.detach().clone()) for b in program.buffers()]
    try:
        with torch.no_grad():
            objective(program, x, y, 0)
    except UserError:
        raise
    except Exception as error:
        said = " ".join(str(error).partition("Trace Shapes:")[0].split())
        few = f": of {num_rows} rows, choose a batch_size that leaves more in the last one" if len(x) < FEW else ""
        raise UserError(
            f"a minibatch of {len(x)} row{'s' if len(x) > 1 else ''} cannot be trained on ({type(error).__name__}: {said}){few}"
        ) from error
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _remove(path: Path) -> None:
    """Take back a run that was begun and has come to nothing."""
    for name in FILES:
        (path / name).unlink(missing_ok=True)


def _require_squares(x: torch.Tensor) -> None:
    most, limit = float(x.abs().max()), math.sqrt(torch.finfo(x.dtype).max)
    if most > limit:
        raise UserError(
            f"the data reach {most:.3g}, and {str(x.dtype).removeprefix('torch.')} holds no squares of numbers above "
            f"{limit:.3g}: rescale them, to a spread of about 1"
        )


def _warn_lattice(data: Data) -> None:
    warnings.warn(
        f"a density is put on {data.name}, whose values lie on {data.levels} levels: its log-likelihood grows without bound as "
        'scales shrink, and has no bits per dimension; load the data with dequantization="uniform"',
        UserWarning,
        stacklevel=4,
    )


def _require_same(new: dict[str, Any], old: dict[str, Any], path: Path) -> None:
    for table in ("program", "model", "guide", "data", "training"):
        now, then = new.get(table) or {}, old.get(table) or {}
        for key in sorted(set(now) | set(then)):
            if now.get(key) != then.get(key):
                raise UserError(
                    f"cannot resume {path}: {table}.{key} was {then.get(key)!r} and is now {now.get(key)!r}; give the same "
                    "settings, or another --out"
                )
