"""Files written whole or not at all: tensors as safetensors, everything else as text."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pyro_vae.errors import UserError


def write_bytes(path: Path, content: bytes) -> None:
    """Write beside ``path``, flush to the disk, and rename: what stood there stays until the new file is whole."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space or choose another --out") from error


def write_text(path: Path, text: str) -> None:
    """The same for text."""
    write_bytes(path, text.encode("utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any] | None = None) -> None:
    """Tensors by name, and a JSON-able state in the header of the same file."""
    plain = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
    write_bytes(path, save(plain, metadata={"state": json.dumps(state)} if state is not None else None))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """What :func:`write_tensors` wrote; :class:`UserError` for a file that is missing or cut short."""
    if not path.is_file():
        raise UserError(f"{path} is missing: the run is incomplete; train again or resume it")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(metadata["state"]) if "state" in metadata else None
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): train again, or restore the file") from None


def read_text(path: Path) -> str:
    """A text file of a run; :class:`UserError` where it is missing or no text."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} is no run, or an incomplete one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
