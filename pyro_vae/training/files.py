"""Files written whole or not at all: tensors as safetensors, everything else as text."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pyro_vae.errors import UserError
from pyro_vae.paths import beside

TEMPORARY = ".tmp"
TEXT_BYTES = 2**28  # a run's text files are at most this large
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Outline:
    """A tensor's shape and dtype (None for one that torch has no name for), known before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.shape}"

    @classmethod
    def of(cls, tensor: Tensor) -> Outline:
        """That of a tensor at hand, which may be on the ``meta`` device."""
        return cls(tuple(tensor.shape), tensor.dtype)


Check = Callable[[dict[str, Outline], Any], None]


def write_bytes(path: Path, content: bytes) -> None:
    """Write beside ``path``, flush to the disk, and rename: what stood there stays until the new file is whole."""
    try:
        temporary = beside(path, TEMPORARY)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # less the umask
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise _unwritable(path, error) from error
    _flush_folder(path.parent)


def _unwritable(path: Path, error: OSError) -> UserError:
    kept = "; what stood there before is whole" if path.exists() else ""
    return UserError(f"cannot write {path}: {error.strerror}{kept}; free space, or choose another place to write to")


def _flush_folder(folder: Path) -> None:
    """Let the rename itself reach the disk, where folders can be flushed."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_temporaries(path: Path, names: tuple[str, ...]) -> None:
    """Remove what writers that were killed left beside the files of these names."""
    for name in names:
        for left in path.glob(f".{name}.*{TEMPORARY}"):
            with contextlib.suppress(OSError):
                left.unlink()


def append_text(path: Path, text: str) -> None:
    """Add to the end of a file, or leave it as it was; whoever is killed here leaves a last line without its end."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0), 0o666)
        with os.fdopen(handle, "ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                if file.write(content := text.encode("utf-8")) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except BaseException:
                with contextlib.suppress(OSError):
                    file.truncate(before)
                raise
    except OSError as error:
        raise _unwritable(path, error) from error


def write_text(path: Path, text: str) -> None:
    """The same for text."""
    write_bytes(path, text.encode("utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any] | None = None) -> None:
    """Tensors by name; in the header of the same file a JSON-able state and a checksum of the tensors."""
    plain = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
    owners: dict[int, str] = {}
    for name, t in plain.items():  # tied weights are written twice: a file holds no tensor that shares its memory
        if owners.setdefault(t.data_ptr(), name) != name and t.numel():
            plain[name] = t.clone()
    metadata = {"crc32": str(_checksum(plain))}
    if state is not None:
        metadata = {
            "header": json.dumps({**metadata, "state": state})
        }  # one entry: several have no order, and so no same bytes
    write_bytes(path, save(plain, metadata=metadata))


def read_tensors(path: Path, check: Check | None = None) -> tuple[dict[str, Tensor], Any]:
    """What :func:`write_tensors` wrote.

    Args:
        path: the file.
        check: called with the tensors' names, shapes and dtypes and with the state before any tensor is read; it raises
            what it will not have.

    Returns:
        Tensors by name, and the state, or None.

    Raises:
        UserError: the file is missing, damaged, or not what ``check`` expects.
    """
    with _opened(path) as file:
        metadata, state = _outline(file, check)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if "crc32" in metadata and metadata["crc32"] != str(_checksum(tensors)):
        raise damaged(path, "its checksum differs")
    return tensors, state


def checksum_of(path: Path) -> str | None:
    """The checksum in the header of a tensor file, by which its contents are known again."""
    with _opened(path) as file:
        return _header(file).get("crc32")


def outline_of(path: Path, check: Check) -> None:
    """Put names, shapes, dtypes and state of a tensor file before ``check``; no tensor is read."""
    with _opened(path) as file:
        _outline(file, check)


def _header(file: Any) -> dict[str, Any]:
    metadata: dict[str, Any] = file.metadata() or {}
    if "header" in metadata:
        found = json.loads(metadata["header"])
        if not isinstance(found, dict):
            raise ValueError("the header is no table")
        return found
    return {**metadata, "state": json.loads(metadata["state"])} if "state" in metadata else metadata  # as it was before


def _outline(file: Any, check: Check | None) -> tuple[dict[str, Any], Any]:
    metadata = _header(file)
    state = metadata.get("state")
    if check is not None:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        check({n: Outline(tuple(s.get_shape()), DTYPES.get(s.get_dtype())) for n, s in slices.items()}, state)
    return metadata, state


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A tensor file, its header checked against its size by safetensors; whatever is wrong with it is a UserError."""
    if not path.is_file():
        raise UserError(f"{path} is missing: the run is incomplete; train again or resume it")
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except UserError:
        raise
    except (SafetensorError, ValueError, OSError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, str(error) or type(error).__name__) from None


def damaged(path: Path, why: object) -> UserError:
    """The error for a file of a run that does not hold what it should."""
    return UserError(f"{path} is damaged ({' '.join(str(why).split())[:200]}): restore the file, or train again")


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of the tensors' bytes in the order of their names: it finds accidents, not forgeries."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        if tensors[name].numel():  # what has no elements has no bytes to be viewed as
            crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


def read_text(path: Path) -> str:
    """A text file of a run; :class:`UserError` where it is missing, too large or no text."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is no ordinary file")
        if path.stat().st_size > TEXT_BYTES:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes, more than the {TEXT_BYTES:,} that are read")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} is no run, or an incomplete one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def parse_json(text: str, path: Path) -> Any:
    """JSON from a file of a run."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from None
