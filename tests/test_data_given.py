"""What users hand over: arrays, tables, lists, loaders, paths; missing values and covariates; and what becomes of such runs."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import sparse
from test_selection import OLD
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.cli.app import run as command
from pyro_vae.data.given import as_data, given
from pyro_vae.errors import UserError
from pyro_vae.tensors import tensor_of

X = np.random.default_rng(0).standard_normal((60, 4))
# Guides are hardly trained here: their figures are compared with each other and not believed.
pytestmark = pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")
QUICK: dict[str, Any] = {"epochs": 2, "compile": "off", "device": "cpu", "batch_size": 20}

TAKEN: dict[str, Callable[[], Any]] = {
    "array": lambda: X,
    "of other bytes": lambda: X.astype(">f8"),
    "reversed": lambda: X[::-1][::-1],
    "frame": lambda: pd.DataFrame(X),
    "frame of kinds": lambda: pd.DataFrame(X).astype({0: "float32"}),
    "csr": lambda: sparse.csr_matrix(X),
    "csc": lambda: sparse.csc_array(X),
    "list": lambda: X.tolist(),
    "tensor": lambda: torch.from_numpy(X),
    "dataset": lambda: TensorDataset(torch.from_numpy(X)),
    "loader": lambda: DataLoader(TensorDataset(torch.from_numpy(X)), batch_size=7, shuffle=True),
}


def ppca(data: Any) -> Any:
    return pv.build("ppca", "linear", data, latent_dim=2).double()


@pytest.mark.parametrize("kind", TAKEN)
def test_the_same_numbers_train_alike_whatever_holds_them(kind: str) -> None:
    program, plain = ppca(TAKEN[kind]()), ppca((4,))
    run = pv.fit(program, TAKEN[kind](), **QUICK)
    pv.fit(plain, torch.from_numpy(X.copy()), **QUICK)
    if kind != "frame of kinds":
        assert all(torch.equal(t, plain.state_dict()[n]) for n, t in program.state_dict().items())
    figures, _ = pv.evaluate(program, run.load_data(), num_samples=300)
    assert figures["num_data"] == 60
    again, _ = pv.evaluate(program, TAKEN[kind](), num_samples=300)
    assert again["nll"] == figures["nll"]


@pytest.mark.parametrize("kind", [k for k in TAKEN if k not in ("dataset", "loader", "tensor")])
@pytest.mark.parametrize("door", [pv.encode, pv.reconstruct, lambda p, x: pv.log_likelihood(p, x).log_likelihood])
def test_functions_of_x_take_it_too(kind: str, door: Callable[..., Any]) -> None:
    program = ppca((4,))
    assert torch.allclose(door(program, TAKEN[kind]()), door(program, torch.from_numpy(X)), rtol=1e-6)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (object(), "got object"),
        ({"x": X}, r"does not run on a record of the columns x \(4,\)"),
        (iter([1]), "got list_iterator"),
        ([[1, 2], [3]], "the rows of the list"),
        (pd.DataFrame({"a": [1.0, 2], "b": ["u", "v"]}), "columns b hold no numbers"),
        (np.array([["a"], ["b"]]), "expected numbers"),
        ("nowhere.csv", "check the path"),
        ((X, np.zeros(7)), "60 rows of x and y of shape"),
        (None, "got NoneType"),
    ],
)
def test_what_is_not_taken_is_told_in_a_line(data: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        pv.fit(ppca((4,)), data, **QUICK)
    assert "\n" not in str(caught.value)


def test_a_memory_map_and_a_path(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert torch.equal(tensor_of(mapped), torch.from_numpy(X))
    run = pv.fit(ppca(str(tmp_path / "x.npy")), tmp_path / "x.npy", **QUICK, out=tmp_path / "run")
    assert pv.load(tmp_path / "run").load_data().name == "x.npy"
    assert run.load_data().test.dtype == torch.float64


def test_a_tensor_can_have_a_validation_share_and_labels() -> None:
    for share, held in ((0.25, 15), (6, 6), (0.0, 0)):
        run = pv.fit(ppca((4,)), X, validation=share, **QUICK)
        assert run.record["rows"]["train"] == 60 - held
        assert ("validation_loss" in run.metrics[0]) == (held > 0)
        assert pv.evaluate(run.program, run.load_data(), num_samples=300)[0]["num_data"] == (held or 60)
    for wrong in (1.0, -0.1, 60, math.nan):
        with pytest.raises(UserError, match="validation"):
            pv.fit(ppca((4,)), X, validation=wrong, **QUICK)
    data = given((X, np.arange(60)), 0.5)
    assert all(torch.equal(data.labels[s], data.rows[s]) for s in ("train", "validation"))
    with pytest.raises(UserError, match="whose rows have no splits"):
        pv.fit(ppca((4,)), pv.load_data("moons"), validation=0.1, **QUICK)


class Covariates(nn.Module):
    """A program that handles missing entries and covariates: x ~ N(W z + V y, 1) where it is there."""

    def __init__(self, event_shape: tuple[int, ...] = (4,)) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(4, 4)
        self.double()

    def model(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = self.decoder(torch.cat([z, y.expand(*z.shape[:-1], 2)], -1))
            pyro.sample("x", dist.NanMaskedNormal(loc, torch.ones_like(loc)).to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            loc, raw = self.encoder(torch.cat([x.nan_to_num(0.0), y], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw) + 1e-3).to_event(1))


def holes() -> np.ndarray:
    x = X.copy()
    x[np.random.default_rng(1).random(x.shape) < 0.2] = np.nan
    return x


@pytest.mark.slow
@pytest.mark.usefixtures("coarse_pages")
def test_missing_values_that_the_program_handles_pass_in_every_split(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=holes(), y=np.random.default_rng(2).standard_normal((60, 2)))
    (tmp_path / "own.py").write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_data_given import Covariates as program\n"
    )
    out = str(tmp_path / "run")
    name = str(tmp_path / "own.py")
    line = [
        "train",
        str(tmp_path / "a.npz"),
        "--model",
        name,
        "--epochs",
        "2",
        "--quiet",
        "--compile",
        "off",
        "--out",
        out,
    ]
    assert command(line) == 0
    for rest in (["evaluate", "--samples", "500"], ["sample"], ["report", "--samples", "20"]):
        assert command([rest[0], out, *rest[1:], "--model", name]) == 0
    data = pv.load_data(tmp_path / "a.npz")
    assert {data.stored(s).dtype for s in ("train", "validation", "test")} == {torch.float64}
    assert data.validation.isnan().any()


def test_missing_values_that_it_does_not_are_named_by_row_and_column(tmp_path: Path) -> None:
    x = X.copy()
    x[17, 2] = np.nan
    np.save(tmp_path / "a.npy", x)
    data = pv.load_data(tmp_path / "a.npy")
    where = next(s for s in ("train", "validation", "test") if 17 in data.rows[s].tolist())  # type: ignore[union-attr]
    assert where == "train"
    with pytest.raises(UserError, match=r"it is column 2; row \d+ of the training split is row 17 of a\.npy"):
        pv.fit(ppca(data), data, **QUICK)


def test_floats_keep_their_digits(tmp_path: Path) -> None:
    x = 1e9 + X
    np.save(tmp_path / "a.npy", x)
    data = pv.load_data(tmp_path / "a.npy")
    assert np.array_equal(data.observed("test").numpy(), x[data.rows["test"].numpy()])  # type: ignore[union-attr]
    assert pv.Data("a", *(torch.from_numpy(x),) * 3, levels=None).observed("test").dtype == torch.float64


def test_a_run_of_before_finds_its_rows_in_a_file_of_float64(tmp_path: Path) -> None:
    """Which it had read as float32."""
    np.save(tmp_path / "table.npy", np.load(OLD / "table.npy").astype(np.float64))
    run = pv.load(shutil.copytree(OLD / "elbo", tmp_path / "run"))
    assert run.load_data(str(tmp_path)).train.dtype == torch.float32


@pytest.mark.usefixtures("coarse_pages")
@pytest.mark.parametrize(
    "kind", [*(pytest.param(k, marks=pytest.mark.slow) for k in ("tensor", "dataset", "xy")), "data"]
)
def test_runs_on_data_in_memory_are_evaluated_and_reported_afterwards(kind: str, tmp_path: Path) -> None:
    x = torch.from_numpy(X)
    own = pv.Data("mine", x[:40], x[40:50], x[50:], levels=None)
    data = {"tensor": x, "dataset": TensorDataset(x), "data": own, "xy": (x, x[:, 0])}[kind]
    run = pv.fit(ppca((4,)), data, **QUICK, out=tmp_path / "run")
    found, _ = pv.evaluate(run.program, run.load_data(), num_samples=300)
    assert found["num_data"] == (10 if kind == "data" else 60)
    loaded = pv.load(tmp_path / "run")
    if kind in ("tensor", "xy"):  # the others are the same to a page
        assert pv.report(loaded, data=data, limit=10, num_samples=20).is_file()
    assert pv.evaluate(loaded.program, data, num_samples=300)[0]["nll"] == found["nll"]
    if kind == "tensor":
        assert command(["sample", str(tmp_path / "run")]) == 0
        assert command(["report", str(tmp_path / "run"), "--limit", "10", "--samples", "20"]) == 0
    assert command(["evaluate", str(tmp_path / "run")]) == 2
    with pytest.raises(UserError, match=r"have no path: hand them over in Python"):
        loaded.load_data()


def test_counts_are_offered_a_likelihood_of_counts() -> None:
    for likelihood in ("bernoulli", "beta"):
        program = pv.build("mlp", "diagonal", (4,), latent_dim=2, likelihood=likelihood)
        with pytest.raises(UserError, match="poisson or negative-binomial"):
            pv.fit(program, np.abs(np.rint(5 * X)), **QUICK)


def test_encode_and_reconstruct_look_at_values() -> None:
    program = pv.build("mlp", "diagonal", (4,), latent_dim=2)
    for door in (pv.encode, pv.reconstruct):
        door(program, np.random.default_rng(0).random((5, 4)))  # probabilities are no data of it, and near them
        with pytest.raises(UserError, match=r"from .* to 2\d\d, and the program's are in \[0, 1\].*x / 255"):
            door(program, np.random.default_rng(0).integers(0, 256, (50, 4)))
        x = np.zeros((20, 4))
        x[13, 1] = np.nan
        with pytest.raises(UserError, match=r"NaN or infinite values \(first in row 13\)"):
            door(program, x)


def test_as_data_refuses_what_is_none() -> None:
    with pytest.raises(UserError, match="got int"):
        as_data(3)
