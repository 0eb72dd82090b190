"""What preparation does to the numbers: lattice, binarization, dequantization, and loading the same again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.data import Data, load_data, preparation
from pyro_vae.data.names import SPLITS
from pyro_vae.data.preparation import BLOCK
from pyro_vae.seeding import seeded


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


@pytest.fixture
def grey(tmp_path: Path) -> Path:
    path = tmp_path / "grey.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (2600, 3, 4), dtype=np.uint8))
    return path


def same(a: Data, b: Data) -> bool:
    return all(torch.equal(a.observed(split), b.observed(split)) for split in SPLITS)


def test_observed_is_a_lattice_without_binarization(digits: Data) -> None:
    data = digits.with_(binarization="none")
    x = data.observed("test")
    assert x.dtype == torch.float32
    assert torch.equal(x, data.test.float() / 16)
    assert torch.equal(data.prepare(data.test), x)
    assert data.observed_levels == 17


@pytest.mark.parametrize(
    "how",
    [{"binarization": kind} for kind in ("none", "static", "dynamic", "threshold")] + [{"dequantization": "uniform"}],
)
def test_a_row_does_not_depend_on_the_rows_asked_for(grey: Path, how: dict[str, str]) -> None:
    data = load_data(grey, **how)
    assert len(data.train) > 2 * BLOCK
    whole = data.observed("train", seed=3)
    rows = torch.tensor([2079, 0, 5, 999, 1000, 1001, 5, 2000])
    assert torch.equal(data.observed("train", seed=3, rows=rows), whole[rows])
    assert torch.equal(data.observed("train", seed=3, rows=rows.tolist()), whole[rows])
    assert torch.equal(data.observed("train", seed=3), whole)
    assert data.observed("train", rows=[]).shape == (0, 1, 3, 4)
    drawn_anew = how.get("binarization") == "dynamic" or "dequantization" in how
    assert torch.equal(data.observed("train", seed=4), whole) is not drawn_anew


def test_splits_and_blocks_are_drawn_apart(tmp_path: Path) -> None:
    np.save(tmp_path / "half.npy", np.full((4000, 30), 128, dtype=np.uint8))
    data = load_data(tmp_path / "half.npy", binarization="dynamic", validation=1000)
    x, v = data.observed("train"), data.observed("validation")
    assert not torch.equal(x[:1000], x[1000:2000])
    assert not torch.equal(x[:1000], v)


@pytest.mark.parametrize("kind", ["static", "dynamic", "minibatch"])
def test_binarization_has_the_grey_level_as_its_mean(tmp_path: Path, kind: str) -> None:
    level = np.arange(256, dtype=np.uint8)
    np.save(tmp_path / "levels.npy", np.broadcast_to(level, (5000, 256)))
    data = load_data(tmp_path / "levels.npy", binarization="static" if kind == "static" else "dynamic")
    with seeded(0):
        x = (data.prepare(data.train) if kind == "minibatch" else data.observed("train")).double()
    n, p = len(x), torch.from_numpy(level / 255.0)
    assert x.unique().tolist() == [0.0, 1.0]
    assert (x.mean(0)[0], x.mean(0)[-1]) == (0, 1)
    # 254 z-scores below 4.5, two-sided: false alarm 254 * 6.8e-6 = 0.0017; the seed is fixed.
    z = (x.mean(0) - p)[1:-1] / (p * (1 - p) / n).sqrt()[1:-1]
    assert z.abs().max() < 4.5
    # Sum of squares of 254 scores: mean 254, sd 22.5; within 4.5 sd.
    assert abs((z**2).sum() - 254) < 4.5 * math.sqrt(2 * 254)


def test_pixels_of_a_minibatch_that_share_random_bits_are_uncorrelated(digits: Data) -> None:
    grey = torch.full((1000, 1, 8, 8), 8, dtype=torch.uint8)
    with seeded(0):
        x = digits.prepare(grey).double().flatten() - 0.5
    one, other = x.split(len(x) // 2)
    # a mean of 32,000 products of +-1/2; z below 4.5, two-sided: false alarm 6.8e-6
    assert (one * other).mean().abs() < 4.5 * 0.25 / math.sqrt(len(one))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 1, 1, 5), (7, 1, 3, 3)])
def test_a_minibatch_of_any_size_is_binarized(digits: Data, shape: tuple[int, ...]) -> None:
    with seeded(0):
        white, black = (digits.prepare(torch.full(shape, level, dtype=torch.uint8)) for level in (16, 0))
    assert torch.equal(white, torch.ones(shape))
    assert torch.equal(black, torch.zeros(shape))


def test_the_words_of_a_minibatch_are_those_of_splitmix64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first outputs for the seed 0, as published with implementations of the generator; number 0 comes before them."""
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: torch.tensor([0]))
    words = preparation._words(4, torch.device("cpu")).tolist()
    assert [w % 2**64 for w in words[1:]] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: torch.tensor([2]))
    assert preparation._words(4, torch.device("cpu")).tolist() == [words[n ^ 2] for n in range(4)]


