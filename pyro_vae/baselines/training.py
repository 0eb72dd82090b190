"""Training a baseline into a directory, and finding it there again.

    baseline.json           its name, options and seed, the data, versions
    rows.safetensors        which rows went into which split, and digests of them, as in a run
    state.safetensors       all of its tensors, with the number of passes made and a line of metrics for each
    metrics.jsonl           these lines
    evaluation.json         what was found of log p(x)

Each file is written whole or not at all. The random numbers of a pass depend on its number alone, so that a training that was
killed ends, resumed, where one left alone ends: to the bit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pyro_vae import registry
from pyro_vae.baselines.base import Baseline
from pyro_vae.data import Data
from pyro_vae.data.content import content_of
from pyro_vae.errors import UserError
from pyro_vae.seeding import derive_seed, generator, seeded
from pyro_vae.training.files import Outline, damaged, parse_json, read_tensors, read_text, write_tensors, write_text
from pyro_vae.training.interrupts import Interrupted, Interrupts
from pyro_vae.training.kept import ROWS, load_kept, table, write_content
from pyro_vae.training.run import SPEC, claimed, versions
from pyro_vae.training.run import load as load_run

RECORD, STATE, METRICS = "baseline.json", "state.safetensors", "metrics.jsonl"
SECONDS = 60.0  # between two checkpoints


def declare(name: str, options: dict[str, Any], event_shape: tuple[int, ...], seed: int) -> Baseline:
    """A baseline by name, untrained."""
    cls = registry.get("baselines", name)
    checked = registry.validate("baselines", name, options)
    with seeded(derive_seed("weights of a baseline", seed)):
        made: Baseline = cls(event_shape, **checked)
        return made


def record_of(name: str, options: dict[str, Any], data: Data, seed: int, parent: str | None = None) -> dict[str, Any]:
    """What ``baseline.json`` will hold."""
    source = {k: v for k, v in data.source.items() if v is not None}
    return {
        "baseline": name, "options": registry.validate("baselines", name, options), "event_shape": list(data.event_shape),
        "seed": seed, "data": source, "rows": table(content_of(data)), "parent": parent, "versions": versions(),
    }  # fmt: skip


def create(path: Path, record: dict[str, Any], data: Data) -> None:
    """Make an empty directory one of a baseline."""
    if (path / RECORD).exists():
        raise UserError(f"{path} already holds a baseline: choose another --out, or --resume it")
    if any(p.name != ROWS for p in path.iterdir()):
        raise UserError(f"{path} is not an empty directory: choose another --out")
    write_content(path, content_of(data))
    write_text(path / RECORD, json.dumps(record, indent=2) + "\n")


def read(path: Path) -> dict[str, Any]:
    """The record of a directory; :class:`UserError` where there is none."""
    if not path.is_dir():
        raise UserError(f"no directory {str(path)!r}: expected one written by pyro-vae baseline --out")
    record = parse_json(read_text(path / RECORD), path / RECORD)
    wanted = {"baseline": str, "options": dict, "event_shape": list, "seed": int, "data": dict}
    for key, kind in wanted.items():
        if not isinstance(record, dict) or not isinstance(record.get(key), kind):
            raise damaged(path / RECORD, f"it names no {key}")
    return dict(record)


def load(path: Path, record: dict[str, Any]) -> tuple[Baseline, list[dict[str, Any]]]:
    """A baseline as it was last saved, and its metrics; untrained, and none, where nothing was saved yet."""
    made = declare(record["baseline"], record["options"], tuple(record["event_shape"]), record["seed"])
    where = path / STATE
    if not where.is_file():
        return made, []
    own = {name: Outline.of(tensor) for name, tensor in made.state_dict().items()}

    def fits(found: dict[str, Outline], state: Any) -> None:
        if found != own or not isinstance(state, dict) or not isinstance(state.get("metrics"), list):
            raise damaged(where, f"it is not the state of the {record['baseline']} that {RECORD} speaks of")

    tensors, state = read_tensors(where, fits)
    made.load_state_dict(tensors)
    return made, state["metrics"]


def load_trained(path: Path) -> Baseline:
    """A baseline as its training left it, with what followed the passes."""
    made, _ = load(path, read(path))
    if (path / "program" / SPEC).is_file():
        load_run(path / "program", program=getattr(made, "program", None))
    return made


def load_data(path: Path, record: dict[str, Any], root: str | None) -> Data:
    """The rows that it was trained on, prepared as they were then."""
    return load_kept(path, record, None, root)


def require_passes(options: dict[str, Any]) -> None:
    """:class:`UserError` for no pass over the data, where there is nothing to begin with."""
    if options.get("epochs") == 0:
        raise UserError(
            "epochs = 0 is for a baseline whose first part was trained before: name its directory, --from DIR"
        )


def dequantized(data: Data) -> Data:
    """Grey levels with uniform noise, as densities are of them; other data as they are."""
    return data.with_(dequantization="uniform") if (data.levels or 0) > 2 else data


def trained(name: str, data: Data, *, seed: int = 0, **options: Any) -> Baseline:
    """A baseline trained in memory; ``pyro-vae baseline`` trains the same into a directory. Grey levels are dequantized.

    Example:
        >>> import pyro_vae as pv
        >>> made = trained("rbm", pv.load_data("digits"), hidden=8, epochs=1)
        >>> made.sample(5, seed=0).shape
        torch.Size([5, 1, 8, 8])
    """
    require_passes(options)
    made = declare(name, options, data.event_shape, seed)
    if made.data == "grey":
        data = dequantized(data)
    train(made, data, None, seed, [])
    made.finish(data, None, seed, False)
    return made


def train(
    made: Baseline,
    data: Data,
    path: Path | None,
    seed: int,
    metrics: list[dict[str, Any]],
    progress: Callable[[int, str], None] = lambda done, text: None,
) -> list[dict[str, Any]]:
    """Make the passes that are left, saving now and then and at the end; :class:`Interrupted` after a signal and a save."""
    made.require(data)
    with nullcontext() if path is None else claimed(path), Interrupts() as interrupts:
        if not metrics:
            made.start(data, generator("start of a baseline", seed))
        saved = time.perf_counter()
        for number in range(len(metrics), made.passes):
            began = time.perf_counter()
            found = made.train_pass(number, data, generator("pass of a baseline", seed, number))
            metrics.append({"pass": number + 1, **found, "seconds": round(time.perf_counter() - began, 3)})
            last = number + 1 == made.passes or interrupts.pending is not None
            if path is not None and (last or time.perf_counter() - saved > SECONDS):
                _save(made, metrics, path)
                saved = time.perf_counter()
            progress(number + 1, ", ".join(f"{k} {v:.4g}" for k, v in found.items()))
            if interrupts.pending is not None and number + 1 < made.passes:
                raise Interrupted(
                    interrupts.pending,
                    f"interrupted after {number + 1} of {made.passes} passes"
                    + (f": --out {path} --resume goes on" if path else ""),
                )
    return metrics


def _save(made: Baseline, metrics: list[dict[str, Any]], path: Path) -> None:
    write_tensors(path / STATE, made.state_dict(), {"metrics": metrics})
    write_text(path / METRICS, "".join(json.dumps(line) + "\n" for line in metrics))
