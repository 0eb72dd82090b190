"""What a function read is noticed when it changes, and what it did not read is not."""

from __future__ import annotations

import gc
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyro_vae.guard import Guard
from pyro_vae.seeding import seeded

RATE = 1.0
COLLECTED = 0
TABLE = {"rate": [1.0, 2.0]}


@pytest.fixture(autouse=True)
def _generators_put_back() -> Iterator[None]:
    with seeded(0):
        yield


class Rates:
    """An object of the user's with a slot and a property."""

    __slots__ = ("first",)

    def __init__(self) -> None:
        self.first = 1.0

    @property
    def double(self) -> float:
        return 2 * self.first


class Part(nn.Module):
    """A layer with state of every kind."""

    shared = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(2, 2), nn.Dropout(0.0)
        self.number, self.unread, self.table = 1.0, 1.0, {"a": (1, [2.0])}
        self.rates, self.array, self.constant = Rates(), np.ones(3), torch.ones(3)
        self.activation: Callable[[Tensor], Tensor] = torch.tanh
        self.function, self.change = closed_over(1.0)
        self.calls = 0

    @property
    def factor(self) -> float:
        return self.number * self.shared * self.rates.double

    def forward(self, x: Tensor) -> Tensor:
        self.scratch = x.sum()  # written before it is read
        extra = getattr(self, "extra", 0.0) + RATE + TABLE["rate"][1] + self.table["a"][1][0] + self.function()
        return (
            self.activation(self.layer(self.drop(x))) * self.factor
            + extra
            + self.array[0]
            + self.constant[0]
            + self.scratch
        )


def closed_over(value: float) -> tuple[Callable[[], float], Callable[[float], None]]:
    """A function of a variable that no one else sees, and what sets it."""

    def get() -> float:
        return value

    def put(new: float) -> None:
        nonlocal value
        value = new

    return get, put


