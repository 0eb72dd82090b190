"""A program whose guide couples rows when a test says so, and what counts its runs and examinations."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.programs import examination
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
