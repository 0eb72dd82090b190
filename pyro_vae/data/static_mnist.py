"""MNIST binarized once and for all, as filed by Larochelle."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.roots import damaged, missing
from pyro_vae.data.splits import Filed

ORIGIN = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist"
FOLDER = "BinarizedMNIST"
NUM_ROWS = {"train": 50_000, "valid": 10_000, "test": 10_000}

# What each byte of the text means: 0, 1, nothing (white space) or something that should not be there.
NOTHING, STRANGE = 2, 3
MEANING = np.full(256, STRANGE, dtype=np.uint8)
MEANING[list(b" \t\r\n")] = NOTHING
MEANING[list(b"01")] = 0, 1


def load(root: Path) -> Filed:
    """50,000/10,000/10,000 binary digits of 28 x 28 as filed, without labels.

    Reference: Larochelle & Murray, *The neural autoregressive distribution estimator*, 2011
    (https://proceedings.mlr.press/v15/larochelle11a.html), after Salakhutdinov & Murray 2008.

    Raises:
        UserError: a file is missing, or does not hold rows of 784 zeros and ones.
    """
    names = {part: f"binarized_mnist_{part}.amat" for part in NUM_ROWS}
    paths = {part: _find(root / FOLDER, name) for part, name in names.items()}
    found: dict[str, Path] = {part: path for part, path in paths.items() if path is not None}
    absent = [f"{FOLDER}/{names[part]} (or .gz)" for part in names if part not in found]
    if absent:
        raise missing("static-mnist", root, absent, ORIGIN)
    train, valid, test = (_parse(found[part], rows) for part, rows in NUM_ROWS.items())
    return Filed(
        name="static-mnist",
        x=torch.cat([train, valid]),
        levels=2,
        test=test,
        validation=len(valid),
        binarization="static",
    )


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _parse(path: Path, rows: int) -> Tensor:
    """uint8 ``(rows, 1, 28, 28)`` from lines of 784 characters 0 or 1 with white space between."""
    try:
        text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise damaged("static-mnist", path, error) from error
    characters = np.frombuffer(text, dtype=np.uint8)
    meaning = MEANING[characters]
    if (meaning == STRANGE).any():
        strange = chr(characters[(meaning == STRANGE).argmax()])
        raise damaged("static-mnist", path, f"expected 0, 1 and white space only, and found {strange!r}")
    values = meaning[meaning <= 1]
    if values.size != rows * 784:
        raise damaged("static-mnist", path, f"expected {rows} rows of 784 values, and found {values.size} values")
    return torch.from_numpy(values.reshape(rows, 1, 28, 28))
