"""Every row is held to the likelihood before the first step, or when it is read; what a Dataset yields is taken or refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

import pyro_vae as pv
from pyro_vae.errors import DataError, UserError
from pyro_vae.seeding import seeded

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Programs by hand draw their weights from the global generators, which are put back."""
    with seeded(0):
        yield


class Items(Dataset[Any]):
    """Whatever a function makes of a number."""

    def __init__(self, item: Callable[[int], Any], n: int = 64) -> None:
        self.item, self.n = item, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        return self.item(index)


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(X)

    def __len__(self) -> int:
        return len(X)


def ppca(n: int = 4) -> Any:
    return pv.build("ppca", "linear", (n,), latent_dim=2)


def vae(shape: tuple[int, ...], likelihood: str) -> Any:
    small = "mlp:hidden=[4]"
    return pv.build("mixture", "diagonal", shape, latent_dim=2, likelihood=likelihood, encoder=small, decoder=small)


def fit(program: Any, data: Any, **how: Any) -> pv.Run:
    return pv.fit(program, data, **{"epochs": 1, "compile": "off", **how})


def late(good: Any, bad: Any, n: int, at: int) -> np.ndarray:
    x = np.full((n, 3, 3), good)
    x[at, 1, 1] = bad
    return x


@pytest.mark.parametrize("at", [0, 8, 1000, 1199])
@pytest.mark.parametrize(
    ("likelihood", "good", "bad"),
    [("bernoulli", 1.0, 0.5), ("poisson", 3.0, 2.5), ("continuous-bernoulli", 0.5, -0.1)],
)
def test_every_row_is_held_to_the_support(likelihood: str, good: float, bad: float, at: int, tmp_path: Path) -> None:
    """A single element of a single row, wherever it is; in a tensor, a file and a Dataset; nothing is left of the run."""
    x = late(good, bad, 1200, at).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    file, tensor = pv.load_data(tmp_path / "x.npy", validation=0), torch.from_numpy(x)
    for name, data in (("file", file), ("tensor", tensor), ("dataset", TensorDataset(tensor))):
        in_file = name == "file" and file.rows["train"] is not None
        kept = file.rows["train"].tolist() if in_file and file.rows["train"] is not None else list(range(1200))
        if at not in kept:
            continue
        with pytest.raises(DataError) as caught:
            fit(vae((3, 3), likelihood), data, batch_size=64, out=tmp_path / name)
        assert f"the data hold {bad}" in str(caught.value)
        assert f"first in row {kept.index(at)})" in str(caught.value)
        if in_file:
            assert f"row {kept.index(at)} of the training split is row {at} of x.npy" in str(caught.value)
        assert not (tmp_path / name).exists()


