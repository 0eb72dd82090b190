"""Labels that a program may take, models that read the data, every row of these, and what programs are made of."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from contract_programs import DOORS, ROWS, Base, made, rows
from pyro.nn import PyroModule, PyroParam, pyro_method
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils.data import Dataset, TensorDataset

import pyro_vae as pv
from pyro_vae.errors import DataError, ProgramError, UserError
from pyro_vae.programs.contract import admit
from pyro_vae.programs.labels import needs_y, takes_y
from pyro_vae.programs.trace import dtype_of
from pyro_vae.seeding import seeded

# Labels


class Labelled(Base):
    """A program that may be told y, and remembers whether it was."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        self.seen.append(y is not None)
        super().model(x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        super().guide(x)


class WithTemperature(Base):
    def model(self, x: Tensor, temperature: float = 1.0) -> None:
        assert isinstance(temperature, float)
        super().model(x)


def test_labels_are_handed_to_a_program_that_takes_them() -> None:
    x, y = rows(4), torch.arange(ROWS) % 2
    program = Labelled()
    assert takes_y(program)
    assert not needs_y(program)
    pv.fit(program, TensorDataset(x, y), steps=2)
    assert all(program.seen)
    program.seen.clear()
    pv.log_likelihood(program, x, y, num_samples=30)
    pv.encode(program, x, y)
    pv.posterior(program, x, y, num_samples=5, prior=False)
    assert all(program.seen)
    program.seen.clear()
    for call in (
        lambda: pv.fit(program, x, steps=2),
        lambda: pv.fit(program, TensorDataset(x), steps=2),
        lambda: pv.log_likelihood(program, x, num_samples=30),
        lambda: pv.sample(program, 2),
    ):
        call()
    assert not any(program.seen)


def test_labels_of_a_data_set_reach_an_optional_y_from_training_to_evaluation() -> None:
    class OfImages(Labelled):
        def __init__(self) -> None:
            Base.__init__(self, (1, 8, 8))
            self.seen = []

    program = OfImages()
    data = pv.load_data("digits", binarization="none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pv.fit(program, data, steps=2)
        pv.evaluate(program, data, num_samples=30, limit=3)
    assert all(program.seen)


def test_labels_are_no_temperature() -> None:
    program = WithTemperature()
    assert not takes_y(program)
    pv.fit(program, TensorDataset(rows(4), torch.arange(ROWS)), steps=1)


def test_y_of_another_length_is_refused() -> None:
    program, x = Labelled(), rows(4)
    for y in (torch.zeros(5), torch.zeros(()), np.zeros(7)):
        for call in (pv.log_likelihood, pv.encode, pv.posterior):
            with pytest.raises(UserError, match=r"expected y as a torch tensor \(6, \.\.\.\)"):
                call(program, x, y)  # type: ignore[operator]


# Models that read the data


def test_a_model_that_reads_x_is_refused() -> None:
    def leaking(self: Any, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.decoder + x, 1.0).to_event(1), obs=x)

    def shifted(self: Any, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            before = torch.cat([x.new_zeros(len(x), 1), x[:, :-1]], -1)
            pyro.sample("x", dist.Normal(z @ self.decoder + before, 1.0).to_event(1), obs=x)

    def scaled(self: Any, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.decoder, x.std()).to_event(1), obs=x)

    def informed(self: Any, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x @ self.encoder, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.decoder, 1.0).to_event(1), obs=x)

    for function, words in (
        (leaking, "the distribution of 'x' reads x"),
        (shifted, "the distribution of 'x' reads x"),
        (scaled, "the distribution of 'x' reads x"),
        (informed, "the density of the latent 'z' reads x, and 'x' depends on it"),
    ):
        program = made("Reader", model=function)
        for door in ("fit", "log_likelihood", "encode"):
            with pytest.raises(ProgramError, match=words):
                DOORS[door](program, rows(4))


def test_shapes_dtypes_and_missing_entries_are_no_reading() -> None:
    def blank(self: Any, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x[:, :2]), 1.0).to_event(1))
            seen = ~x.isnan()
            pyro.sample("x", dist.Normal(z @ self.decoder, 1.0).mask(seen).to_event(1), obs=x.nan_to_num())

    def around(self: Any, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.posterior(x.nan_to_num()))

    x = rows(4)
    x[1, 2] = x[4, 0] = math.nan
    admit(made("Blank", model=blank), rows(4))
    masked = made("Masked", model=blank, guide=around)
    by_nan = made("ByNaN", likelihood=lambda s, loc: dist.NanMaskedNormal(loc, 1.0).to_event(1), guide=around)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second = (pv.log_likelihood(p, x, num_samples=50).log_likelihood for p in (masked, by_nan))
        assert torch.equal(first, second)
        for program in (masked, by_nan):
            assert math.isfinite(pv.fit(program, x, steps=3).metrics[-1]["train_loss"])
            assert torch.isfinite(torch.as_tensor(pv.encode(program, x))).all()
    with pytest.raises(DataError, match="first in row 1"):  # a guide that does not look
        pv.log_likelihood(made("Half", model=blank), x, num_samples=30)


