"""IDX files, in which MNIST and its kin are published: unpacked, or as they come in ``.gz``.

The format: two zero bytes, a type, the number of axes, their lengths as big-endian 32-bit numbers, the values
(http://yann.lecun.com/exdb/mnist/).
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from pathlib import Path

import numpy as np

from pyro_vae.data.named import filed
from pyro_vae.data.splits import Filed
from pyro_vae.errors import UserError

TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
NAME = re.compile(r"(train|t10k|test)[-_.]?(images|labels)[-_.]idx[13][-_.]ubyte(\.gz)?")


def is_idx(path: Path) -> bool:
    """Whether a file is named as MNIST's are."""
    return NAME.fullmatch(path.name.lower()) is not None


def read(path: Path) -> np.ndarray:
    """The array of one file.

    Raises:
        UserError: the file cannot be read, or is not what it says.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zeros, kind, axes = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{axes}I", content[4 : 4 + 4 * axes])
        dtype = np.dtype(TYPES[kind])
        if zeros or len(content) != 4 + 4 * axes + math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{len(content)} bytes for shape {shape}")
    except (OSError, EOFError, zlib.error, struct.error, KeyError, ValueError) as error:
        raise UserError(f"{str(path)!r} is no whole IDX file ({error}): fetch the file again") from error
    return np.frombuffer(content, dtype, offset=4 + 4 * axes).reshape(shape)


def load(folder: Path, files: list[Path]) -> Filed:
    """Images and labels of a folder that holds MNIST's files or files named like them, with the test split as filed."""
    by_name: dict[str, Path] = {}
    for path in sorted(files, key=lambda p: p.suffix == ".gz"):  # unpacked files before their archives
        match = NAME.fullmatch(path.name.lower())
        if match:
            by_name.setdefault(f"{match[2]}_{match[1].replace('t10k', 'test')}", path)
    return filed(
        repr(str(folder)), folder.resolve().name, list(by_name), lambda name: read(by_name[name]), lambda _: None
    )
