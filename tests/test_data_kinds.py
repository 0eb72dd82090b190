"""What a file or a picture holds is read as what it is, or refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import sparse

import pyro_vae as pv
from pyro_vae.data import arrays, load_data
from pyro_vae.errors import UserError

BITS = (np.random.default_rng(0).random((40, 6, 6)) < 0.3).astype(np.uint8)
GREY = np.random.default_rng(1).integers(0, 256, (40, 6, 6)).astype(np.uint8)


def save_pictures(folder: Path, pictures: list[Image.Image], suffix: str = "png", **how: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i:02d}.{suffix}", **how)
    return folder


def save_array(folder: Path, x: np.ndarray) -> Path:
    np.save(folder / "x.npy", x)
    return folder / "x.npy"


@pytest.mark.parametrize(
    "save",
    [
        *(lambda p, d=d: save_array(p, BITS.astype(d)) for d in ("u1", "i8", ">u2", "?", "i1")),
        lambda p: save_pictures(p / "mask", [Image.fromarray(m) for m in BITS]),
        lambda p: save_pictures(p / "bit", [Image.fromarray(m.astype(bool)) for m in BITS]),
        lambda p: save_pictures(
            p / "fax", [Image.fromarray(m.astype(bool)) for m in BITS], "tiff", compression="group4"
        ),
        lambda p: save_pictures(p / "bmp", [Image.fromarray(m.astype(bool)) for m in BITS], "bmp"),
    ],
)
@pytest.mark.parametrize("large", [False, True])
def test_zeros_and_ones_are_binary(
    save: Callable[[Path], Path], large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever they are stored in; two of 256 levels would train on black."""
    if large:
        monkeypatch.setattr(arrays, "IN_MEMORY_BYTES", 0)
    path = save(tmp_path)
    data = load_data(path)
    assert (data.levels, data.binarization, data.observed_levels) == (2, "static", 2)
    seen = torch.cat([data.observed(split) for split in ("train", "validation", "test")])
    assert seen.mean().item() == pytest.approx(BITS.mean(), abs=1e-6)
    assert load_data(path, binarization="none").observed("train").unique().tolist() == [0, 1]
    for how in ("dynamic", "threshold"):
        with pytest.raises(UserError, match="it is binary already"):
            load_data(path, binarization=how)


@pytest.mark.parametrize(("high", "warned"), [(2, True), (16, True), (31, True), (32, False), (255, False)])
def test_dark_levels_are_warned_of(high: int, warned: bool, tmp_path: Path) -> None:
    """Four-bit pictures, class numbers and counts in uint8 are nearly black as grey levels."""
    x = np.random.default_rng(0).integers(0, high + 1, (30, 5, 5)).astype(np.uint8)
    x[-1, -1, -1] = high
    for path in (save_array(tmp_path, x), save_pictures(tmp_path / "p", [Image.fromarray(m) for m in x])):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert load_data(path).levels == 256
        said = [str(w.message) for w in caught]
        assert len(said) == warned
        assert all(f"up to {high}, and grey levels go to 255" in text for text in said)


def test_floats_under_binarization_are_told_how_to_become_grey(tmp_path: Path) -> None:
    """The advice, followed, gives the grey levels; casting alone would give black."""
    x = GREY / np.float32(255)
    with pytest.raises(UserError, match=r"np\.rint\(255 \* x\)\.astype\(np\.uint8\)"):
        load_data(save_array(tmp_path, x), binarization="dynamic")
    data = load_data(save_array(tmp_path, np.rint(255 * x).astype(np.uint8)), binarization="dynamic")
    assert torch.equal(data.train[:, 0], torch.from_numpy(GREY)[data.rows["train"]])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff"])
