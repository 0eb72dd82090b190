"""A run: the directory that training leaves, and the program it holds.

    spec.toml                what was declared: model, guide, data, training settings, versions
    weights.safetensors      the weights that are kept
    checkpoint.safetensors   the newest state of training, to resume from
    metrics.jsonl            a line per epoch
    metrics.csv              the same for spreadsheets; nothing reads it
    rows.safetensors         which rows went into which split, and a digest of each: data loaded again are held to it
    evaluation*.json, *.png  what was made of it since

Nothing in it is code, and loading it runs none.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import tomli_w
import torch
from torch import Tensor, nn

from pyro_vae import memory
from pyro_vae.data import Data
from pyro_vae.data.columned import for_program
from pyro_vae.data.content import Content
from pyro_vae.data.given import as_data
from pyro_vae.errors import UserError
from pyro_vae.paths import expanded
from pyro_vae.programs.adopted import Adopted
from pyro_vae.programs.columns import layout_of
from pyro_vae.programs.contract import require_program
from pyro_vae.programs.vae import VAE
from pyro_vae.spec import Spec, construct, outline, parse_toml
from pyro_vae.training.devices import resolve_device
from pyro_vae.training.files import (
    Outline,
    checksum_of,
    damaged,
    outline_of,
    read_tensors,
    read_text,
    remove_temporaries,
    write_text,
)
from pyro_vae.training.kept import ROWS, load_kept, read_content, table, write_content
from pyro_vae.training.metrics import METRICS, METRICS_CSV, read_metrics
from pyro_vae.training.selection import Kept, kept
from pyro_vae.training.settings import Settings
from pyro_vae.training.standardize import rows_of

SPEC, WEIGHTS, CHECKPOINT = "spec.toml", "weights.safetensors", "checkpoint.safetensors"
FILES = (SPEC, WEIGHTS, CHECKPOINT, METRICS, METRICS_CSV, ROWS)
TABLES = ("program", "model", "guide", "data", "rows", "training", "lineage", "versions")
DATA_KEYS = {
    "name": str, "root": str, "binarization": str, "dequantization": str, "validation": int, "present": str,
}  # fmt: skip
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DRAWN_AT_ONCE = 64  # data that the pictures of a run hold at least
LINEAGE = "_pyro_vae_lineage"  # attribute of a program that came out of a run: which, and the checksum of its weights
RECORDED = (
    "pyro-vae",
    "torch",
    "torchvision",
    "pyro-ppl",
    "numpy",
    "scipy",
    "arviz-base",
    "arviz-stats",
    "safetensors",
    "pydantic",
)


@dataclass
class Run:
    """A trained program, how it was trained, and where it lies.

    Attributes:
        program: the program, with the weights that were kept.
        path: the run directory, or None where none was asked for.
        record: what ``spec.toml`` holds, as plain tables.
        metrics: one dict per epoch.
        content: what is known of the data that it was trained on; a run that was loaded keeps it in its directory.
        noise: the standard error that draws of z leave in the validation value by which the weights were chosen, if they were.
        data: what it was trained on, of a run that was trained in this process.
    """

    program: Any
    path: Path | None
    record: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    content: Content | None = None
    noise: float | None = None
    data: Any = None

    @property
    def kept(self) -> Kept:
        """The epoch whose weights were kept, and why that one."""
        return kept(self.metrics, self.record.get("training", {}), self.noise)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one datum."""
        return tuple(self.record["program"]["event_shape"])

    @property
    def spec(self) -> Spec | None:
        """The declared model and guide, or None for a program of the user's own."""
        return Spec.from_dict({k: self.record[k] for k in ("model", "guide")}) if "model" in self.record else None

    def load_data(self, root: str | None = None) -> Data:
        """The data set that the run was trained on: the same rows in the same splits, prepared as they were then.

        Args:
            root: the folder where data sets lie, or where a file or folder of yours has been moved to.

        Raises:
            UserError: data that are missing or have changed; a run that was loaded, and was trained on data that have no path.
        """
        if root is None and self.data is not None and "name" not in self.record.get("data", {}):
            return for_program(self.program, as_data(self.data))
        return for_program(self.program, load_kept(self.path, self.record, self.content, root))

    def prepared_like(self) -> Data:
        """A data set of no rows, prepared as that of the run was, which need not be there: for rows that are to be scored."""
        content = self.content if self.path is None else read_content(self.path, self.record)
        if content is None or ("binarization" not in content.form and "name" in self.record.get("data", {})):
            return self.load_data()  # of a run of 0.1, which kept less
        return content.without_rows(self.event_shape)

    def __repr__(self) -> str:
        figure = f", {self.kept}" if self.metrics else ""
        return f"<Run {self.path or 'in memory'}: {type(self.program).__name__}, {len(self.metrics)} epochs{figure}>"


