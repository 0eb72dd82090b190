"""What data sets refuse: one line that names the value and says what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pyro_vae.data import load_data, static_mnist, torchvision_sets
from pyro_vae.errors import UserError
from pyro_vae.spec import build


def refused(call: Callable[[], Any], *expected: str) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    for pattern in expected:
        assert re.search(pattern, message), (pattern, message)
    return message


def png(path: Path, size: tuple[int, int] = (4, 4), mode: str = "L") -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mnits", "did you mean 'mnist'"),
        ("Static_MNIST", "did you mean 'static-mnist'"),
        ("zzzzzz", "choose from .*digits"),
        ("nowhere.npy", "there is no file 'nowhere.npy'"),
        ("no/where", "there is no file or folder 'no/where'"),
        ("data.csv", "'data.csv'"),
    ],
)
def test_unknown_names(name: str, expected: str) -> None:
    refused(lambda: load_data(name), expected)


def test_not_a_name() -> None:
    refused(lambda: load_data(np.zeros((3, 3))), "ndarray")  # type: ignore[arg-type]


def test_unknown_extension(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_text("1,2")
    refused(lambda: load_data(tmp_path / "a.xlsx"), r"a\.xlsx", r"'\.xlsx'", r"\.npy")


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (np.zeros((5, 2), complex), "complex128"),
        (np.array([["a"], ["b"], ["c"]]), "<U1"),
        (np.zeros((5, 2), "M8[s]"), "datetime64"),
        (np.zeros((5, 2), [("a", "f4")]), r"\('a', '<f4'\)"),
        (np.float32(1), r"shape \(\)"),
        (np.zeros(5), r"shape \(5,\)"),
        (np.zeros((0, 5)), "empty"),
        (np.zeros((5, 0)), "empty"),
        (np.zeros((2, 5)), "2 rows"),
        (np.full((5, 2), -1), "from -1 to -1"),
        (np.full((5, 2), 256), "256"),
    ],
)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_arrays_that_are_no_data(tmp_path: Path, suffix: str, x: np.ndarray, expected: str) -> None:
    path = tmp_path / f"odd.{suffix}"
    if suffix == "npy":
        np.save(path, x)
    else:
        np.savez(path, x=x)
    refused(lambda: load_data(path), expected, "odd")


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_pickles_are_not_opened(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"odd.{suffix}"
    x = np.array([{"a": 1}, None, "b"], dtype=object)
    if suffix == "npy":
        np.save(path, x)
    else:
        np.savez(path, x=x)
    refused(lambda: load_data(path), "odd", "unpickled", r"np\.save")


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("damage", ["empty", "text", "header", "cut", "overwritten"])
def test_damaged_files(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"bad.{suffix}"
    x = np.random.default_rng(0).standard_normal((50, 20))
    if suffix == "npy":
        np.save(path, x)
    else:
        np.savez_compressed(path, x=x)
    whole = path.read_bytes()
    spoiled = {
        "empty": b"",
        "text": b"not an array at all",
        "header": whole[:20],
        "cut": whole[: len(whole) // 2],
        "overwritten": whole[:30] + b"\xff" * 60 + whole[90:],
    }[damage]
    path.write_bytes(spoiled)
    refused(lambda: load_data(path), "bad")


def test_npz_without_a_single_array(tmp_path: Path) -> None:
    np.savez(tmp_path / "many.npz", a=np.zeros((5, 2)), b=np.zeros((4, 2)))
    refused(lambda: load_data(tmp_path / "many.npz"), r"a .5, 2., b .4, 2.", "named x")
    np.savez(
        tmp_path / "many.npz", a=np.zeros((5, 2)), b=np.zeros((5, 2))
    )  # columns, for programs that read them by name
    refused(lambda: build("mlp", "diagonal", load_data(tmp_path / "many.npz")), "column 'x'", "a, b")
    np.savez(tmp_path / "none.npz")
    refused(lambda: load_data(tmp_path / "none.npz"), "none")


def test_npz_under_another_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((5, 2)))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    refused(lambda: load_data(tmp_path / "a.npy"), r"\.npz archive")


@pytest.mark.parametrize("y", [np.zeros(5, complex), np.array(list("abcde")), np.array(3)])
def test_labels_that_do_not_fit(tmp_path: Path, y: np.ndarray) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((5, 2)), y=y)
    refused(lambda: load_data(tmp_path / "a.npz"), "labels", "each of the 5 rows")


# Folders


def test_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_text("")
    refused(lambda: load_data(tmp_path), "holds no image", re.escape(tmp_path.name))


def test_folder_with_another_file(tmp_path: Path) -> None:
    for i in range(3):
        png(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("hello")
    refused(lambda: load_data(tmp_path), r"'notes\.txt'", "is not an image")


def test_folder_with_a_damaged_image(tmp_path: Path) -> None:
    for i in range(3):
        png(tmp_path / f"{i}.png", size=(64, 64))
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    refused(lambda: load_data(tmp_path), r"'1\.png'", "is not an image")


def test_folder_of_different_sizes(tmp_path: Path) -> None:
    for i in range(3):
        png(tmp_path / f"{i}.png", size=(4, 5 + i // 2))
    refused(lambda: load_data(tmp_path), r"'0\.png' is 4 x 5 L", r"'2\.png' is 4 x 6 L")


def test_folder_of_different_modes(tmp_path: Path) -> None:
    for i in range(3):
        png(tmp_path / f"{i}.png", mode="RGB" if i == 1 else "L")
    refused(lambda: load_data(tmp_path), r"'0\.png' is 4 x 4 L", r"'1\.png' is 4 x 4 RGB")


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "CMYK", "I;16"])
def test_folder_of_another_mode(tmp_path: Path, mode: str) -> None:
    for i in range(3):
        Image.new(mode, (4, 4)).save(tmp_path / f"{i}.{'tiff' if mode == 'CMYK' else 'png'}")
    refused(lambda: load_data(tmp_path), f"mode {mode}", r"'0\.(png|tiff)'")


def test_folder_of_too_few(tmp_path: Path) -> None:
    png(tmp_path / "0.png")
    refused(lambda: load_data(tmp_path), "1 images", "at least 3")


def test_folders_in_folders(tmp_path: Path) -> None:
    for i in range(3):
        png(tmp_path / "a" / f"{i}.png")
    (tmp_path / "b").mkdir()
    refused(lambda: load_data(tmp_path), "'b' holds no image")
    png(tmp_path / "b" / "c" / "0.png")
    refused(lambda: load_data(tmp_path), "'b/c'", "two levels")
    png(tmp_path / "0.png")
    refused(lambda: load_data(tmp_path), "'0.png'", "beside")


# Named data sets


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("static-mnist", r"BinarizedMNIST/binarized_mnist_train\.amat.*valid.*test"),
        ("omniglot", r"OMNIGLOT/chardata\.mat"),
        ("frey-face", r"FreyFace/frey_rawface\.mat"),
    ],
)
def test_missing_files(tmp_path: Path, name: str, file: str) -> None:
    refused(lambda: load_data(name, tmp_path), name, file, "PYRO_VAE_DATA", re.escape(str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("mnist", "MNIST/raw/train-images-idx3-ubyte, MNIST/raw/train-labels-idx1-ubyte, .*MNIST/raw/t10k-labels"),
        ("fashion-mnist", "FashionMNIST/raw/train-images-idx3-ubyte"),
        ("kmnist", "KMNIST/raw/train-images-idx3-ubyte"),
        ("cifar10", r"cifar-10-batches-py/data_batch_1.*batches\.meta"),
    ],
)
def test_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, files: str) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("the network\nis down")

    for function in ("torchvision.datasets.mnist", "torchvision.datasets.cifar"):
        monkeypatch.setattr(f"{function}.download_and_extract_archive", offline)
    root = tmp_path / "new" / "root"
    refused(lambda: load_data(name, root), files, "downloading failed", "PYRO_VAE_DATA")
    assert not root.parent.exists()


def test_download_moves_whole_files_only(tmp_path: Path) -> None:
    class Fake:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            assert (Path(root) / "MNIST" / "raw" / "b.gz").read_text() == "archive"
            (Path(root) / "MNIST" / "raw" / "b").write_text("content")

    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "MNIST" / "raw" / "b.gz").write_text("archive")
    torchvision_sets.download(Fake, tmp_path, ["MNIST/raw/a.gz", "MNIST/raw/b.gz"])
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["MNIST/raw/b", "MNIST/raw/b.gz"]


def test_damaged_mnist(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{part}-{kind}-ubyte").write_bytes(b"\0\0\x08\x03spoiled")
    refused(lambda: load_data("mnist", tmp_path), "does not hold mnist", "fetch")


@pytest.mark.parametrize(("text", "why"), [(b"0 1 2\n", "'2'"), (b"0 1 0\n", "3 values"), (b"", "0 values")])
def test_damaged_static_mnist(tmp_path: Path, text: bytes, why: str) -> None:
    (tmp_path / "BinarizedMNIST").mkdir()
    for part in static_mnist.NUM_ROWS:
        (tmp_path / "BinarizedMNIST" / f"binarized_mnist_{part}.amat").write_bytes(text)
    refused(lambda: load_data("static-mnist", tmp_path), why, "binarized_mnist_train")


@pytest.mark.parametrize(
    ("name", "file"), [("frey-face", "FreyFace/frey_rawface.mat"), ("omniglot", "OMNIGLOT/chardata.mat")]
)
def test_damaged_mat_files(tmp_path: Path, name: str, file: str) -> None:
    from scipy.io import savemat

    path = tmp_path / file
    path.parent.mkdir()
    path.write_bytes(b"not a MATLAB file" * 20)
    refused(lambda: load_data(name, tmp_path), f"does not hold {name}")
    savemat(path, {"other": np.zeros((3, 3))})
    refused(lambda: load_data(name, tmp_path), "no such array")
    savemat(path, {"ff": np.zeros((3, 3)), "data": np.zeros((3, 3))})
    refused(lambda: load_data(name, tmp_path), r"shape \(3, 3\)")
    savemat(path, {"ff": np.full((560, 5), 2.0), "data": np.full((784, 5), 2.0)})
    refused(lambda: load_data(name, tmp_path), "expected")


# Preparation


@pytest.mark.parametrize(
    ("name", "how", "expected"),
    [
        ("digits", {"binarization": "dynamc"}, "'dynamc'.*did you mean 'dynamic'"),
        ("digits", {"dequantization": "normal"}, "'normal'"),
        ("digits", {"binarization": "static", "dequantization": "uniform"}, "exclude"),
        ("digits", {"validation": -1}, "-1"),
        ("digits", {"validation": 2.5}, r"2\.5"),
        ("digits", {"validation": True}, "True"),
        ("digits", {"validation": 1618}, "1618.*at most 1617"),
        ("moons", {"binarization": "dynamic"}, "moons holds floats"),
        ("moons", {"binarization": "static"}, "moons holds floats"),
        ("moons", {"dequantization": "uniform"}, "moons holds floats"),
    ],
)
def test_preparations_that_cannot_be(name: str, how: dict[str, Any], expected: str) -> None:
    refused(lambda: load_data(name, **how), expected)


@pytest.mark.parametrize(
    "how", [{"binarization": "dynamic"}, {"binarization": "threshold"}, {"dequantization": "uniform"}]
)
def test_binary_data_are_binary(tmp_path: Path, how: dict[str, str]) -> None:
    np.save(tmp_path / "b.npy", np.ones((5, 2), bool))
    refused(lambda: load_data(tmp_path / "b.npy", **how), "b.npy", "binary")  # type: ignore[arg-type]


def test_with_and_observed() -> None:
    data = load_data("digits")
    refused(lambda: data.with_(dequantization="uniform"), "exclude")
    refused(lambda: data.with_(binarization="statik"), "did you mean 'static'")
    refused(lambda: data.observed("tset"), "'tset'.*did you mean 'test'")
    refused(lambda: data.observed("test", rows=[0, 179]), "row 179.*179 rows")
    refused(lambda: data.observed("test", rows=[-1]), "row -1")
    refused(lambda: data.observed("test", rows=torch.tensor([0.5])), "float32")
    refused(lambda: data.observed("test", rows=torch.ones(179, dtype=torch.bool)), "bool")
    refused(lambda: data.observed("test", rows=torch.zeros(2, 2, dtype=torch.int64)), r"\(2, 2\)")
