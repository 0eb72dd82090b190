"""A user's own arrays, archives and folders of images."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_vae.data import Data, arrays, load_data
from pyro_vae.data.names import SPLITS
from pyro_vae.data.rows import RowView


@pytest.fixture(autouse=True)
def _untouched_generators() -> object:
    """Nothing here may draw from, or seed, the global generators."""
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    yield
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


@pytest.fixture
def grey(tmp_path: Path) -> Path:
    path = tmp_path / "grey.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (2600, 3, 4), dtype=np.uint8))
    return path


def same(a: Data, b: Data) -> bool:
    return all(torch.equal(a.observed(split), b.observed(split)) for split in SPLITS)


@pytest.mark.parametrize(
    ("x", "stored", "shape", "levels"),
    [
        (np.full((30, 5), 200, np.uint8), torch.uint8, (5,), 256),
        (np.full((30, 5, 4), 200, np.uint8), torch.uint8, (1, 5, 4), 256),
        (np.full((30, 8, 9, 3), 200, np.uint8), torch.uint8, (3, 8, 9), 256),
        (np.full((30, 3, 8, 9), 200, np.uint8), torch.uint8, (3, 8, 9), 256),
        (np.full((30, 8, 9, 5), 200, np.uint8), torch.uint8, (8, 9, 5), 256),
        (np.ones((30, 5, 4), bool), torch.uint8, (1, 5, 4), 2),
        (np.ones((30, 5, 4), np.uint8), torch.uint8, (1, 5, 4), 2),
        (np.ones((30, 5), np.int32), torch.uint8, (5,), 2),
        (np.full((30, 5), 255, np.int64), torch.uint8, (5,), 256),
        (np.full((30, 5), 255, ">u2"), torch.uint8, (5,), 256),
        (np.ones((30, 5), np.float16), torch.float32, (5,), None),
        (np.ones((30, 5, 4, 3), np.float64), torch.float64, (5, 4, 3), None),
        (np.ones((30, 2, 3, 4, 5), ">f8"), torch.float64, (2, 3, 4, 5), None),
    ],
)
@pytest.mark.parametrize("large", [False, True])
def test_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, x: np.ndarray, stored: torch.dtype, shape: tuple[int, ...],
    levels: int | None, large: bool,
) -> None:  # fmt: skip
    if large:
        monkeypatch.setattr(arrays, "IN_MEMORY_BYTES", 0)
    np.save(tmp_path / "x.npy", x)
    data = load_data(tmp_path / "x.npy")
    assert isinstance(data.train, RowView if large else Tensor)
    assert (data.train.dtype, data.event_shape, data.levels) == (stored, shape, levels)
    assert tuple(data.train.shape) == (24, *shape)
    assert data.binarization == ("static" if levels == 2 else "none")
    expected = x.max() / 255 if levels == 256 else 1
    assert torch.equal(data.observed("test"), torch.full((3, *shape), float(expected)))


def test_channels_last_is_moved_not_reshaped(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (10, 6, 5, 3), dtype=np.uint8)
    np.save(tmp_path / "x.npy", x)
    data = load_data(tmp_path / "x.npy")
    assert np.array_equal(data.train.numpy(), x.transpose(0, 3, 1, 2)[data.rows["train"].numpy()])


@pytest.mark.parametrize(
    "how", [{}, {"binarization": "dynamic"}, {"binarization": "static"}, {"dequantization": "uniform"}]
)
def test_a_memory_mapped_file_gives_the_same(grey: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, str]) -> None:
    before = grey.read_bytes()
    small = load_data(grey, **how)
    monkeypatch.setattr(arrays, "IN_MEMORY_BYTES", 0)
    large = load_data(grey, **how)
    assert isinstance(large.train, RowView) == (how != {"binarization": "static"})
    assert same(small, large)
    assert torch.equal(small.mean_image(), large.mean_image())
    index = torch.tensor([3, 1, 1000, 3])
    assert torch.equal(large.train[index], small.train[index])
    assert torch.equal(large.train[2:7], small.train[2:7])
    assert torch.equal(large.train[-1], small.train[-1])
    if isinstance(large.train, RowView):
        large.train[0:3].fill_(7)
    assert same(small, large)
    assert grey.read_bytes() == before


def test_a_file_larger_than_the_memory_opens(tmp_path: Path) -> None:
    rows = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    path = tmp_path / "sparse.npy"
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (rows, 1 << 20)})
        begin = file.tell()
        file.write(b"\xc8")  # grey levels: whether all are 0 or 1, only a file's end could say
        file.truncate(begin + (rows << 20))
    data = load_data(path)
    assert isinstance(data.train, RowView)
    assert data.train.shape[1:] == (1 << 20,)
    assert not data.observed("test", rows=[0, 3]).any()


def test_a_memory_mapped_view_refuses_other_indices(grey: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "IN_MEMORY_BYTES", 0)
    view = load_data(grey).train
    with pytest.raises(TypeError, match="tensor of ints"):
        view[torch.ones(len(view), dtype=torch.bool)]
    with pytest.raises(IndexError):
        view[len(view)]
    assert "\n" not in repr(view)


@pytest.mark.parametrize("key", ["x", "data", "images", "anything"])
@pytest.mark.parametrize("label_key", ["y", "labels", None])
def test_npz(tmp_path: Path, key: str, label_key: str | None) -> None:
    x = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    y = np.arange(20, dtype=np.int32)
    np.savez(tmp_path / "a.npz", **{key: x}, **({label_key: y} if label_key else {}))
    data = load_data(tmp_path / "a.npz")
    for split in SPLITS:
        assert np.array_equal(data.stored(split).numpy(), x[data.rows[split].numpy()])
        assert (data.labels[split] is None) == (label_key is None)
        if label_key:
            assert torch.equal(data.labels[split], data.rows[split])


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("classes", [False, True])
def test_folder_of_images(tmp_path: Path, mode: str, classes: bool) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    channels = {"L": (), "RGB": (3,)}[mode]
    x = rng.integers(0, 256, (12, 7, 5, *channels), dtype=np.uint8)
    folder = tmp_path / "pictures"
    for i, pixels in enumerate(x):
        path = folder / (("cat" if i < 6 else "dog") if classes else "") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (folder / ".hidden").write_text("passed over")
    (folder / ".cache").mkdir()
    data = load_data(folder, validation=2)
    assert data.name == "pictures"
    assert data.event_shape == ({"L": 1, "RGB": 3}[mode], 7, 5)
    whole = x.reshape(12, 7, 5, -1).transpose(0, 3, 1, 2)
    for split in SPLITS:
        rows = data.rows[split]
        assert np.array_equal(data.stored(split).numpy(), whole[rows.numpy()])
        assert (data.labels[split] is None) is not classes
        if classes:
            assert torch.equal(data.labels[split], (rows >= 6).long())
    assert data.label_names == (("cat", "dog") if classes else None)
    assert same(data, load_data(**json.loads(json.dumps(data.source))))
