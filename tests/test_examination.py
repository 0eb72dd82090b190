"""A program is examined once, and anew when something that was read has changed; what hides behind a zero is found at once."""

from __future__ import annotations

import copy
import gc
import inspect
import itertools
import math
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.errors import DataError, ProgramError, UserError
from pyro_vae.programs import examination, look
from pyro_vae.programs.examination import PLACE
from pyro_vae.seeding import generator, seeded

SHIFT = 0.0
TABLE = {"shift": [0.0]}
X = torch.randn(20, 4, generator=generator("test of the examination"))


def closed_over(value: float) -> tuple[Callable[[], float], Callable[[float], None]]:
    def get() -> float:
        return value

    def put(new: float) -> None:
        nonlocal value
        value = new

    return get, put


class Layer(nn.Linear):
    """A layer whose class has a member that is read."""

    shift = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shift


class Coupling(nn.Module):
    """A program whose guide reads other rows by as much as a number says, which stands where a test puts it: 0 at first."""

    def __init__(self) -> None:
        super().__init__()
        with seeded(0):
            self.encoder, self.decoder = Layer(4, 4), nn.Linear(2, 4)
        self.register_buffer("centre", torch.zeros(()))
        self.share = 0.0
        self.closed, self.put = closed_over(0.0)

    def model(self, x: Tensor) -> None:
        next(RUNS["model"])
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        next(RUNS["guide"])
        share = self.share + SHIFT + TABLE["shift"][0] + self.closed() + self.centre
        with pyro.plate("data", len(x), dim=-1):
            loc, raw = self.encoder(x + share * x.mean(0)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw) + 0.1).to_event(1))


RUNS = {"guide": itertools.count(), "model": itertools.count()}  # which show no change of themselves


@contextmanager
def runs() -> Iterator[Callable[[], tuple[int, int]]]:
    """The runs of any guide and model while entered."""
    before = {part: next(count) for part, count in RUNS.items()}
    asked = itertools.count(1)

    def found() -> tuple[int, int]:
        beside = next(asked)
        return next(RUNS["guide"]) - before["guide"] - beside, next(RUNS["model"]) - before["model"] - beside

    yield found