def test_photographs_stand_upright(orientation: int, suffix: str, tmp_path: Path) -> None:
    """Each of the eight orientations of EXIF, stored so that a viewer shows the same picture."""
    upright = np.zeros((8, 8, 3), np.uint8)
    upright[:4, :, 0], upright[:, :4, 1] = 255, 255
    back = {
        2: "FLIP_LEFT_RIGHT",
        3: "ROTATE_180",
        4: "FLIP_TOP_BOTTOM",
        5: "TRANSPOSE",
        6: "ROTATE_90",
        7: "TRANSVERSE",
        8: "ROTATE_270",
    }
    picture, exif = Image.fromarray(upright), Image.Exif()
    if orientation > 1:
        picture = picture.transpose(Image.Transpose[back[orientation]])
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    x = load_data(save_pictures(tmp_path / "photos", [picture] * 3, suffix, exif=exif, **options)).train[0]
    assert (x.permute(1, 2, 0).float() - torch.from_numpy(upright).float()).abs().max() < 40


def frames(suffix: str) -> Callable[[Path], Path]:
    pictures = [Image.fromarray(GREY[i]) for i in range(3)]
    return lambda p: save_pictures(p / "film", pictures[:1] * 3, suffix, save_all=True, append_images=pictures[1:])


def sixteen(p: Path) -> Path:
    """Three PNG files of 16 bits per channel, in colour, which Pillow would cut to 8 without a word."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head, rows = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0), b"".join(b"\0" + bytes(24) for _ in range(4))
    (p / "deep").mkdir()
    for i in range(3):
        whole = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        (p / "deep" / f"{i}.png").write_bytes(whole)
    return p / "deep"


@pytest.mark.parametrize(
    ("save", "expected"),
    [
        (frames("gif"), "'00.gif' has 3 frames"),
        (frames("tiff"), "'00.tiff' has 3 frames"),
        (frames("png"), "'00.png' has 3 frames"),
        (frames("webp"), "'00.webp' has 3 frames"),
        (lambda p: save_pictures(p / "a", [Image.fromarray(GREY[0]).convert("RGBA")] * 3), "mode RGBA"),
        (lambda p: save_pictures(p / "a", [Image.fromarray(GREY[0]).convert("P")] * 3), "mode P"),
        (lambda p: save_pictures(p / "a", [Image.fromarray(GREY[0])] * 3, transparency=0), "a transparent colour"),
        (lambda p: save_pictures(p / "a", [Image.fromarray(GREY[0].astype(np.uint16) * 256)] * 3), "mode I;16"),
        (lambda p: save_pictures(p / "a", [Image.fromarray(GREY[0].astype(np.float32))] * 3, "tiff"), "mode F"),
        (sixteen, "16 bits per channel"),
    ],
)
def test_pictures_of_which_a_part_would_be_read(save: Callable[[Path], Path], expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_data(save(tmp_path))
    assert expected in str(caught.value)


@pytest.mark.parametrize("kind", ["csr", "csc", "coo", "bsr", "dia"])
def test_sparse_matrices(kind: str, tmp_path: Path) -> None:
    """SciPy's, in each of its formats: the dense matrix; counts in floats, zeros and ones as binary."""
    counts = np.random.default_rng(0).poisson(0.4, (30, 7))
    for matrix, levels in ((counts, None), (counts.astype(np.float32) / 2, None), (np.minimum(counts, 1), 2)):
        sparse.save_npz(tmp_path / "own.npz", getattr(sparse, f"{kind}_matrix")(matrix))
        data = load_data(tmp_path / "own.npz")
        assert data.levels == levels
        assert np.array_equal(data.train.numpy(), matrix[data.rows["train"].numpy()])


