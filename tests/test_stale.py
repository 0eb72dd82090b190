"""What was found of a program stands until something that it read has changed, and then it is examined anew."""

from __future__ import annotations

import copy
import functools
import gc
import math
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import coupling
import pyro
import pyro.distributions as dist
import pytest
import torch
from coupling import TABLE, Coupling, Layer, X, anew, examinations
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.errors import ProgramError
from pyro_vae.programs.examination import PLACE
from pyro_vae.seeding import seeded

STALE: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda p: setattr(p, "share", 0.5),
    "hook": lambda p: p.encoder.register_forward_pre_hook(lambda m, args: (args[0] - args[0].mean(0),)),
    "submodule": lambda p: setattr(
        p, "encoder", nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), p.encoder)
    ),
    "class member": lambda p: setattr(Layer, "shift", torch.arange(4.0)),
    "global": lambda p: setattr(coupling, "SHIFT", 0.5),
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
    monkeypatch.setattr(coupling, "SHIFT", 0.0)
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


# Functions, and objects that are no modules


def plain_share(share: float = 0.0) -> float:
    return share


def keyword_share(*, share: float = 0.0) -> float:
    return share


def kept_share(kept: dict[str, float] = {"share": 0.0}) -> float:  # noqa: B006  # a default that is changed
    return kept["share"]


def noted_share() -> float:
    return float(noted_share.share)  # type: ignore[attr-defined]


def coded_share() -> float:
    return 0.0


def half() -> float:
    return 0.5


@functools.wraps(plain_share)
def wrapping_share() -> float:
    return wrapping_share.__wrapped__()


def enclosing(get: Callable[[], float]) -> Callable[[], float]:
    return lambda: get()


class Rates:
    """An object of the user's, in an attribute of a program."""

    share = 0.0

    def get(self, more: float = 0.0) -> float:
        return self.share + more


class Called:
    """Likewise, one that is called."""

    def __init__(self) -> None:
        self.share = 0.0

    def __call__(self) -> float:
        return self.share


class Base(Coupling):
    """A program that is inherited from."""

    def coupled(self, share: float = 0.0) -> float:
        return share


class Functions(Base):
    """A program whose guide asks functions and objects of every kind how much it couples rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rates, self.called, self.by_name = Rates(), Called(), {"get": plain_share}
        self.partial, self.enclosed = functools.partial(plain_share), enclosing(plain_share)
        self.number = 0

    def coupled(self, share: float = 0.0) -> float:
        named = noted_share() + kept_share() + keyword_share() + coded_share() + wrapping_share()
        held = self.rates.get() + self.called() + self.by_name["get"]() + self.partial() + self.enclosed()
        return share + named + held + super().coupled() + self.first(self) + self.twice

    first = staticmethod(lambda self, share=0.0: share)

    @property
    def twice(self) -> float:
        return 2 * plain_share()

    def guide(self, x: Tensor) -> None:
        super().guide(x + self.coupled() * x.mean(0))


FUNCTIONS: dict[str, tuple[Any, str, Any]] = {
    "a method's default": (Functions.coupled, "__defaults__", (0.5,)),
    "an inherited method's default": (Base.coupled, "__defaults__", (0.5,)),
    "a static method's default": (Functions.first, "__defaults__", (0.5,)),
    "a default": (plain_share, "__defaults__", (0.5,)),
    "a keyword's default": (keyword_share, "__kwdefaults__", {"share": 0.5}),
    "a function's attribute": (noted_share, "share", 0.5),
    "a function's code": (coded_share, "__code__", half.__code__),
    "a member of an object's class": (Rates, "share", 0.5),
    "a default of an object's method": (Rates.get, "__defaults__", (0.5,)),
}


@pytest.fixture(autouse=True)
def _functions_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name, _ in FUNCTIONS.values():
        monkeypatch.setattr(owner, name, getattr(owner, name, 0.0), raising=False)


@pytest.mark.parametrize("how", FUNCTIONS)
def test_functions_that_change_are_noticed(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = Functions()
    pv.encode(program, X)
    assert not anew(program, monkeypatch)
    owner, name, value = FUNCTIONS[how]
    monkeypatch.setattr(owner, name, value)
    with pytest.raises(ProgramError, match="depends on the other rows"):
        pv.encode(program, X)


def test_what_a_default_holds_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    program = Functions()
    pv.encode(program, X)
    monkeypatch.setitem(kept_share.__defaults__[0], "share", 0.5)  # type: ignore[index]
    with pytest.raises(ProgramError, match="depends on the other rows"):
        pv.encode(program, X)


class Plain:
    """A pair of Pyro programs in an object that is no module, as people write them."""

    kind = 0.0

    def __init__(self) -> None:
        self.share, self.rates, self.unread, self.calls = 0.0, Rates(), 0.0, 0
        self.options = {"share": 0.0}
        with seeded(0):
            self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(2, 4)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def coupled(self, share: float = 0.0) -> float:
        return share + self.share + self.kind + self.rates.share + self.options["share"]

    def guide(self, x: Tensor) -> None:
        self.count = len(x)  # written before it is read
        with pyro.plate("data", self.count, dim=-1):
            loc, raw = self.encoder(x + self.coupled() * x.mean(0)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw) + 0.1).to_event(1))


OBJECTS: dict[str, Callable[[Plain], Any]] = {
    "attribute": lambda o: setattr(o, "share", 0.5),
    "inside an attribute": lambda o: o.options.__setitem__("share", 0.5),
    "attribute of an attribute": lambda o: setattr(o.rates, "share", 0.5),
    "another object": lambda o: setattr(o, "rates", Called()) or setattr(o.rates, "share", 0.5),
    "over a class's": lambda o: setattr(o, "kind", 0.5),
    "a method": lambda o: setattr(o, "coupled", lambda: 0.5),
}
CLASSES: dict[str, tuple[Any, str, Any]] = {
    "a class's": (Plain, "kind", 0.5),
    "a default": (Plain.coupled, "__defaults__", (0.5,)),
    "a method of the class": (Plain, "coupled", lambda self: 0.5),
}


@pytest.mark.parametrize("how", [*OBJECTS, *CLASSES])
@pytest.mark.parametrize("adopt", [pv.adopt, lambda o: pv.adopt(o.model, o.guide)])
def test_objects_that_change_are_noticed(how: str, adopt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Plain()
    program = adopt(pair)
    pv.encode(program, X)
    pv.encode(program, X)
    assert not anew(program, monkeypatch)
    pair.unread = 1.0
    pair.later = 1.0  # type: ignore[attr-defined]
    assert not anew(program, monkeypatch)
    if how in OBJECTS:
        OBJECTS[how](pair)
    else:
        monkeypatch.setattr(*CLASSES[how])
    with pytest.raises(ProgramError, match="depends on the other rows"):
        pv.encode(program, X)


def test_an_object_that_changes_itself_is_examined_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(Plain):
        def guide(self, x: Tensor) -> None:
            self.calls += 1
            super().guide(x)

    program = pv.adopt(Counting())
    pv.encode(program, X)
    assert anew(program, monkeypatch)


def test_classes_are_as_they_were() -> None:
    before = dict(vars(Plain))
    pv.encode(pv.adopt(Plain()), X)
    assert dict(vars(Plain)) == before
