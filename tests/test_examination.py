"""A program is examined once and in few runs; what hides behind a zero is found at once, and rows are looked at call by call."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from coupling import Coupling, X, examinations, runs
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.errors import DataError, ProgramError, UserError
from pyro_vae.programs import look
from pyro_vae.seeding import seeded

CALLS: dict[str, Callable[[Any], Any]] = {
    "encode": lambda p: pv.encode(p, X),
    "reconstruct": lambda p: pv.reconstruct(p, X),
    "log_likelihood": lambda p: pv.log_likelihood(p, X, num_samples=100),
    "posterior": lambda p: pv.posterior(p, X[:3], num_samples=30),
    "sample": lambda p: pv.sample(p, 5, event_shape=(4,)),
    "annealing": lambda p: pv.annealed_log_likelihood(p, X[:3], num_distributions=20),
    "gaps": lambda p: pv.inference_gaps(p, X[:3], num_steps=2, num_final_draws=2),
    "information": lambda p: pv.latent_information(p, X),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_a_first_call_examines_once_and_a_second_not_at_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = Coupling()
    with examinations(monkeypatch) as seen:
        CALLS[name](program)
        assert max(seen.count("data"), seen.count("model")) <= 1
        seen.clear()
        CALLS[name](program)
        assert seen == []


def test_an_examination_takes_few_runs_and_a_call_after_it_its_own_alone() -> None:
    program = Coupling()
    with runs() as count:
        pv.encode(program, X)
        guides, models = count()
        assert guides <= 5
        assert models <= 6
    with runs() as count:
        pv.encode(program, X)
        assert count() == (1, 0)
    with runs() as count:
        pv.sample(program, 3, event_shape=(4,))
        guides, models = count()
        assert guides == 0
        assert models <= 6
    with runs() as count:
        pv.sample(program, 3, event_shape=(4,))
        assert count() == (0, 1)


def test_one_place_asks_for_an_examination() -> None:
    """Everything else is handed what was found at the door."""
    root = Path(pv.__file__).parent
    calls = [str(f.relative_to(root)) for f in root.rglob("*.py") for _ in re.findall(r"\bexamined\(", f.read_text())]
    assert sorted(calls) == ["programs/contract.py", "programs/examination.py"]  # the call and the definition


# What hides behind a zero


class Gated(Coupling):
    """A skip of ReZero over what must not be read."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part, self.gate = part, nn.Parameter(torch.zeros(()))
        with seeded(0):
            self.reads = nn.Linear(4, 4)
        nn.init.zeros_(self.reads.weight)
        nn.init.zeros_(self.reads.bias)

    def guide(self, x: Tensor) -> None:
        super().guide(x + self.gate * x.mean(0) if self.part == "guide" else x)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = self.decoder(z)
            loc = loc + self.gate * loc.mean(-2, keepdim=True) if self.part == "model" else loc
            loc = loc + self.reads(x) if self.part == "reading" else loc
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("part", "words"),
    [("guide", "guide: .*other rows"), ("model", "model: .*other rows"), ("reading", "'x' reads x itself")],
)
def test_what_hides_behind_a_zero_is_found_before_training(part: str, words: str) -> None:
    program = Gated(part)
    before = {n: p.detach().clone() for n, p in program.named_parameters()}
    with pytest.raises(ProgramError, match=f"{words}.*small noise"):
        pv.fit(program, X, steps=1)
    assert all(torch.equal(p, before[n]) for n, p in program.named_parameters())
    if part != "guide":
        with pytest.raises(ProgramError, match="small noise"):
            pv.sample(program, 3, event_shape=(4,))


# What shows in many rows, or in few of them, alone


class Batched(Coupling):
    """Couples rows of batches of more than so many."""

    def __init__(self, most: int, part: str = "guide") -> None:
        super().__init__()
        self.most, self.part = most, part

    def guide(self, x: Tensor) -> None:
        super().guide(x - x.mean(0) if self.part == "guide" and len(x) > self.most else x)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = self.decoder(z)
            loc = loc - loc.mean(-2, keepdim=True) if self.part == "model" and len(x) > self.most else loc
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("most", [17, 200, *(pytest.param(most, marks=pytest.mark.slow) for most in (20, 100))])
@pytest.mark.parametrize("part", ["guide", "model"])
def test_what_couples_many_rows_is_found_where_so_many_come(part: str, most: int) -> None:
    program, x = Batched(most, part), X.repeat(15, 1)[: most + 1]
    pv.encode(program, x[:16])
    with pytest.raises(ProgramError, match=rf"{part}: .*other rows"):
        pv.encode(program, x)
    with pytest.raises(ProgramError, match=rf"{part}: .*other rows"):
        pv.fit(Batched(most, part), x, steps=1, batch_size=most + 1)
    if part == "model":
        with pytest.raises(ProgramError, match="other rows"):
            pv.sample(Batched(most, part), most + 1, event_shape=(4,))


def test_more_rows_are_looked_at_a_few_times_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    program, x = Coupling(), X.repeat(100, 1)
    with examinations(monkeypatch) as seen:
        for rows in range(8, 2000, 50):
            pv.encode(program, x[:rows])
    assert len(seen) <= 4


@pytest.mark.parametrize("row", [3, 12, 19])
def test_a_model_that_reads_few_rows_is_found(row: int) -> None:
    """The value that it reads is the largest of its column, in a row that is none of the first."""
    x = X.clone()
    x[row, 2] = 4.0
    program = Using(lambda loc, x: dist.Normal(loc + torch.where(x > 3, x, 0.0), 1.0))
    with pytest.raises(ProgramError, match="reads x"):
        pv.log_likelihood(program, x, num_samples=30)


