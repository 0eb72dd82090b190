"""Data sets that are filed as MATLAB files: Frey faces and Omniglot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.roots import damaged, missing
from pyro_vae.data.splits import Filed

FREY_FACE = ("FreyFace/frey_rawface.mat", "https://cs.nyu.edu/~roweis/data/frey_rawface.mat")
OMNIGLOT = ("OMNIGLOT/chardata.mat", "https://github.com/yburda/iwae/tree/master/datasets/OMNIGLOT")


def frey_face(root: Path) -> Filed:
    """1,965 video frames of one face, (1, 28, 20) with 256 levels, cut 1,565/200/200 by a fixed seed.

    The frames are neighbours in time and the cut is by frame, as is usual: held-out frames have near twins in
    training.

    Reference: Roweis & Saul, *Nonlinear dimensionality reduction by locally linear embedding*, 2000
    (https://cs.nyu.edu/~roweis/data.html).
    """
    path, arrays = _read("frey-face", root, *FREY_FACE)
    faces = _array("frey-face", path, arrays, "ff", rows=560)
    if faces.dtype != np.uint8:
        raise damaged("frey-face", path, f"expected 'ff' of uint8, and found {faces.dtype}")
    return Filed(
        name="frey-face",
        x=torch.from_numpy(np.ascontiguousarray(faces.T)).reshape(-1, 1, 28, 20),
        levels=256,
        validation=200,
        held_out=200,
    )


def omniglot(root: Path) -> Filed:
    """32,415 handwritten characters of 50 alphabets, (1, 28, 28): 23,000/1,345/8,070, labelled by alphabet.

    The file and its test split are of Burda, Grosse & Salakhutdinov, *Importance weighted autoencoders*, 2016
    (https://arxiv.org/abs/1509.00519); the last 1,345 training rows validate, as many as in Tomczak & Welling,
    *VAE with a VampPrior*, 2018 (https://arxiv.org/abs/1705.07120). The characters are of Lake, Salakhutdinov &
    Tenenbaum 2015. Grey values are stored as round(255 x).
    """
    path, arrays = _read("omniglot", root, *OMNIGLOT)
    parts: list[Tensor] = []
    for key in ("data", "testdata"):
        grey = _array("omniglot", path, arrays, key, rows=784)
        if not (np.isfinite(grey).all() and grey.min() >= 0 and grey.max() <= 1):
            raise damaged("omniglot", path, f"expected {key!r} in [0, 1]")
        images = np.rint(grey.T * 255.0).astype(np.uint8).reshape(-1, 1, 28, 28)
        # MATLAB stores a picture column by column.
        parts.append(torch.from_numpy(np.ascontiguousarray(images.swapaxes(-1, -2))))
    x, test = parts
    return Filed(
        name="omniglot",
        x=x,
        levels=256,
        test=test,
        labels=_alphabets(path, arrays, "target", len(x)),
        test_labels=_alphabets(path, arrays, "testtarget", len(test)),
        validation=1345,
        binarization="dynamic",
    )


def _alphabets(path: Path, arrays: dict[str, np.ndarray], key: str, n: int) -> Tensor | None:
    if key not in arrays:
        return None
    one_hot = np.asarray(arrays[key])
    if one_hot.ndim != 2 or one_hot.shape[1] != n:
        raise damaged("omniglot", path, f"expected {key!r} of shape (50, {n}), and found {one_hot.shape}")
    return torch.from_numpy(one_hot.argmax(0).astype(np.int64))


def _read(name: str, root: Path, file: str, origin: str) -> tuple[Path, dict[str, np.ndarray]]:
    from scipy.io import loadmat

    path = root / file
    if not path.is_file():
        raise missing(name, root, [file], origin)
    try:
        return path, loadmat(path)
    except Exception as error:  # loadmat fails in as many ways as a file can be broken
        raise damaged(name, path, error) from error


def _array(name: str, path: Path, arrays: dict[str, np.ndarray], key: str, rows: int) -> np.ndarray:
    array = arrays.get(key)
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.shape[0] != rows or array.dtype.kind not in "uif":
        found = "no such array" if array is None else f"shape {np.shape(array)}"
        raise damaged(name, path, f"expected an array {key!r} of shape ({rows}, N), and found {found}")
    if array.shape[1] < 3:
        raise damaged(name, path, f"expected many columns in {key!r}, and found {array.shape[1]}")
    return array
