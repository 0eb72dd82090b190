"""Data sets by name: shapes, splits, rows, layouts on the disk."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_vae.data import DATA_SETS, Data, load_data, static_mnist
from pyro_vae.data.load import LOADERS
from pyro_vae.data.names import SPLITS, TOYS
from pyro_vae.data.splits import fixed_permutation
from pyro_vae.data.toys import DRAW

ROOT = os.environ.get("PYRO_VAE_DATA", "")


def needs(*files: str) -> pytest.MarkDecorator:
    absent = [file for file in files if not ROOT or not (Path(ROOT) / file).is_file()]
    return pytest.mark.skipif(bool(absent), reason=f"PYRO_VAE_DATA is not set or lacks {', '.join(absent)}")


needs_mnist = needs("MNIST/raw/train-images-idx3-ubyte", "MNIST/raw/t10k-images-idx3-ubyte")
needs_static = needs("BinarizedMNIST/binarized_mnist_train.amat.gz")
needs_frey = needs("FreyFace/frey_rawface.mat")


@pytest.fixture(autouse=True)
def _untouched_generators() -> object:
    """Nothing here may draw from, or seed, the global generators."""
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    yield
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


def sizes(data: Data) -> tuple[int, ...]:
    return tuple(len(data.stored(split)) for split in SPLITS)


def same(a: Data, b: Data) -> bool:
    return all(torch.equal(a.observed(split), b.observed(split)) for split in SPLITS)


# What there is


def test_every_name_has_a_loader() -> None:
    assert set(DATA_SETS) == set(LOADERS) | set(TOYS)
    assert set(TOYS) == set(DRAW)
    assert all("\n" not in line for line in DATA_SETS.values())


def test_names_do_not_import_torch() -> None:
    code = "import sys; from pyro_vae.data import DATA_SETS; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_digits(digits: Data) -> None:
    assert sizes(digits) == (1439, 179, 179)
    assert digits.event_shape == (1, 8, 8)
    assert (digits.levels, digits.binarization, digits.observed_levels) == (17, "dynamic", 2)
    assert digits.train.dtype == torch.uint8
    assert int(digits.train.max()) == 16
    for split in SPLITS:
        labels = digits.labels[split]
        assert labels is not None
        assert labels.dtype == torch.int64
        assert len(labels) == len(digits.stored(split))
    assert "\n" not in repr(digits)


def test_rows_say_which_is_which(digits: Data) -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    rows = [digits.rows[split] for split in SPLITS]
    assert torch.cat(rows).sort().values.tolist() == list(range(1797))
    for split in SPLITS:
        index = digits.rows[split].numpy()
        assert np.array_equal(digits.stored(split)[:, 0].numpy(), bunch.images[index].astype(np.uint8))
        assert np.array_equal(digits.labels[split].numpy(), bunch.target[index])


def test_the_cut_is_pinned() -> None:
    # A changed permutation changes every published number on data without a split.
    assert fixed_permutation(10).tolist() == PINNED
    assert sorted(fixed_permutation(1001).tolist()) == list(range(1001))


PINNED = [8, 9, 7, 3, 6, 2, 0, 5, 4, 1]


@pytest.mark.parametrize("name", TOYS)
def test_toys(name: str) -> None:
    data = load_data(name)
    assert sizes(data) == (8000, 1000, 1000)
    assert data.event_shape == (2,)
    assert data.levels is None
    assert data.train.dtype == torch.float32
    assert data.train.abs().max() < 6
    assert (data.train.std(0) > 0.5).all()
    assert (data.labels["train"] is None) == (name == "checkerboard")
    assert torch.equal(data.observed("test"), data.test)
    assert same(data, load_data(name))


def test_checkerboard_fills_the_dark_squares_evenly() -> None:
    x = torch.cat([load_data("checkerboard").stored(split) for split in SPLITS])
    square = torch.floor((x + 4) / 2).long()
    assert ((square.sum(1) % 2) == 0).all()
    counts = torch.bincount(square[:, 0] * 4 + square[:, 1], minlength=16)
    counts = counts[counts > 0].double()
    assert len(counts) == 8
    # Chi-squared with 7 degrees of freedom: false alarm 1e-4.
    assert ((counts - 1250) ** 2 / 1250).sum() < 29.88


# Splits


@pytest.mark.parametrize(
    ("validation", "expected"), [(0, (1618, 0, 179)), (5, (1613, 5, 179)), (None, (1439, 179, 179))]
)
def test_validation_size(digits: Data, validation: int | None, expected: tuple[int, ...]) -> None:
    data = load_data("digits", validation=validation)
    assert sizes(data) == expected
    assert torch.equal(data.test, digits.test)
    assert data.observed("validation").shape == (expected[1], 1, 8, 8)


@needs_mnist
def test_mnist() -> None:
    data = load_data("mnist")
    assert sizes(data) == (50_000, 10_000, 10_000)
    assert data.event_shape == (1, 28, 28)
    assert (data.levels, data.binarization) == (256, "dynamic")
    assert data.rows == {"train": None, "validation": None, "test": None}
    assert data.labels["train"][:5].tolist() == [5, 0, 4, 1, 9]
    assert data.labels["test"][:5].tolist() == [7, 2, 1, 0, 4]
    everything = load_data("mnist", validation=0)
    assert sizes(everything) == (60_000, 0, 10_000)
    assert torch.equal(everything.train[50_000:], data.validation)
    assert data.mean_image().mean() == pytest.approx(data.train.double().mean().item() / 255, abs=1e-6)


@needs_static
def test_static_mnist() -> None:
    data = load_data("static-mnist")
    assert sizes(data) == (50_000, 10_000, 10_000)
    assert (data.levels, data.binarization, data.event_shape) == (2, "static", (1, 28, 28))
    assert data.train.dtype == torch.uint8
    assert int(data.train.max()) == 1
    assert data.train.double().mean() == pytest.approx(0.13, abs=0.01)
    x = data.observed("test", rows=range(100))
    assert torch.equal(x, data.test[:100].float())


@needs_frey
def test_frey_face() -> None:
    data = load_data("frey-face")
    assert sizes(data) == (1565, 200, 200)
    assert (data.levels, data.binarization, data.event_shape) == (256, "none", (1, 28, 20))
    assert torch.cat([data.rows[split] for split in SPLITS]).sort().values.tolist() == list(range(1965))
    # A picture that is laid out rightly is about as smooth down its columns as along its rows; read as 20 x 28 instead
    # of 28 x 20 it is twice as rough down its columns.
    face = data.train.float()
    down, along = (face.diff(dim=axis).abs().mean() for axis in (-2, -1))
    assert down < 1.3 * along


def test_static_mnist_parses_plain_and_gzipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_mnist, "NUM_ROWS", {"train": 4, "valid": 3, "test": 3})
    rng = np.random.default_rng(0)
    (tmp_path / "BinarizedMNIST").mkdir()
    truth = {}
    for part, rows in static_mnist.NUM_ROWS.items():
        truth[part] = rng.integers(0, 2, (rows, 784))
        text = "".join(" ".join(map(str, row)) + " \n" for row in truth[part]).encode()
        path = tmp_path / "BinarizedMNIST" / f"binarized_mnist_{part}.amat"
        if part == "train":
            path.write_bytes(text)
        else:
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(text))
    data = load_data("static-mnist", tmp_path)
    assert np.array_equal(data.train.reshape(4, 784).numpy(), truth["train"])
    assert np.array_equal(data.validation.reshape(3, 784).numpy(), truth["valid"])
    assert np.array_equal(data.test.reshape(3, 784).numpy(), truth["test"])
    assert sizes(load_data("static-mnist", tmp_path, validation=0)) == (7, 0, 3)
    assert load_data(**data.source).source == data.source


def test_omniglot_is_turned_upright(tmp_path: Path) -> None:
    from scipy.io import savemat

    upright = np.random.default_rng(0).integers(0, 256, (12, 28, 28))
    columns = (upright / 255.0).transpose(0, 2, 1).reshape(12, 784).T
    target = np.eye(50)[:, np.arange(12) % 50]
    (tmp_path / "OMNIGLOT").mkdir()
    arrays = {"data": columns, "testdata": columns[:, :4], "target": target, "testtarget": target[:, :4]}
    savemat(tmp_path / "OMNIGLOT" / "chardata.mat", arrays)
    data = load_data("omniglot", tmp_path, binarization="none", validation=2)
    assert sizes(data) == (10, 2, 4)
    assert torch.equal(torch.cat([data.train, data.validation])[:, 0], torch.from_numpy(upright).to(torch.uint8))
    assert data.labels["test"].tolist() == [0, 1, 2, 3]
    assert load_data("omniglot", tmp_path).binarization == "dynamic"


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes() + array.tobytes())


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST"), ("kmnist", "KMNIST")]
)
def test_torchvision_layout_is_read_without_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, folder: str
) -> None:
    monkeypatch.setattr("pyro_vae.data.torchvision_sets.download", lambda *_: pytest.fail("downloaded"))
    rng = np.random.default_rng(0)
    images = {part: rng.integers(0, 256, (n, 28, 28), dtype=np.uint8) for part, n in (("train", 30), ("t10k", 5))}
    for part, x in images.items():
        write_idx(tmp_path / folder / "raw" / f"{part}-images-idx3-ubyte", x)
        write_idx(tmp_path / folder / "raw" / f"{part}-labels-idx1-ubyte", np.arange(len(x), dtype=np.uint8) % 10)
    data = load_data(name, tmp_path, validation=10)
    assert sizes(data) == (20, 10, 5)
    assert np.array_equal(data.validation[:, 0].numpy(), images["train"][20:])
    assert data.labels["validation"].tolist() == list(range(10))
    assert len(data.label_names) == 10
    assert same(data, load_data(**json.loads(json.dumps(data.source))))


def test_cifar10_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib
    import pickle

    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    x = np.random.default_rng(0).integers(0, 256, (6, 10, 3072), dtype=np.uint8)

    def write(name: str, content: object) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    batches = [write(f"batch_{i}", {"data": x[i], "labels": list(range(10))}) for i in range(6)]
    monkeypatch.setattr(CIFAR10, "train_list", batches[:5])
    monkeypatch.setattr(CIFAR10, "test_list", batches[5:])
    meta = write("meta", {"label_names": [f"class {i}" for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    data = load_data("cifar10", tmp_path, validation=5)
    assert sizes(data) == (45, 5, 10)
    assert (data.event_shape, data.binarization, data.levels) == ((3, 32, 32), "none", 256)
    assert np.array_equal(data.test.reshape(10, -1).numpy(), x[5])
    assert data.label_names[3] == "class 3"


def test_root_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyro_vae.data.roots import data_root

    monkeypatch.setenv("PYRO_VAE_DATA", str(tmp_path))
    assert data_root(None) == tmp_path
    assert data_root("elsewhere") == Path("elsewhere")
    monkeypatch.delenv("PYRO_VAE_DATA")
    assert data_root(None) == Path.home() / ".cache" / "pyro_vae"