class Whole(nn.Module):
    """A program of two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.other = Part(), nn.Sequential(Part(), nn.BatchNorm1d(2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.other(self.part(x))
        return out


def watched(program: nn.Module) -> Guard:
    guard = Guard(program)
    with guard.watching():
        program(torch.zeros(3, 2))
    assert guard.changed() is None
    return guard


def rate(value: float) -> None:
    globals()["RATE"] = value


CHANGES: dict[str, tuple[Callable[[Whole], Any], str]] = {
    "a number": (lambda p: setattr(p.part, "number", 0.5), "program.part.number was 1.0 and is 0.5"),
    "a class's number": (lambda p: setattr(p.part, "shared", 0.5), "program.part.shared was 1.0 and is 0.5"),
    "inside containers": (lambda p: p.part.table["a"][1].append(3.0), "program.part.table has changed"),
    "a slot of an object": (lambda p: setattr(p.part.rates, "first", 3.0), "program.part.rates has changed"),
    "an array": (lambda p: p.part.array.fill(2.0), "program.part.array has changed"),
    "a tensor in place": (lambda p: p.part.constant.fill_(2.0), "program.part.constant has changed"),
    "a function": (lambda p: setattr(p.part, "activation", torch.sigmoid), "program.part.activation has changed"),
    "what was not there": (lambda p: setattr(p.part, "extra", 1.0), "program.part.extra was absent and is 1.0"),
    "a closure": (lambda p: p.part.change(2.0), "value of closed_over.<locals>.get was 1.0 and is 2.0"),
    "a global": (lambda p: rate(2.0), "RATE was 1.0 and is 2.0"),
    "inside a global": (lambda p: TABLE["rate"].insert(1, 5.0), "TABLE has changed"),
    "the mode of a submodule": (lambda p: p.other[1].eval(), "program.other.1.training was True and is False"),
    "a probability of dropout": (lambda p: setattr(p.part.drop, "p", 0.5), "program.part.drop.p was 0.0 and is 0.5"),
    "a submodule": (lambda p: setattr(p.part, "layer", nn.Linear(2, 2)), "the submodule 'part.layer' was replaced"),
    "one more submodule": (lambda p: p.other.append(nn.Tanh()), "the submodule 'other.2' was added"),
    "one submodule less": (lambda p: p.other.__delitem__(1), "the submodule 'other.1' was removed"),
    "a hook": (lambda p: p.part.layer.register_forward_hook(print), "program.part.layer._forward_hooks has changed"),
    "a method of one object": (
        lambda p: setattr(p.part.layer, "forward", types.MethodType(lambda self, x: x, p.part.layer)),
        "program.part.layer.forward has changed",
    ),
    "a parametrization": (lambda p: nn.utils.parametrizations.weight_norm(p.part.layer), "'part.layer' was replaced"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_what_was_read_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLE, "rate", [1.0, 2.0])
    monkeypatch.setitem(globals(), "RATE", 1.0)
    program = Whole()
    guard = watched(program)
    change, said = CHANGES[name]
    change(program)
    assert said in str(guard.changed())


@pytest.mark.parametrize(
    "change",
    [
        lambda p: setattr(p.part, "unread", 2.0),
        lambda p: setattr(p.part, "number", float("1.0")),
        lambda p: setattr(p.part, "constant", torch.ones(3)),
        lambda p: setattr(p.part, "table", {"a": (1, [2.0])}),
        lambda p: p(torch.ones(4, 2)),
        lambda p: p.part.layer.weight.data.zero_(),
        lambda p: setattr(p, "history", [1, 2, 3]),
        lambda p: (p.eval(), p.train()),
    ],
)
def test_what_was_not_read_or_looks_the_same_is_no_change(change: Callable[[Whole], Any]) -> None:
    program = Whole()
    guard = watched(program)
    change(program)
    assert guard.changed() is None


def test_a_function_that_changes_its_own_numbers_is_told() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.seen = 0, torch.zeros(())

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen = self.seen + x.sum()  # a tensor is for the recorder to find
            return x

    program = Counting()
    first, second = watched(program), watched(program)
    assert second.differs(first) == "program.calls"
    steady = Whole()
    first, second = watched(steady), watched(steady)
    assert second.differs(first) is None


def test_closures_are_those_of_the_functions_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found without a search of all that Python holds, which takes a tenth of a second beside large libraries."""
    searches: list[Any] = []
    search = gc.get_referrers
    monkeypatch.setattr(gc, "get_referrers", lambda *codes: searches.append(codes) or search(*codes))
    program, (_, put) = Whole(), closed_over(1.0)
    guard = watched(program)
    put(2.0)  # of a function with the same code
    assert guard.changed() is None
    assert searches == []

    def numbers() -> Iterator[float]:
        yield program.part.function()
        yield 1.0

    program.part.activation = lambda x: x * next(numbers())  # whose frame does not end
    guard = watched(program)
    assert len(searches) == 1
    program = Whole()
    assert "program of" in str(guard.changed())


def test_what_the_garbage_collector_calls_is_not_read() -> None:
    """Hypothesis, say, counts in its globals how long collections take."""

    def counting(phase: str, info: dict[str, Any]) -> None:
        globals()["COLLECTED"] = COLLECTED + 1

    program, often = Whole(), gc.get_threshold()
    gc.callbacks.append(counting)
    gc.set_threshold(1)
    try:
        guard = watched(program)
        assert gc.isenabled()
        gc.collect()
        assert COLLECTED > 0
        assert guard.changed() is None
    finally:
        gc.set_threshold(*often)
        gc.callbacks.remove(counting)


def test_modules_and_profiles_are_as_they_were() -> None:
    get, put = nn.Module.__getattribute__, nn.Module.__setattr__
    program = Whole()
    with pytest.raises(RuntimeError), Guard(program).watching():
        program(torch.zeros(3, 7))
    assert (nn.Module.__getattribute__, nn.Module.__setattr__) == (get, put)
    assert "__getattribute__" not in vars(nn.Module)
    assert sys.getprofile() is None