def versions() -> dict[str, str]:
    """The versions of everything a run depends on."""
    found = {"python": platform.python_version()}
    for name in RECORDED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def make_record(
    program: Any, event_shape: tuple[int, ...], data: Any, settings: Settings, content: Content
) -> dict[str, Any]:
    """What ``spec.toml`` will hold."""
    spec: Spec | None = getattr(program, "spec", None)
    dtype = next((p.dtype for p in program.parameters()), torch.float32)
    identity = {
        "class": type(getattr(program, "_orig_mod", program)).__name__,
        "event_shape": list(event_shape),
        "dtype": str(dtype).removeprefix("torch."),
    }
    if isinstance(program, VAE) and program.likelihood.units is not None:
        identity["units"] = program.likelihood.units.by
    if (layout := layout_of(program, rows_of(data))) is not None:
        identity["columns"] = [column.name for column in layout.columns]
    source = getattr(program, "source", None)
    record: dict[str, Any] = {"program": {**identity, **(source or {})}}
    if spec is not None:
        record |= spec.to_dict()
    if isinstance(data, Data) and "name" in data.source:  # else they cannot be found again
        record["data"] = {k: v for k, v in data.source.items() if v is not None}
    record["rows"] = table(content)
    record["training"] = settings.to_dict()
    if (parent := getattr(program, LINEAGE, None)) is not None:
        record["lineage"] = dict(parent)
    record["versions"] = versions()
    return record


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """While entered, the directory of a run (made where there is none) is trained by this process and by no other.

    It is locked as a whole, where the system can do that: the lock ends with the process, however that ends.
    """
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the output directory {path}: {error.strerror}; choose another --out") from error
    try:
        with _locked(path):
            yield
    finally:
        with contextlib.suppress(OSError):
            for folder in new:
                folder.rmdir()  # what was left empty


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # no locks here, or a folder that may be written and not read
        yield
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder} is being trained by another process: wait for its end, or choose another --out"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def create(path: Path, record: dict[str, Any], content: Content, save_start: Callable[[], None] = lambda: None) -> None:
    """Make an empty directory a run; refuses one that holds a run, or other files, or cannot be written.

    The spec, which makes it a run, is written last: whoever finds it finds the state from which to begin as well.
    """
    require_free(path)
    try:
        write_content(path, content)
        save_start()
        write_text(path / SPEC, tomli_w.dumps(record))
    except BaseException:
        with contextlib.suppress(OSError):  # nothing half-made is left behind
            for name in (ROWS, CHECKPOINT):
                (path / name).unlink(missing_ok=True)
        raise


def discard(path: Path) -> None:
    """Remove what :func:`create` made, where training came to nothing."""
    remove_temporaries(path, FILES)
    for name in FILES:
        with contextlib.suppress(OSError):
            (path / name).unlink(missing_ok=True)


def evaluation_name(method: str, split: str = "test") -> str:
    """The file of the run that keeps what ``evaluate`` found by a method on a split."""
    parts = ["evaluation", *([] if method == "iw" else [method]), *([] if split == "test" else [split])]
    return "-".join(parts) + ".json"


def require_free(path: Path) -> None:
    """:class:`UserError` where ``path`` cannot become a new run directory."""
    if (path / SPEC).exists():
        raise UserError(f"{path} already holds a run: choose another --out, or --resume it")
    if path.is_dir():
        remove_temporaries(path, FILES)
        if {p.name for p in path.iterdir()} <= {ROWS, CHECKPOINT}:  # killed before it was a run
            return
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is not an empty directory: choose another --out")


def read_record(path: str | Path) -> dict[str, Any]:
    """The tables of a run's ``spec.toml``."""
    path = expanded(path)
    if not path.is_dir():
        raise UserError(f"no run directory {str(path)!r}: expected one written by pyro-vae train --out")
    where = path / SPEC
    record = parse_toml(read_text(where), str(where))
    wrong = [k for k in record if k not in TABLES or not isinstance(record[k], dict)]
    if wrong:
        raise UserError(f"{where}: {wrong[0]!r} is no table of a run's spec; expected {', '.join(TABLES)}")
    shape = record.get("program", {}).get("event_shape")
    if not isinstance(shape, list) or not shape or not all(type(n) is int and n > 0 for n in shape):
        raise UserError(f"{where} does not say the program's event_shape: it is no run's spec")
    memory.require(DRAWN_AT_ONCE * 4 * math.prod(shape), f"{where}: {DRAWN_AT_ONCE} data of event_shape {shape}")
    for key, value in record.get("data", {}).items():
        if key not in DATA_KEYS or type(value) is not DATA_KEYS[key]:
            raise UserError(f"{where}: data.{key} = {value!r} is nothing that load_data takes")
    if "data" in record and "name" not in record["data"]:
        raise UserError(f"{where}: data says no name; expected that of a data set or a path")
    return record