@contextmanager
def examinations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is examined while entered: ``data`` or ``model``."""
    seen: list[str] = []
    with monkeypatch.context() as patch:
        for kind, name in (("data", "look_at"), ("model", "look_at_model")):
            real = getattr(examination, name)
            patch.setattr(examination, name, lambda *a, kind=kind, real=real: seen.append(kind) or real(*a))
        yield seen


def anew(program: Any, monkeypatch: pytest.MonkeyPatch, x: Tensor = X) -> bool:
    with examinations(monkeypatch) as seen:
        pv.encode(program, x)
    return bool(seen)


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


STALE: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda p: setattr(p, "share", 0.5),
    "hook": lambda p: p.encoder.register_forward_pre_hook(lambda m, args: (args[0] - args[0].mean(0),)),
    "submodule": lambda p: setattr(
        p, "encoder", nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), p.encoder)
    ),
    "class member": lambda p: setattr(Layer, "shift", torch.arange(4.0)),
    "global": lambda p: globals().__setitem__("SHIFT", 0.5),
    "inside a global": lambda p: TABLE["shift"].__setitem__(0, 0.5),
    "closure": lambda p: p.put(0.5),
    "buffer in place": lambda p: p.centre.fill_(0.5),
    "buffer's data": lambda p: setattr(p.centre, "data", torch.tensor(0.5)),
    "buffer replaced": lambda p: setattr(p, "centre", torch.tensor(0.5)),
    "load_state_dict": lambda p: p.load_state_dict({**p.state_dict(), "centre": torch.tensor(0.5)}),
    "method": lambda p: setattr(p.encoder, "forward", lambda x: p.decoder(x[:, :2] - x[:, :2].mean(0))),
}
COUPLES = set(STALE) - {"class member"}


@pytest.mark.parametrize("how", STALE)
def test_what_changes_is_noticed_at_the_next_call(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SHIFT", 0.0)
    monkeypatch.setitem(TABLE, "shift", [0.0])
    monkeypatch.setattr(Layer, "shift", 0.0)
    program = Coupling()
    pv.encode(program, X)
    assert not anew(program, monkeypatch)
    with torch.no_grad():
        STALE[how](program)
    if how in COUPLES:
        with pytest.raises(ProgramError, match="depends on the other rows"):
            pv.encode(program, X)
    else:
        assert anew(program, monkeypatch)


CHANGED: dict[str, Callable[[Any], Any]] = {
    "a parameter in place": lambda p: p.decoder.weight.add_(0.1),
    "a parameter's data": lambda p: setattr(p.decoder.weight, "data", p.decoder.weight.data + 0.1),
    "a new parameter": lambda p: setattr(p.decoder, "weight", nn.Parameter(p.decoder.weight + 0.1)),
    "a parameter more": lambda p: setattr(p, "extra", nn.Parameter(torch.zeros(1))),
    "a parameter less": lambda p: setattr(p.decoder, "bias", None),
    "double": lambda p: p.double(),
    "to": lambda p: p.to(torch.float64),
    "a step of an optimizer": lambda p: torch.optim.SGD(with_gradients(p), lr=0.1).step(),
    "counted by hand": lambda p: torch.autograd.graph.increment_version(p.decoder.weight),
}


def with_gradients(program: Any) -> list[Tensor]:
    for p in program.parameters():
        p.grad = torch.ones_like(p)
    return list(program.parameters())


@pytest.mark.parametrize("how", CHANGED)
def test_tensors_that_change_are_noticed(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = Coupling()
    pv.encode(program, X)
    with torch.no_grad():
        CHANGED[how](program)
    assert anew(program, monkeypatch)
    assert not anew(program, monkeypatch)


@pytest.mark.parametrize("compile", ["off", "on"])
def test_our_own_steps_are_noticed(compile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_vae.capture.compiled", lambda graph, example: lambda tensors: graph(*tensors))
    program = Coupling()
    pv.encode(program, X)
    seen: list[bool] = []
    pv.fit(
        program, X, epochs=2, batch_size=10, compile=compile, callback=lambda m: seen.append(anew(program, monkeypatch))
    )
    assert seen == [True, True]


def test_an_examination_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    program = Coupling()
    pv.encode(program, X)
    program.centre.data.fill_(0.5)  # which torch does not count
    pv.encode(program, X)
    with pytest.raises(ProgramError, match="depends on the other rows"):
        pv.encode(program, X, examine=True)  # type: ignore[call-arg]


def test_more_rows_or_missing_ones_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row tells nothing of other rows, and finite ones nothing of how missing ones are filled."""

    class Filled(Coupling):
        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                fn = dist.Normal(self.decoder(z), 1.0).mask(~x.isnan()).to_event(1)
                pyro.sample("x", fn, obs=x.nan_to_num())

        def guide(self, x: Tensor) -> None:
            super().guide(torch.where(x.isnan(), x.nanmean(0), x))

    program = Filled()
    pv.encode(program, X[:1])
    assert anew(program, monkeypatch)
    assert not anew(program, monkeypatch)
    assert not anew(program, monkeypatch, X[:5])
    x = X.clone()
    x[15, 2] = math.nan
    with pytest.raises(ProgramError, match="depends on the other rows"):
        pv.encode(program, x)


def test_copies_are_examined_and_nothing_is_kept_alive() -> None:
    program = Coupling()
    program.own = program.guide  # type: ignore[assignment]  # a way back to the program from what it holds
    pv.encode(program, X)
    other = copy.deepcopy(program)
    assert vars(other)[PLACE] is None
    other.centre.fill_(0.5)
    with pytest.raises(ProgramError):
        pv.encode(other, X)
    with pytest.raises(ProgramError):
        pv.encode(copy.copy(other), X)
    assert pickle.loads(pickle.dumps(vars(program)[PLACE])) is None
    gone = weakref.ref(program)
    del program, other
    gc.collect()
    assert gone() is None


def test_threads_examine_a_program_once(monkeypatch: pytest.MonkeyPatch) -> None:
    program, found = Coupling(), list[Any]()
    with examinations(monkeypatch) as seen:
        threads = [threading.Thread(target=lambda: found.append(pv.encode(program, X))) for _ in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert seen == ["data"]
    assert all(torch.equal(z, found[0]) for z in found)


def test_a_program_that_changes_itself_is_examined_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(Coupling):
        calls = 0

        def guide(self, x: Tensor) -> None:
            self.calls += 1
            super().guide(x)

    program = Counting()
    pv.encode(program, X)
    assert anew(program, monkeypatch)


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


@pytest.mark.parametrize("name", [n for n in _takers("x") if n not in ("unit_rates",)])
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
