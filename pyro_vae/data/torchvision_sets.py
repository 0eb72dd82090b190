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
    from torchvision import datasets

    kind = getattr(datasets, kind_name)
    stems = [file.removesuffix(".gz") for file, _ in kind.resources]
    files = [f"{kind_name}/raw/{stem}" for stem in stems]
    train, test = _train_and_test(name, kind, root, files, [f"{file}.gz" for file in files], kind.mirrors[0])
    for part in (train, test):
        if part.data.dim() != 3 or len(part.data) != len(part.targets) or len(part.data) < 3:
            raise damaged(
                name, root / kind_name, f"found images {tuple(part.data.shape)} and {len(part.targets)} labels"
            )
    return Filed(
        name=name,
        x=train.data.unsqueeze(1),
        levels=256,
        test=test.data.unsqueeze(1),
        labels=_labels(train),
        test_labels=_labels(test),
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
    if absent and not may_download():
        raise missing(name, root, absent, origin)
    if absent:
        try:
            download(kind, root, archives)
        except (OSError, RuntimeError, EOFError, ValueError) as error:
            why = " ".join(str(error).split())[:200]
            raise UserError(f"{missing(name, root, absent, origin)}; downloading failed: {why}") from error
    try:
        return kind(root, train=True), kind(root, train=False)
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise damaged(
            name, (root / files[0]).parent, f"torchvision says {str(error) or type(error).__name__!r}"
        ) from error


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
