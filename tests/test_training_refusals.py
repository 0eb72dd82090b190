"""What could not be trained, or not be kept after the last step, is refused in one line before the first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import small_vae
from test_training_state import ByHand, RunningScale, _generators_put_back, data, normed  # noqa: F401  a fixture
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.errors import UserError


@pytest.mark.parametrize("rows", ["tensor", "dataset", "no validation rows"])
def test_patience_without_a_validation_split_is_refused(rows: str, tmp_path: Path) -> None:
    x = data()
    given: Any = {
        "tensor": x,
        "dataset": torch.utils.data.TensorDataset(x),
        "no validation rows": pv.load_data("digits", validation=0) if rows == "no validation rows" else None,
    }[rows]
    program = small_vae(given) if rows == "no validation rows" else ByHand()
    with pytest.raises(UserError, match="patience = 3 needs a validation split"):
        pv.fit(program, given, epochs=2, patience=3, out=tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("n", "batch_size"), [(1, 128), (20, 1)])
def test_statistics_of_one_row_are_refused(n: int, batch_size: int) -> None:
    program = ByHand(normed())
    before = {name: t.clone() for name, t in program.state_dict().items()}
    with pytest.raises(UserError, match=r"a minibatch of 1 row: .*Expected more than 1 value.*batch_size"):
        pv.fit(program, data(n), epochs=1, batch_size=batch_size)
    assert all(torch.equal(t, before[name]) for name, t in program.state_dict().items())
    pv.fit(ByHand(normed()), data(21), epochs=1, batch_size=10)  # the row that is left over waits


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Tensor.to_sparse, "a sparse coo one"),
        (lambda x: x.to(torch.complex64), "a complex one"),
        (lambda x: x.to("meta"), "a meta one"),
    ],
)
def test_data_that_are_no_real_numbers_are_refused(change: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pv.fit(ByHand(), change(data()), epochs=1)


def test_sparse_gradients_are_refused() -> None:
    program = ByHand()
    program.table = nn.Embedding(3, 4, sparse=True)
    with pytest.raises(UserError, match="'table' has sparse gradients"):
        pv.fit(program, data(), epochs=1)


class WithState(nn.Linear):
    """A module with state that is no tensor."""

    def get_extra_state(self) -> Any:
        return {"version": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


KEPT: dict[str, Callable[[Any], None]] = {
    "complex64": lambda p: p.register_buffer("b", torch.ones(3, dtype=torch.complex64)),
    "uint16": lambda p: p.register_buffer("b", torch.ones(3, dtype=torch.uint16)),
    "float8": lambda p: p.register_buffer("b", torch.ones(3).to(torch.float8_e4m3fn)),
    "transposed": lambda p: p.register_buffer("b", torch.ones(3, 2).T),
    "complex128 that is made anew": lambda p: p.register_buffer(
        "b", torch.ones(3, dtype=torch.complex128), persistent=False
    ),
}
LOST: dict[str, tuple[Callable[[Any], None], str]] = {
    "complex128": (lambda p: p.register_buffer("b", torch.ones(3, dtype=torch.complex128)), "'b' is complex128"),
    "sparse": (lambda p: p.register_buffer("b", torch.eye(3).to_sparse()), "'b' is sparse"),
    "expanded": (lambda p: p.register_buffer("b", torch.ones(1).expand(4)), "could not be put back.*clone"),
    "extra state": (lambda p: setattr(p, "decoder", WithState(2, 4)), "_extra_state' of the program's state is dict"),
    "meta": (lambda p: p.register_buffer("b", torch.ones(3, device="meta"), persistent=False), "on the meta device"),
}


@pytest.mark.parametrize("what", KEPT)
def test_buffers_of_these_kinds_come_back(what: str, tmp_path: Path) -> None:
    program, other = ByHand(), ByHand()
    KEPT[what](program)
    KEPT[what](other)
    pv.fit(program, data(), epochs=1, out=tmp_path / "run")
    pv.load(tmp_path / "run", program=other)
    assert other.get_buffer("b").cpu().tolist() == program.get_buffer("b").cpu().tolist()


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("what", LOST)
def test_what_could_not_come_back_is_refused_before_training(what: str, tmp_path: Path) -> None:
    program = ByHand()
    change, message = LOST[what]
    change(program)
    before = program.encoder.weight.clone()  # type: ignore[operator]
    with pytest.raises(UserError, match=message) as caught:
        pv.fit(program, data(), epochs=1, out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert torch.equal(program.encoder.weight, before)
    assert not list(tmp_path.iterdir())


def test_a_moving_buffer_that_is_not_kept_is_told() -> None:
    program = ByHand(nn.Sequential(nn.Linear(4, 4), RunningScale(4)))
    program.encoder[1].register_buffer("scale", torch.ones(4), persistent=False)  # type: ignore[index]
    with pytest.warns(UserWarning, match=r"changes the buffer 'encoder\.1\.scale'.*persistent"):
        pv.fit(program, data(), epochs=1)


def test_devices_and_arguments_of_other_types(tmp_path: Path) -> None:
    run = pv.fit(ByHand(), data(), epochs=1, device=torch.device("cpu"), out=tmp_path / "run")
    assert run.path is not None
    pv.load(run.path, program=ByHand(), device=torch.device("cpu"))
    for given, message in (
        ({"device": 0}, "torch.device, got int"),
        ({"device": torch.device("meta")}, "unknown device 'meta'"),
        ({"callback": 3}, "callback to be a function"),
        ({"out": 3}, "path of a run directory, got int"),
    ):
        with pytest.raises(UserError, match=message):
            pv.fit(ByHand(), data(), epochs=1, **given)