def test_prepare_draws_anew_from_the_generator_given(digits: Data) -> None:
    x = digits.train[:100]
    one, two = (digits.prepare(x, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    again = digits.prepare(x, torch.Generator().manual_seed(1))
    assert torch.equal(one, again)
    assert not torch.equal(one, two)
    assert one.dtype == torch.float32


def test_static_is_drawn_once_and_stored(digits: Data) -> None:
    data = digits.with_(binarization="static")
    assert (data.levels, data.observed_levels, data.train.dtype) == (2, 2, torch.uint8)
    assert torch.equal(data.observed("train"), data.prepare(data.train))
    assert same(data, load_data("digits", binarization="static"))
    assert torch.equal(data.with_(binarization="dynamic").train, digits.train)
    assert same(data.with_(binarization="dynamic"), digits)


def test_threshold(digits: Data) -> None:
    data = digits.with_(binarization="threshold")
    assert torch.equal(data.observed("test"), (digits.test > 8).float())
    assert torch.equal(data.observed("test"), data.prepare(data.test))


@pytest.mark.parametrize("levels", [17, 256])
def test_dequantized_values_stay_inside_their_bin(tmp_path: Path, levels: int) -> None:
    if levels == 17:
        data = load_data("digits", dequantization="uniform")
    else:
        np.save(tmp_path / "x.npy", np.full((3000, 100), 255, dtype=np.uint8))
        data = load_data(tmp_path / "x.npy", dequantization="uniform")
    assert (data.binarization, data.observed_levels, data.levels) == ("none", None, levels)
    x = data.observed("train")
    assert torch.equal(torch.floor(x.double() * levels).to(torch.uint8), data.train)
    assert x.min() > 0
    assert x.max() < 1
    u = (x.double() * levels) % 1
    # Kolmogorov-Smirnov against U(0, 1): P(D > 2.6 / sqrt(n)) = 2 exp(-2 * 2.6^2) = 2.7e-6.
    n = u.numel()
    distance = (u.flatten().sort().values - (torch.arange(n, dtype=torch.float64) + 0.5) / n).abs().max()
    assert distance < 2.6 / math.sqrt(n)
    assert data.log_jacobian == pytest.approx(math.prod(data.event_shape) * math.log(levels))
    assert data.with_(dequantization="none").log_jacobian is None


@pytest.mark.parametrize(
    "how", [{"binarization": "dynamic"}, {"binarization": "threshold"}, {"dequantization": "uniform"}, {}]
)
def test_prepare_can_be_traced(grey: Path, how: dict[str, str]) -> None:
    data = load_data(grey, **how)
    a, b = data.train[:8], data.train[8:16]
    with torch.random.fork_rng():
        traced = make_fx(lambda stored: data.prepare(stored))(a)
        torch.manual_seed(0)
        expected = data.prepare(b)
        torch.manual_seed(0)
        assert torch.equal(traced(b), expected)


def test_mean_image(grey: Path) -> None:
    data = load_data(grey)
    assert torch.allclose(data.mean_image(), (data.train.double() / 255).mean(0).float(), atol=1e-7)
    assert data.mean_image().shape == data.event_shape
    moons = load_data("moons")
    assert torch.allclose(moons.mean_image(), moons.train.mean(0), atol=1e-6)


# Loading again


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"binarization": "static", "validation": 7},
        {"binarization": "none"},
        {"dequantization": "uniform", "validation": 0},
    ],
)
@pytest.mark.parametrize("name", ["digits", "file"])
def test_source_loads_the_same_again(grey: Path, name: str, how: dict[str, object]) -> None:
    data = load_data(grey if name == "file" else name, **how)
    again = load_data(**json.loads(json.dumps(data.source)))
    assert again.source == data.source
    assert same(data, again)
    changed = data.with_(binarization="threshold", dequantization="none")
    assert same(changed, load_data(**changed.source))