def test_a_validation_row_is_held_to_the_support(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.full((100, 4), 2.0, dtype=np.float32))
    row = int(pv.load_data(tmp_path / "x.npy").rows["validation"][3])  # type: ignore[index]
    x = np.full((100, 4), 2.0, dtype=np.float32)
    x[row, 2] = -1
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(DataError, match="in the validation split, the data hold -1"):
        fit(vae((4,), "poisson"), pv.load_data(tmp_path / "x.npy"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_levels_are_looked_at_and_not_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Black and white of 256 levels is binary; one grey pixel in the last row is not, and is named."""
    from pyro_vae.training import admission

    x = np.random.default_rng(0).integers(0, 2, (3000, 3, 3)).astype(np.uint8) * 255
    np.save(tmp_path / "x.npy", x)
    read: list[int] = []
    look = admission._look_at
    monkeypatch.setattr(admission, "_look_at", lambda *args: (read.append(1), look(*args))[1])
    fit(vae((1, 3, 3), "bernoulli"), pv.load_data(tmp_path / "x.npy", validation=0))
    assert not read
    fit(vae((1, 3, 3), "bernoulli"), pv.load_data(tmp_path / "x.npy", binarization="dynamic"))
    assert not read
    row = int(pv.load_data(tmp_path / "x.npy").rows["train"][-1])  # type: ignore[index]
    x[row, 2, 2] = 51
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(DataError, match=rf"hold 0.2, .* is row {row} of x.npy"):
        fit(vae((1, 3, 3), "bernoulli"), pv.load_data(tmp_path / "x.npy"))


class Around(nn.Module):
    """A program that leaves missing entries out."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(2, 4)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.NanMaskedNormal(self.decoder(z), x.new_ones(())).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            loc, raw = self.encoder(x.nan_to_num()).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw) + 1e-3).to_event(1))


@pytest.mark.parametrize("row", [0, 7, 40])
@pytest.mark.parametrize("wrap", [lambda x: x, TensorDataset])
def test_missing_values_are_named_by_row_and_column(row: int, wrap: Callable[[Tensor], Any], tmp_path: Path) -> None:
    """Where the program has no density for them; where it has one, it trains."""
    x = X.clone()
    x[row, 3] = float("nan")
    with pytest.raises(UserError) as caught:
        fit(ppca(), wrap(x), out=tmp_path / "run")
    assert f"row {row}" in str(caught.value)
    assert "remove or impute them" in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert fit(Around(), wrap(x)).metrics[0]["train_loss"] < 100
    x[row, 2] = float("inf")
    with pytest.raises(UserError, match="infinite"):
        fit(ppca(), wrap(x))


@pytest.mark.parametrize(
    "item",
    [
        lambda i: X[i],
        lambda i: (X[i],),
        lambda i: [X[i], 3],
        lambda i: (X[i], None),
        lambda i: (X[i], torch.zeros(i % 3)),
        lambda i: (X[i], "a name", {"more": i}),
        lambda i: {"x": X[i], "name": "a"},
        lambda i: X[i].numpy(),
        lambda i: X[i].numpy().astype(">f8"),
        lambda i: (X[i].numpy()[::-1].copy()[::-1], i),
        lambda i: X[i].clone().requires_grad_(),
    ],
)
def test_items_of_which_x_is_taken(item: Callable[[int], Any]) -> None:
    """The same training as by the tensor itself, whatever else an item holds."""
    reference, program = ppca(), ppca()
    assert fit(program, Items(item)).metrics[0]["train_loss"] == fit(reference, X).metrics[0]["train_loss"]
    assert all(torch.equal(a, b) for a, b in zip(program.parameters(), reference.parameters(), strict=True))


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (lambda i: None, "item 0 of Items is, or starts with, NoneType"),
        (lambda i: 3.0, "starts with, float"),
        (lambda i: X[i, 0], "item 0 of Items is a single number"),
        (lambda i: "text", "starts with, str"),
        (lambda i: (), "starts with, tuple"),
        (lambda i: np.array(["a", "b"]), "starts with, ndarray"),
        (lambda i: np.array([None, 1]), "starts with, ndarray"),
        (
            lambda i: (Image.new("L", (2, 2)), 0),
            "starts with, Image: expected a tensor or array (*event): turn pictures",
        ),
        (lambda i: X[i, : 3 + i % 2], "bring all to one shape"),
        (lambda i: {"image": X[i], "label": 0}, "does not run on a record of the columns image"),
        (lambda i: X[i].to_sparse(), "got a sparse coo one"),
        (lambda i: torch.complex(X[i], X[i]), "got a complex one"),
        (lambda i: X[i].to("meta"), "meta device"),
    ],
)
def test_items_that_are_refused_by_name(item: Callable[[int], Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        fit(ppca(), Items(item), out=tmp_path / "run")
    assert expected in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_bad_item_late_in_the_first_epoch_leaves_nothing(tmp_path: Path) -> None:
    for bad in (X[0, :3], X[0] * float("nan"), None):
        with pytest.raises(UserError, match=r"item 50|row 50"):
            fit(ppca(), Items(lambda i, bad=bad: bad if i == 50 else X[i]), batch_size=1, out=tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (Stream, "Stream is a stream: expected a map-style Dataset"),
        (lambda: Items(lambda i: X[i], 0), "have no rows"),
        (lambda: X[:0], "at least one row"),
        (lambda: X[0], "a lone datum"),
        (lambda: iter(X), "got tuple_iterator"),
        (X.to_sparse, "got a sparse coo one"),
        (X.to_sparse_csr, "got a sparse csr one"),
        (lambda: torch.complex(X, X), "got a complex one; give real and imaginary parts"),
        (lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.quint8), "got a quantized one"),
        (lambda: X.to("meta"), "meta device"),
        (lambda: torch.nested.nested_tensor([X[0], X[1, :2]], layout=torch.jagged), "got a nested one"),
        (lambda: None, "got NoneType"),
    ],
)
def test_data_that_are_no_dense_rows(make: Callable[[], Any], expected: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that such tensors are a beta, or on their way out
        data = make()
    with pytest.raises(UserError) as caught:
        fit(ppca(), data)
    assert expected in str(caught.value)


def test_a_subset_and_views_train_as_their_rows() -> None:
    losses = [
        fit(ppca(), data).metrics[0]["train_loss"]
        for data in (
            X[10:30],
            Subset(TensorDataset(X), range(10, 30)),
            X.t().contiguous().t()[10:30],
            X.double()[10:30],
        )
    ]
    assert len(set(losses)) == 1


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")  # of a guide hardly trained
def test_the_users_data_are_left_as_they_were(tmp_path: Path) -> None:
    """Values, gradients and flags, in training and in what takes data after it."""
    x, before = X.clone().requires_grad_(), X.clone()
    leaf = x * 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = fit(ppca(), x, out=tmp_path / "run")
        fit(ppca(), leaf)
    pv.log_likelihood(run.program, x, num_samples=10)
    pv.encode(run.program, x)
    pv.reconstruct(run.program, x)
    pv.posterior(run.program, x[:3], num_samples=10)
    assert x.grad is None
    assert x.requires_grad
    assert torch.equal(x.detach(), before)