# What may be made of x


class Using(Coupling):
    """A model that makes something of x."""

    def __init__(self, use: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.use = use

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", self.use(self.decoder(z), x).to_event(1), obs=x.nan_to_num())


def written(loc: Tensor, x: Tensor) -> Any:
    out = torch.zeros_like(loc)
    out[..., 1:].copy_(x[:, :-1])
    return dist.Normal(loc + out, 1.0)


READS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a write into a view": written,
    "numpy": lambda loc, x: dist.Normal(loc + torch.from_numpy(x.numpy().copy()), 1.0),
    "a mean taken to the host": lambda loc, x: dist.Normal(loc + x.mean().item(), 1.0),
    "a scale": lambda loc, x: dist.Normal(loc, x.std()),
}
MAY: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a mask of what is missing": lambda loc, x: dist.Normal(loc, 1.0).mask(~x.isnan()),
    "a shape": lambda loc, x: dist.Normal(loc, 1.0).expand(loc.shape[:-1] + x.shape[1:]),
    "a count that no density changes by": lambda loc, x: dist.Normal(loc + 0.0 * len(str(float(x.sum()))), 1.0),
}


@pytest.mark.parametrize("how", READS)
def test_models_that_read_x_in_any_way_are_refused(how: str) -> None:
    with pytest.raises(ProgramError, match="reads x"):
        pv.log_likelihood(Using(READS[how]), X, num_samples=30)


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")
@pytest.mark.parametrize("how", MAY)
def test_what_is_no_reading_is_taken(how: str) -> None:
    assert math.isfinite(pv.log_likelihood(Using(MAY[how]), X, num_samples=30).nll)


# What differs from call to call


class Bounded(Coupling):
    """Counts of at most y."""

    def model(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Binomial(y[:, None], logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor) -> None:
        super().guide(x)


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")
def test_supports_are_those_of_the_row() -> None:
    """A bound that was the same in the first eight rows is not the bound of the others."""
    y = torch.full((30,), 3.0)
    x = torch.ones(30, 4)
    y[20:], x[20:] = 9.0, 7.0
    program = Bounded()
    assert math.isfinite(pv.log_likelihood(program, x, y, num_samples=30).nll)
    x[25] = 9.5
    with pytest.raises(DataError, match=r"the data hold 9\.5, outside the support of the Binomial .*first in row 25"):
        pv.log_likelihood(program, x, y, num_samples=30)
    x[25] = 7.0
    x[11] = 5.0
    with pytest.raises(DataError, match=r"the data hold 5, .*first in row 11"):
        pv.log_likelihood(program, x, y, num_samples=30)


def test_labels_beyond_those_taken_are_looked_at() -> None:
    class Labelled(Coupling):
        def __init__(self) -> None:
            super().__init__()
            with seeded(1):
                self.table = nn.Embedding(10, 4)

        def model(self, x: Tensor, y: Tensor) -> None:
            super().model(x)

        def guide(self, x: Tensor, y: Tensor) -> None:
            super().guide(x + self.table(y))

    program = Labelled()
    y = torch.arange(20) % 5
    pv.encode(program, X, y)
    with runs() as count:
        pv.encode(program, X, y)
        assert count() == (1, 0)
        pv.encode(program, X, (y + 1) % 5)
        assert count() == (2, 0)
        pv.encode(program, X, y + 5)  # a run on the rows of the largest
        assert count() == (4, 1)
    y[13] = 10
    with pytest.raises(DataError, match=r"y in row 13 \(10\) is none that the program takes"):
        pv.encode(program, X, y)
    with pytest.raises(UserError, match=r"y in row 13 \(10\)"):
        pv.encode(Labelled(), X, y)


def test_noise_is_added_to_copies_alone() -> None:
    program = Coupling()
    before = {n: (id(p), p._version, p.data_ptr()) for n, p in program.named_parameters()}
    pv.encode(program, X)
    assert {n: (id(p), p._version, p.data_ptr()) for n, p in program.named_parameters()} == before
    assert look.NOISE > 0


# The door


def _takers(*needed: str) -> list[str]:
    """Public functions of a program whose required arguments these are."""
    found = []
    for name in pv._PUBLIC:
        function = getattr(pv, name)
        if not inspect.isfunction(function):
            continue
        required = [n for n, p in inspect.signature(function).parameters.items() if p.default is p.empty]
        if required and required[0] == "program" and set(needed) == set(required[1:]) - {"options"}:
            found.append(name)
    return found


@pytest.mark.parametrize(  # impute takes x alone where it is a record, and seen beside a tensor
    "name", [n for n in _takers("x") if n not in ("unit_rates", "impute")]
)
def test_every_function_of_data_has_the_door(name: str) -> None:
    program = Coupling()
    program.share = 0.5
    with pytest.raises(ProgramError, match="depends on the other rows"):
        getattr(pv, name)(program, X)
    with pytest.raises(UserError, match=rf"{name}: expected seed to be a whole number"):
        getattr(pv, name)(program, X, seed=0.5)
    assert len(_takers("x")) >= 10


@pytest.mark.parametrize("name", ["sample", "bidirectional"])
def test_every_function_of_the_model_has_the_door(name: str) -> None:
    with pytest.raises(ProgramError, match="other rows"):
        getattr(pv, name)(Gated("model"), event_shape=(4,))
