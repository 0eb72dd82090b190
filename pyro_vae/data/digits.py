"""The digits embedded in scikit-learn."""

from __future__ import annotations

from pathlib import Path

import torch

from pyro_vae.data.splits import Filed


def load(root: Path) -> Filed:
    """1,797 handwritten digits of 8 x 8 with 17 levels (0 to 16), cut 80/10/10; no file and no download.

    Reference: Alpaydin & Kaynak, *Optical recognition of handwritten digits*, 1998
    (https://archive.ics.uci.edu/dataset/80).
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return Filed(
        name="digits",
        x=torch.from_numpy(bunch.images.astype("uint8")).unsqueeze(1),
        levels=17,
        labels=torch.from_numpy(bunch.target.astype("int64")),
        binarization="dynamic",
        label_names=tuple(str(name) for name in bunch.target_names),
    )