@pytest.mark.parametrize(
    ("names", "sizes"),
    [
        ({"x_train": 30, "y_train": 30, "x_test": 9, "y_test": 9}, (27, 3, 9)),
        (
            {
                "train_images": 30,
                "train_labels": 30,
                "val_images": 6,
                "val_labels": 6,
                "test_images": 9,
                "test_labels": 9,
            },
            (30, 6, 9),
        ),
        ({"data_train": 30, "data_valid": 5, "data_test": 9}, (30, 5, 9)),
    ],
)
def test_a_split_of_its_own_is_respected(names: dict[str, int], sizes: tuple[int, ...], tmp_path: Path) -> None:
    """As Keras and MedMNIST file theirs: the test rows are those that the file says."""
    parts = {name: np.full((n, 1), n) if name[0] == "y" or "labels" in name else GREY[:n] for name, n in names.items()}
    parts |= {name: GREY[-9:] for name in parts if "test" in name and parts[name].ndim == 3}
    np.savez(tmp_path / "own.npz", **parts)
    data = load_data(tmp_path / "own.npz")
    assert (len(data.train), len(data.validation), len(data.test)) == sizes
    assert torch.equal(data.test[:, 0], torch.from_numpy(GREY[-9:]))
    of_test = data.labels["test"]
    assert (of_test is None) == (len(names) == 3)
    assert of_test is None or of_test.tolist() == [9] * 9


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"x": GREY, "y": np.zeros(39, int)}, "40 rows and 39 labels"),
        ({"x": GREY, "y": np.zeros(40, complex)}, "the labels of own.npz are complex128"),
        ({"x": GREY, "y": np.array(["a"] * 40)}, "the labels of own.npz are <U1"),
        ({"x": GREY, "y": np.array([{}] * 40)}, "Python objects"),
        ({"x": np.array([GREY[0], None], dtype=object)}, "Python objects"),
        ({"x": GREY.astype(complex)}, "own.npz holds complex128"),
        ({"x_train": GREY, "x_test": GREY[:, :5]}, "of one dtype and event shape"),
        (
            {"x_train": GREY, "y_train": np.zeros(40, int), "x_test": GREY, "y_test": np.zeros(4, int)},
            "4 labels in y_test",
        ),
    ],
)
def test_archives_that_are_no_data(content: dict[str, Any], expected: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", **content)
    with pytest.raises(UserError) as caught:
        load_data(tmp_path / "own.npz")
    assert expected in str(caught.value)


def test_folders_named_like_splits_are_no_classes(tmp_path: Path) -> None:
    """They would be mixed and cut anew: what the user calls training data would be in the test split."""
    for name in ("Train", "test"):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.fromarray(np.full((4, 4), 20 * i + (name == "test"), dtype=np.uint8)).save(
                tmp_path / name / f"{i}.png"
            )
    data = pv.load_data(tmp_path, validation=1)
    assert [len(data.stored(split)) for split in ("train", "validation", "test")] == [3, 1, 4]
    assert sorted(int(x[0, 0, 0]) for x in data.test) == [1, 21, 41, 61]
    assert data.rows["test"] is None
    assert len(pv.load_data(tmp_path / "Train").train) == 2
    (tmp_path / "Train").rename(tmp_path / "val")
    with pytest.raises(UserError, match=r"named like splits .*val.*would be read as classes"):
        pv.load_data(tmp_path)
    (tmp_path / "test").rename(tmp_path / "cats")  # one name of a class is enough
    assert set(pv.load_data(tmp_path).labels["train"].tolist()) <= {0, 1}  # type: ignore[union-attr]


def test_labels_that_int64_does_not_hold_are_refused(tmp_path: Path) -> None:
    y = np.array([2**63, 1, 2, 3], dtype=np.uint64)  # which would be -2^63
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 3), np.float32), y=y)
    with pytest.raises(UserError, match="reach 9223372036854775808"):
        pv.load_data(tmp_path / "a.npz")


def test_rows_and_seeds_of_a_split_are_checked() -> None:
    data = pv.load_data("digits")
    for seed in (None, "a", 1.5, True):
        with pytest.raises(UserError, match="observed: expected seed to be a whole number"):
            data.observed("test", seed=seed)  # type: ignore[arg-type]
    for rows in (slice(0, 3), "01", [[0], [1, 2]]):
        with pytest.raises(UserError, match="rows must be a list of row numbers"):
            data.observed("test", rows=rows)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="every axis of the event shape to be a whole number"):
        pv.build("mlp", "diagonal", (1, 8, 8.5))
