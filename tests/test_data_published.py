"""Data as they are published: splits of their own in archives, MATLAB files, folders and IDX files, tables of text."""

from __future__ import annotations

import gzip
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from scipy import sparse

import pyro_vae as pv
from pyro_vae.errors import UserError

RNG = np.random.default_rng(0)
SIZES = {"train": 30, "val": 6, "test": 9}
SPLITS = ("train", "validation", "test")


def rows(n: int, width: int = 12, like: type = np.uint8) -> np.ndarray:
    """Grey levels of which the first column tells the row."""
    x = RNG.integers(100, 256, (n, width)).astype(np.uint8)
    return x if like is np.uint8 else x.astype(like) / 255


def sizes(data: pv.Data) -> tuple[int, ...]:
    return tuple(len(data.stored(split)) for split in SPLITS)


# Names and layouts that published files have, and what they must give: (train, validation, test) and whether labelled.
Made = dict[str, Any]


def keras() -> Made:
    return {"x_train": rows(30), "y_train": np.arange(30) % 3, "x_test": rows(9), "y_test": np.arange(9) % 3}


def caltech() -> Made:
    images = {f"{split}_data": rows(n) // 200 for split, n in SIZES.items()}
    labels = {f"{split}_labels": np.ones((n, 1), np.uint8) for split, n in SIZES.items()}
    return {**images, **labels, "classnames": np.array([["airplanes"]])}


def omniglot() -> Made:
    grey = {"data": rows(30, like=np.float64).T, "testdata": rows(9, like=np.float64).T}
    return {**grey, "target": np.eye(30)[:5], "testtarget": np.eye(9)[:5]}


ARCHIVES: dict[str, tuple[Callable[[], Made], tuple[int, int, int], bool]] = {
    "keras": (keras, (27, 3, 9), True),
    "caltech": (caltech, (30, 6, 9), True),
    "omniglot": (omniglot, (27, 3, 9), True),
    "bare": (lambda: {"train": rows(30), "test": rows(9)}, (27, 3, 9), False),
    "capitals": (lambda: {"XTrain": rows(30), "XTest": rows(9), "yTrain": np.zeros(30, int)}, (27, 3, 9), False),
    "dots": (lambda: {"train.x": rows(30), "dev.x": rows(6), "testing.x": rows(9)}, (30, 6, 9), False),
}


@pytest.mark.parametrize("name", ARCHIVES)
@pytest.mark.parametrize("ending", ["npz", "mat"])
def test_splits_are_those_that_are_filed(name: str, ending: str, tmp_path: Path) -> None:
    make, expected, labelled = ARCHIVES[name]
    content = make()
    path = tmp_path / f"own.{ending}"
    if ending == "mat":
        content = {n.replace(".", "_"): a for n, a in content.items()}
        scipy.io.savemat(path, content)
    else:
        np.savez(path, **content)
    data = pv.load_data(path)
    assert sizes(data) == expected
    assert data.event_shape == (12,)
    assert all((data.labels[s] is not None) == labelled for s in SPLITS)
    filed = next(a for n, a in content.items() if "test" in n.lower() and a.dtype.kind in "uf" and max(a.shape) == 12)
    filed = filed if filed.shape[-1] == 12 else filed.T
    assert np.allclose(data.test[:].numpy(), filed)


def test_pictures_of_matlab_have_their_data_last(tmp_path: Path) -> None:
    """SVHN files (32, 32, 3, N) and labels (N, 1)."""
    x = RNG.integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)
    scipy.io.savemat(tmp_path / "train_32x32.mat", {"X": x, "y": np.arange(20)[:, None] % 10})
    data = pv.load_data(tmp_path / "train_32x32.mat")
    assert data.event_shape == (3, 32, 32)
    assert data.rows["test"] is not None
    assert torch.equal(data.test[0], torch.from_numpy(x[..., int(data.rows["test"][0])].transpose(2, 0, 1).copy()))


