"""The data sets that are known by name, one line each; importing this file imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path

from pyro_vae.errors import UserError, nearest

SUFFIXES = {".npy", ".npz", ".mat", ".csv", ".tsv"}
OWN = "a .npy, .npz, .mat or .csv file, or a folder of images"

TOYS: dict[str, str] = {
    "pinwheel": "two-dimensional toy: five curved arms (Johnson et al. 2016)",
    "moons": "two-dimensional toy: two interleaved half circles with noise 0.1",
    "checkerboard": "two-dimensional toy: uniform on the eight dark squares of a 4 x 4 board (Grathwohl et al. 2019)",
    "circles": "two-dimensional toy: two concentric circles with noise (Grathwohl et al. 2019)",
    "eight-gaussians": "two-dimensional toy: eight normals on a circle (Grathwohl et al. 2019)",
    "two-spirals": "two-dimensional toy: two interleaved spirals (Grathwohl et al. 2019)",
}

DATA_SETS: dict[str, str] = {
    "digits": "1,797 digits of 8 x 8, 17 grey levels, embedded in scikit-learn: no download",
    "mnist": "70,000 digits of 28 x 28, binarized anew each minibatch (LeCun et al. 1998)",
    "static-mnist": "MNIST binarized once and for all (Larochelle & Murray 2011)",
    "fashion-mnist": "70,000 pictures of clothes of 28 x 28 (Xiao, Rasul & Vollgraf 2017)",
    "kmnist": "70,000 cursive Japanese characters of 28 x 28 (Clanuwat et al. 2018)",
    "omniglot": "32,415 characters of 50 alphabets, 28 x 28, as Burda, Grosse & Salakhutdinov 2016 filed them",
    "frey-face": "1,965 frames of one face, 28 x 20, 256 grey levels (Roweis & Saul 2000)",
    "cifar10": "60,000 colour photographs of 3 x 32 x 32 (Krizhevsky 2009)",
    **TOYS,
}
"""Name -> one line. A path to a .npy file, a .npz file or a folder of images stands wherever a name does."""

SPLITS: tuple[str, ...] = ("train", "validation", "test")
BINARIZATIONS: tuple[str, ...] = ("none", "static", "dynamic", "threshold")
DEQUANTIZATIONS: tuple[str, ...] = ("none", "uniform")


def require_known(key: str) -> None:
    """:class:`UserError` for what is neither the name of a data set nor a file or folder that is there."""
    if key in DATA_SETS or Path(key).expanduser().exists():
        return
    if Path(key).suffix or os.sep in key:
        what = "file" if Path(key).suffix.lower() in SUFFIXES else "file or folder"
        raise UserError(f"there is no {what} {key!r}: check the path, or {nearest(Path(key).name, DATA_SETS)}")
    raise UserError(
        f"unknown data set {key!r}: {nearest(key.lower().replace('_', '-'), DATA_SETS)} (or give a path to {OWN})"
    )