def load(path: str | Path, program: Any = None, device: str | torch.device = "cpu") -> Run:
    """Load a run.

    Args:
        path: the run directory.
        program: the program to fill, for one that was not declared (a class of yours, a ``.py`` file); a declared one is
            rebuilt from the directory alone.
        device: where to put the program: ``auto``, ``cpu``, ``cuda`` or ``mps``, or a ``torch.device``.

    Returns:
        The run, its program holding the weights that were kept.

    Raises:
        UserError: no run there, a file missing or damaged, weights that do not match the program by name, shape and dtype.
    """
    if program is not None:
        require_program(program)
    record = read_record(path)
    path = expanded(path).absolute()  # a working directory may change
    target = resolve_device(device)
    shape = tuple(record["program"]["event_shape"])
    if program is None:
        program = rebuild(path, record)
    take_recorded(program, record)

    def fits(found: dict[str, Outline], _: Any) -> None:
        if isinstance(program, Adopted):
            program.expect({name: (have.shape, have.dtype) for name, have in found.items()})
        match(program.state_dict(), found, str(path / WEIGHTS))

    tensors, said = read_tensors(path / WEIGHTS, fits)
    own = {_plain(name): name for name in program.state_dict()}
    program.load_state_dict({own[_plain(name)]: tensor for name, tensor in tensors.items()})
    remember_shape(program, shape)
    remember_parent(program, path)
    metrics = read_metrics(path)
    if not metrics:  # weights are kept after an epoch, and so is a line of metrics
        raise damaged(path / METRICS, "it holds no whole line")
    noise = said.get("noise") if isinstance(said, dict) else None
    return Run(program.to(target), path, record, metrics, noise=noise if isinstance(noise, float) else None)


def rebuild(path: Path, record: dict[str, Any]) -> nn.Module:
    """The program that a run's record declares, its weights not yet filled in."""
    if "model" not in record or "guide" not in record:
        kind = record["program"].get("file", record["program"].get("class", "a program of yours"))
        raise UserError(
            f"{path} holds the weights of {kind}, which was not declared: hand "
            "the program over, load(path, program=...) or --model FILE.py"
        )
    spec = Spec.from_dict({k: record[k] for k in ("model", "guide")})
    name = record["program"].get("dtype", "float32")
    if not isinstance(name, str) or name not in DTYPES:
        raise UserError(f"{path / SPEC}: program.dtype = {name!r}; expected one of {', '.join(DTYPES)}")
    event_shape = tuple(record["program"]["event_shape"])
    if (path / WEIGHTS).is_file():  # a file of another program is refused before this one takes any memory
        outlined = outline(spec, event_shape)
        take_recorded(outlined, record)
        expected = outlined.to(DTYPES[name]).state_dict()
        outline_of(path / WEIGHTS, lambda found, _: match(expected, found, str(path / WEIGHTS)))
    program: Any = construct(spec, event_shape)
    program.spec = spec
    return cast(nn.Module, program.to(DTYPES[name]))


def take_recorded(program: Any, record: dict[str, Any]) -> None:
    """Let a declared program have the units that a run's record says, or none from then on; their values are in its files."""
    if isinstance(program, VAE):
        if program.likelihood.units is None and (by := record["program"].get("units")) in ("columns", "one"):
            program.take_units(by)
        program.trained = True


def match(state: dict[str, Tensor], found: dict[str, Outline], where: str) -> None:
    """:class:`UserError` unless the tensors of a file are those of a program by name, shape and dtype.

    Names are the same with and without what ``torch.compile`` puts around a module.
    """
    state = {_plain(name): tensor for name, tensor in state.items()}
    found = {_plain(name): outline for name, outline in found.items()}
    missing, extra = sorted(set(state) - set(found)), sorted(set(found) - set(state))
    if missing or extra:
        what = f"no {missing[0]!r}" if missing else f"{extra[0]!r}, which the program lacks"
        raise UserError(f"{where} has {what}: it holds the weights of another program")
    for name, have in found.items():
        if have != Outline.of(state[name]):
            raise UserError(
                f"{where}: {name!r} is {have}, the program's is {Outline.of(state[name])}: it holds the weights of "
                "another program"
            )


def _plain(name: str) -> str:
    """A tensor's name without the wrapper of ``torch.compile``."""
    return name.replace("_orig_mod.", "")


def remember_parent(program: Any, path: Path) -> None:
    """Let a program know the run that its weights are of: what is trained from it says so."""
    setattr(program, LINEAGE, {"parent": str(path), "weights_crc32": str(checksum_of(path / WEIGHTS))})


def remember_shape(program: Any, shape: tuple[int, ...]) -> None:
    """Let a program that does not say its event shape know it, so that it can be sampled from."""
    if getattr(program, "event_shape", None) is None:
        program.event_shape = shape