def write_idx(path: Path, array: np.ndarray, *, packed: bool) -> None:
    content = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    if packed:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def write_mnist(folder: Path, packed: tuple[bool, ...] = (True, True, True, True)) -> dict[str, np.ndarray]:
    arrays = {
        "train-images-idx3-ubyte": RNG.integers(0, 256, (40, 28, 28), dtype=np.uint8),
        "train-labels-idx1-ubyte": (np.arange(40) % 10).astype(np.uint8),
        "t10k-images-idx3-ubyte": RNG.integers(0, 256, (8, 28, 28), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": (np.arange(8) % 10).astype(np.uint8),
    }
    for (name, array), pack in zip(arrays.items(), packed, strict=True):
        write_idx(folder / name, array, packed=pack)
    return arrays


@pytest.mark.parametrize("packed", [(True,) * 4, (False,) * 4, (True, False, False, True)])
@pytest.mark.parametrize("where", ["FashionMNIST/raw", "FashionMNIST", "fashion-mnist"])
def test_fashion_mnist_as_published_is_found(packed: tuple[bool, ...], where: str, tmp_path: Path) -> None:
    arrays = write_mnist(tmp_path / where, packed)
    before = sorted(tmp_path.rglob("*"))
    data = pv.load_data("fashion-mnist", tmp_path)
    assert sizes(data) == (36, 4, 8)
    assert np.array_equal(data.test[:, 0].numpy(), arrays["t10k-images-idx3-ubyte"])
    assert data.labels["test"].tolist() == list(range(8))  # type: ignore[union-attr]
    assert sorted(tmp_path.rglob("*")) == before
    folder = pv.load_data(tmp_path / where)
    assert sizes(folder) == (36, 4, 8)
    assert torch.equal(folder.test, data.test)


def test_an_unpacked_file_goes_before_its_archive_and_a_broken_one_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "FashionMNIST" / "raw"
    write_mnist(folder)
    other = np.zeros((8, 28, 28), np.uint8)
    write_idx(folder / "t10k-images-idx3-ubyte", other, packed=False)
    assert not pv.load_data("fashion-mnist", tmp_path).test.any()
    archive = folder / "train-images-idx3-ubyte.gz"
    archive.write_bytes(archive.read_bytes()[:-400])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz.*fetch the file again"):
        pv.load_data("fashion-mnist", tmp_path)


def write_images(folder: Path, n: int, classes: tuple[str, ...] = (), size: int = 6) -> None:
    for i in range(n):
        inside = folder / classes[i % len(classes)] if classes else folder
        inside.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(60, 256, (size, size), dtype=np.uint8)).save(inside / f"{i:03}.png")


@pytest.mark.parametrize("classes", [(), ("a", "b")])
@pytest.mark.parametrize("names", [("train", "test"), ("Training", "val", "testing")])
def test_folders_of_splits(classes: tuple[str, ...], names: tuple[str, ...], tmp_path: Path) -> None:
    for name, n in zip(names, (20, 6, 8), strict=False):
        write_images(tmp_path / name, n, classes)
    data = pv.load_data(tmp_path)
    assert sizes(data) == ((18, 2, 6) if len(names) == 2 else (20, 6, 8))
    assert (data.labels["test"] is not None) == bool(classes)
    assert data.label_names == (classes or None)


def test_splits_that_differ_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "train", 6)
    write_images(tmp_path / "test", 6, size=5)
    with pytest.raises(UserError, match=r"the splits of .* differ"):
        pv.load_data(tmp_path)


@pytest.mark.parametrize("ending", ["pkl", "pickle", "joblib", "pt"])
def test_pickles_are_refused_with_the_reason_and_never_opened(ending: str, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / f"a.{ending}").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=r"is a pickle, and to unpickle a file is to run what it says.*np\.savez"):
        pv.load_data(tmp_path / f"a.{ending}")
    assert not (tmp_path / "ran").exists()


def test_a_table_of_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("height,weight,y\n" + "".join(f"{i}.5,{i * i},{i % 2}\n" for i in range(20)))
    data = pv.load_data(path)
    assert data.event_shape == (2,)
    assert data.levels is None
    assert data.labels["train"] is not None
    path.write_text("".join(f"{i};{i % 7}\n" for i in range(20)))
    assert pv.load_data(path).event_shape == (2,)
    path.write_text("".join(f"{i % 2}\t{i % 3 == 0:d}\n" for i in range(20)))
    assert pv.load_data(path.rename(tmp_path / "a.tsv")).levels == 2
    species = "".join(f"{i}.0,{'cat' if i % 2 else 'ant'}\n" for i in range(20))
    (tmp_path / "b.csv").write_text("size,label\n" + species)
    assert set(torch.cat([y for y in pv.load_data(tmp_path / "b.csv").labels.values() if y is not None]).tolist()) == {
        0,
        1,
    }
    (tmp_path / "c.csv").write_text("size,kind\n" + species)
    with pytest.raises(UserError, match=r"column kind .* holds 'ant'"):
        pv.load_data(tmp_path / "c.csv")
    (tmp_path / "d.csv").write_text("1,2\n3\n4,5\n")
    with pytest.raises(UserError, match=r"line 2 .* has 1 cells, and the first has 2"):
        pv.load_data(tmp_path / "d.csv")


def test_a_sparse_matrix_of_matlab(tmp_path: Path) -> None:
    counts = sparse.random(40, 9, 0.3, random_state=0, data_rvs=lambda n: RNG.integers(1, 50, n)).tocsc()
    scipy.io.savemat(tmp_path / "counts.mat", {"x": counts})
    data = pv.load_data(tmp_path / "counts.mat")
    assert data.levels is None
    assert float(sum(data.stored(s).sum() for s in SPLITS)) == counts.sum()


@pytest.mark.parametrize(
    "y", [np.arange(60).reshape(30, 2), np.linspace(0, 1, 30), np.zeros((30, 2, 3), np.float32), np.arange(30) > 4]
)
def test_y_of_any_shape_and_dtype_is_kept(y: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=rows(30, like=np.float64), y=y)
    data = pv.load_data(tmp_path / "a.npz")
    for split in SPLITS:
        found, index = data.labels[split], data.rows[split]
        assert found is not None
        assert index is not None
        assert np.array_equal(found.numpy(), y[index.numpy()])
        assert found.dtype == (torch.int64 if y.ndim == 1 and y.dtype.kind in "bi" else torch.from_numpy(y).dtype)
