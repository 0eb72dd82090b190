"""The contract, exactly: shapes that fit by broadcasting alone, rows, labels and readers of the data.

What is accepted is held to a plain reference of one row at a time, in float64; what is not is refused by name, at every door.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from contract_programs import DOORS, Base, made, rows
from torch import Tensor

import pyro_vae as pv
from pyro_vae.errors import ProgramError, UserError
from pyro_vae.programs.contract import admit

ROWS = 6


def normal(loc: Tensor, *shape: int) -> Any:
    return dist.Normal(loc.unflatten(-1, shape), 1.0).to_event(len(shape))


SHAPES = [
    # the distribution has an axis that the data lack: the data's rows would be its axis
    (made("AxisTooMany", (4, 4), likelihood=lambda s, loc: normal(loc, 1, 4, 4)), (4, 4), "drop the axes"),
    (made("Channel", (1, 3), likelihood=lambda s, loc: normal(loc, 1, 3)), (3,), "drop the axes"),
    # the data have an axis that the distribution lacks
    (made("Squeezed", (1,), likelihood=lambda s, loc: dist.Normal(loc.squeeze(-1), 1.0)), (1,), r"to_event\(n\)"),
    (made("NoEvent", (4,), likelihood=lambda s, loc: dist.Normal(loc.sum(-1), 1.0)), (4,), "does not run|to_event"),
    # one number for all elements, one row for all rows
    (made("OneForAll", (4,), likelihood=lambda s, loc: dist.Normal(loc[..., :1], 1.0).to_event(1)), (4,), "one shape"),
    (made("OneRow", (4,), observed=lambda s, x: x.mean(0, keepdim=True)), (4,), "one shape"),
    (made("FirstElement", (4,), observed=lambda s, x: x[:, :1]), (4,), "one shape"),
    (
        made("Transposed", (2, 3), observed=lambda s, x: x.mT, likelihood=lambda s, loc: normal(loc, 3, 2)),
        (2, 3),
        "write obs=x",
    ),
]  # fmt: skip


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("program", "shape", "remedy"), SHAPES, ids=lambda v: type(v).__name__ if isinstance(v, Base) else ""
)
def test_an_observation_that_fits_by_broadcasting_is_refused(door: str, program: Any, shape: Any, remedy: str) -> None:
    with pytest.raises(UserError, match=remedy) as caught:
        DOORS[door](program, rows(*shape))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(1,), (4,), (2, 3), (1, 2, 2)])
@pytest.mark.parametrize("flattened", [False, True])
def test_what_is_taken_is_the_density_row_by_row(shape: tuple[int, ...], flattened: bool) -> None:
    """An exact shape, or a datum flattened by the program itself: every weight is p(x) of its row."""
    functions: dict[str, Any] = {}
    if flattened:
        functions = {
            "likelihood": lambda s, loc: dist.Normal(loc, 1.0).to_event(1),
            "observed": lambda s, x: x.flatten(1),
        }
    program, x = made("Taken", shape, **functions), rows(*shape)
    found = pv.log_likelihood(program, x, num_samples=30)
    w = program.decoder.detach()
    covariance = w.T @ w + torch.eye(len(w.T), dtype=w.dtype)
    exact = torch.distributions.MultivariateNormal(w.new_zeros(len(w.T)), covariance).log_prob(x.flatten(1))
    torch.testing.assert_close(found.log_likelihood, exact, rtol=0, atol=1e-9)
    assert pv.sample(program, 3, event_shape=shape).shape == (3, *shape)
    assert pv.reconstruct(program, x).shape == x.shape
    assert pv.reconstruct(program, x, num_samples=2).shape == (2, *x.shape)


def test_a_latent_that_fits_by_broadcasting_is_refused() -> None:
    def one(self: Any, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x[:, :1], 0.5).to_event(1))

    with pytest.raises(UserError, match=r"'z' has event shape \(1,\), and the model's \(2,\)|does not run"):
        admit(made("OneLatent", guide=one), rows(4))

    def model(self: Any, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True) + x.new_zeros(4), 1.0).to_event(1), obs=x)

    with pytest.raises(ProgramError, match=r"'z' has event shape \(1,\), and the model's \(2,\)"):
        admit(made("OneLatent", guide=one, model=model), rows(4))


# A lone datum, and other data that are none


@pytest.mark.parametrize("door", DOORS)
def test_a_lone_datum_is_refused_with_the_remedy(door: str) -> None:
    program = Base((2, 3))
    program.event_shape = (2, 3)  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"lone datum of shape \(2, 3\): give it a batch axis, x\[None\]"):
        DOORS[door](program, rows(2, 3)[0])
    with pytest.raises(UserError, match=r"batch axis, x\[None\]|expected data .*tensor of shape \(4,\)"):
        DOORS[door](Base((4,)), rows(4)[0])


BAD = {
    "another width": (lambda x: x[:, :3], r"expected data \(N, 4\)"),
    "NaN": (lambda x: x.clone().index_fill_(0, torch.tensor([3]), math.nan), "first in row 3"),
    "infinite": (lambda x: x.clone().index_fill_(0, torch.tensor([5]), math.inf), "first in row 5"),
    "no rows": (lambda x: x[:0], "at least one row"),
    "sparse": (lambda x: x.to_sparse(), "dense tensor"),
}


@pytest.mark.parametrize("door", [d for d in DOORS if d not in ("fit", "impute")])
@pytest.mark.parametrize("kind", BAD)
def test_every_door_says_what_is_wrong_with_the_data(door: str, kind: str) -> None:
    program = Base()
    program.event_shape = (4,)  # type: ignore[assignment]
    spoil, words = BAD[kind]
    with pytest.raises(UserError, match=words) as caught:
        DOORS[door](program, spoil(rows(4)))
    assert "\n" not in str(caught.value)


def test_other_arguments_are_checked_too() -> None:
    program = Base()
    program.event_shape = (4,)  # type: ignore[assignment]
    x = rows(4)
    for call, words in (
        (lambda: pv.sample(program, 5.0), "sample: expected num_samples to be a whole number, got 5.0"),  # type: ignore[arg-type]
        (lambda: pv.sample(program, 0), "at least 1"),
        (lambda: pv.encode(program, x, num_samples=0), "encode: expected num_samples"),
        (lambda: pv.decode(program, np.zeros((3, 2))), "decode: expected latents as a torch tensor"),  # type: ignore[arg-type]
        (lambda: pv.decode(program, {"z": [[0.0, 0.0]]}), "got list"),  # type: ignore[dict-item]
        (lambda: pv.log_likelihood(program, x, torch.zeros(6)), "Base takes no y"),
    ):
        with pytest.raises(UserError, match=words):
            call()
    assert pv.sample(program, np.int64(2)).shape == (2, 4)  # type: ignore[arg-type]
