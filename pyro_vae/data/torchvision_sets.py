"""MNIST, its kin and CIFAR-10, read by torchvision; downloaded only where the files are missing."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data import idx
from pyro_vae.data.roots import damaged, may_download, missing
from pyro_vae.data.splits import Filed
from pyro_vae.errors import UserError

DOWNLOAD_TIMEOUT = 30.0


def mnist(root: Path) -> Filed:
    """70,000 digits of (1, 28, 28), 256 levels: 50,000/10,000/10,000 in file order.

    Reference: LeCun, Bottou, Bengio & Haffner, *Gradient-based learning applied to document recognition*, 1998
    (http://yann.lecun.com/exdb/mnist/).
    """
    return _like_mnist("mnist", "MNIST", root)


def fashion_mnist(root: Path) -> Filed:
    """70,000 pictures of clothes, laid out as MNIST. Xiao, Rasul & Vollgraf 2017, https://arxiv.org/abs/1708.07747."""
    return _like_mnist("fashion-mnist", "FashionMNIST", root)


def kmnist(root: Path) -> Filed:
    """70,000 Japanese characters, laid out as MNIST. Clanuwat et al. 2018, https://arxiv.org/abs/1812.01718."""
    return _like_mnist("kmnist", "KMNIST", root)


def cifar10(root: Path) -> Filed:
    """60,000 photographs of (3, 32, 32), 256 levels: 45,000/5,000/10,000 in file order.

    Reference: Krizhevsky, *Learning multiple layers of features from tiny images*, 2009
    (https://www.cs.toronto.edu/~kriz/cifar.html).
    """
    from torchvision import datasets

    kind = datasets.CIFAR10
    batches = [batch[0] for batch in (*kind.train_list, *kind.test_list)]
    files = [f"{kind.base_folder}/{file}" for file in (*batches, kind.meta["filename"])]
    train, test = _train_and_test("cifar10", kind, root, files, [kind.filename], kind.url)
    return Filed(
        name="cifar10",
        x=_channels_first(train),
        levels=256,
        test=_channels_first(test),
        labels=_labels(train),
        test_labels=_labels(test),
        validation=5_000,
        label_names=tuple(train.classes),
    )


def _like_mnist(name: str, kind_name: str, root: Path) -> Filed:
    """The files of a data set like MNIST, unpacked or as published in ``.gz``; fetched where they are missing."""
    from torchvision import datasets

    kind = getattr(datasets, kind_name)
    stems = [file.removesuffix(".gz") for file, _ in kind.resources]
    folders = [root / kind_name / "raw", root / kind_name, root / name, root]
    folder = next((f for f in folders if all((f / s).is_file() or (f / f"{s}.gz").is_file() for s in stems)), None)
    if folder is None:
        files = [f"{kind_name}/raw/{stem}" for stem in stems]
        absent = [f for f in files if not (root / f).is_file() and not (root / f"{f}.gz").is_file()]
        fetch(name, kind, root, [*absent[:-1], f"{absent[-1]} (or .gz)"], [f"{f}.gz" for f in files], kind.mirrors[0])
        folder = root / kind_name / "raw"
    arrays = []
    for stem in stems:
        path = folder / stem if (folder / stem).is_file() else folder / f"{stem}.gz"
        try:
            arrays.append(torch.from_numpy(idx.read(path).copy()))
        except UserError as error:
            raise damaged(name, path, error) from error
    train, labels, test, test_labels = arrays
    for images, y in ((train, labels), (test, test_labels)):
        if images.dim() != 3 or images.dtype != torch.uint8 or len(images) != len(y) or len(images) < 3:
            raise damaged(name, folder, f"found images {tuple(images.shape)} and {len(y)} labels")
    return Filed(
        name=name,
        x=train.unsqueeze(1),
        levels=256,
        test=test.unsqueeze(1),
        labels=labels.to(torch.int64),
        test_labels=test_labels.to(torch.int64),
        validation=10_000,
        binarization="dynamic",
        label_names=tuple(kind.classes),
    )


def _channels_first(part: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)))


def _labels(part: Any) -> Tensor:
    return torch.as_tensor(part.targets, dtype=torch.int64)


def _train_and_test(
    name: str, kind: Any, root: Path, files: list[str], archives: list[str], origin: str
) -> tuple[Any, Any]:
    absent = [file for file in files if not (root / file).is_file()]
    if absent:
        fetch(name, kind, root, absent, archives, origin)
    try:
        return kind(root, train=True), kind(root, train=False)
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise damaged(
            name, (root / files[0]).parent, f"torchvision says {str(error) or type(error).__name__!r}"
        ) from error


def fetch(name: str, kind: Any, root: Path, absent: list[str], archives: list[str], origin: str) -> None:
    """Download a data set, or say which of its files are missing."""
    if not may_download():
        raise missing(name, root, absent, origin)
    try:
        download(kind, root, archives)
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{missing(name, root, absent, origin)}; downloading failed: {why}") from error


def download(kind: Any, root: Path, archives: list[str]) -> None:
    """Download a torchvision data set to ``root`` so that an interruption leaves nothing half-written there.

    Archives that lie there already are unpacked instead, if they are whole.
    """
    new = [folder for folder in (root, *root.parents) if not folder.exists()]
    root.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as temporary, _quiet_network():
            for archive in archives:
                if (root / archive).is_file():
                    (Path(temporary) / archive).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(root / archive, Path(temporary) / archive)
            kind(temporary, train=True, download=True)
            for path in sorted(Path(temporary).rglob("*")):
                target = root / path.relative_to(temporary)
                if path.is_file() and path.suffix != ".gz":
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(path, target)
    except BaseException:
        with contextlib.suppress(OSError):
            for folder in new:
                folder.rmdir()
        raise


@contextlib.contextmanager
def _quiet_network() -> Iterator[None]:
    # torchvision waits for ever on a dead network, and standard output belongs to --json.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        socket.setdefaulttimeout(before)