# Every row


class Late(Dataset[Tensor]):
    """Ones, and a half at one late row."""

    def __len__(self) -> int:
        return 2500

    def __getitem__(self, i: int) -> Tensor:
        return torch.full((4,), 0.5 if i == 2300 else 1.0)


def binary(**sizes: Any) -> Any:
    return pv.build("mixture", "diagonal", (4,), latent_dim=2, likelihood="bernoulli", **sizes)


def test_a_late_row_outside_the_support_is_named_before_a_step() -> None:
    x = torch.ones(2500, 4)
    x[2300] = 0.5
    for call in (lambda: pv.fit(binary(), x, steps=1), lambda: pv.log_likelihood(binary(), x, num_samples=5)):
        with pytest.raises(DataError, match=r"the data hold 0\.5, .* Bernoulli likelihood .*first in row 2300"):
            call()


def test_a_late_item_of_a_dataset_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the data hold 0\.5, .*first in row 2300"):
        pv.fit(binary(), Late(), epochs=1, batch_size=100, out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_bad_row_is_named_before_a_parameter() -> None:
    x = rows(4, n=3000)
    x[2999, 0] = math.inf
    with pytest.raises(DataError, match="first in row 2999"):
        pv.fit(Base(), x, epochs=1)


def test_a_minibatch_that_cannot_be_trained_on_is_found_before_training() -> None:
    with seeded(0):
        encoder = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    program = pv.build("ppca", "linear", (4,), latent_dim=2, encoder=encoder)
    before = {n: b.clone() for n, b in program.named_buffers()}
    for n, size in ((20, 1), (1, 128)):
        with pytest.raises(UserError, match=r"fails on a minibatch of 1 row: .*; give minibatches of more rows"):
            pv.fit(program, torch.randn(n, 4, generator=torch.Generator().manual_seed(0)), epochs=1, batch_size=size)
    assert all(torch.equal(b, before[n]) for n, b in program.named_buffers())


# What a program is made of


class InPyrosWay(PyroModule):
    """Networks inside of PyroModules, made under Pyro's default settings."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = PyroModule[nn.Linear](4, 4), PyroModule[nn.Sequential](PyroModule[nn.Linear](2, 4))
        self.scale = PyroParam(torch.ones(()), constraint=constraints.positive)

    @pyro_method
    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.scale).to_event(1), obs=x)

    @pyro_method
    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw) + 1e-3).to_event(1))


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")
def test_pyro_modules_train_and_go_on_in_pyro(tmp_path: Path) -> None:
    with seeded(0):
        program, x = InPyrosWay(), rows(4, n=40).float()
    before = {n: p.detach().clone() for n, p in program.named_parameters()}
    pv.fit(program, x, epochs=2, lr=0.05, out=tmp_path / "run")
    assert all(not torch.equal(p, before[n]) for n, p in program.named_parameters())
    with seeded(1):
        other = InPyrosWay()
    pv.load(tmp_path / "run", program=other)
    assert torch.equal(pv.encode(other, x[:3]), pv.encode(program, x[:3]))
    assert math.isfinite(pv.log_likelihood(program, x, num_samples=50).nll)
    assert pv.sample(program, 3).shape == (3, 4)
    assert not hasattr(pyro.nn.module._Context, "param_state")
    with seeded(0):
        loss = pyro.infer.SVI(
            program.model, program.guide, pyro.optim.Adam({"lr": 1e-3}), pyro.infer.Trace_ELBO()
        ).step(x)
    assert math.isfinite(float(loss))
    pyro.clear_param_store()


def test_a_program_of_buffers_runs_in_their_dtype() -> None:
    """Probabilistic PCA in float64: exact to 1e-9, and in float32 to 1e-6 at best."""

    class Fixed(Base):
        def __init__(self) -> None:
            super().__init__()
            for name in ("encoder", "decoder"):
                value = getattr(self, name).detach()
                delattr(self, name)
                self.register_buffer(name, value)
            w = self.decoder
            self.register_buffer("covariance", torch.linalg.inv(w @ w.T + torch.eye(2, dtype=w.dtype)))
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                loc = x @ self.decoder.T @ self.covariance
                pyro.sample("z", dist.MultivariateNormal(loc, self.covariance))

    program, x = Fixed(), rows(4)
    assert dtype_of(program) == torch.float64
    w = program.decoder
    exact = torch.distributions.MultivariateNormal(w.new_zeros(4), w.T @ w + torch.eye(4, dtype=w.dtype)).log_prob(x)
    found = pv.log_likelihood(program, x, num_samples=50)
    torch.testing.assert_close(found.log_likelihood, exact, rtol=0, atol=1e-9)
    assert dtype_of(nn.BatchNorm1d(2).double()) == torch.float64
    assert dtype_of(nn.Identity()) == torch.float32
