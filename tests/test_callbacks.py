"""What a callback changes between epochs is trained with from the next epoch on, compiled or not.

The graph of a compiled step is run here as it was recorded, without Inductor, but for one slow test; numbers are float64 and the
draws are the same, so that a step that kept what has changed since is off by far more than the limit: the smallest of the changes
below moves a weight by 1e-3 in two epochs.
"""

from __future__ import annotations

import shutil
import types
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import capture
from pyro_vae.capture import CaptureWarning
from pyro_vae.errors import UserError
from pyro_vae.seeding import generator, seeded
from pyro_vae.training import loop

LIMIT = 1e-7
ANEW, ON = "recorded anew", "goes on uncompiled"
Change = Callable[[Any, int, Tensor, Any], Any]


class Annealed(nn.Module):
    """A VAE whose KL is weighted by an attribute and a buffer, with a layer in reserve."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), nn.Tanh(), nn.Linear(6, 4))
        self.decoder, self.reserve = nn.Linear(2, 4), nn.Linear(4, 4)
        self.weight, self.uses_reserve = 1.0, False
        self.register_buffer("factor", torch.ones(()))
        self.register_buffer("mean", torch.zeros(4))

    def scale(self) -> Any:
        return self.weight * self.factor

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            with pyro.poutine.scale(scale=self.scale()):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = self.decoder(z)
            pyro.sample("x", dist.Normal(self.reserve(loc) if self.uses_reserve else loc, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)  # another tensor, not the old one changed
        with pyro.plate("data", len(x), dim=-1), pyro.poutine.scale(scale=self.scale()):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw) + 1e-3).to_event(1))


def after(epoch: int, change: Change) -> Change:
    return lambda p, now, x, trainer: change(p, now, x, trainer) if now == epoch else None


def slower(p: Any, epoch: int, x: Tensor, trainer: Any) -> None:
    trainer.schedule.lr *= 0.1
    trainer.optimizer.param_groups[0]["eps"] = 1e-3


def another_decoder(p: Any, epoch: int, x: Tensor, trainer: Any) -> None:
    with seeded(5):
        p.decoder = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4)).double()


CHANGES: dict[str, tuple[Change, str]] = {
    "attribute": (after(1, lambda p, e, x, t: setattr(p, "weight", 0.1)), ANEW),
    "attribute, every epoch": (lambda p, e, x, t: setattr(p, "weight", e / 5), ON),
    "requires_grad": (after(1, lambda p, e, x, t: p.encoder.requires_grad_(False)), ANEW),
    "requires_grad, and back": (
        lambda p, e, x, t: p.encoder[3].requires_grad_(e != 1) if e in (1, 3) else None,
        ANEW,
    ),
    "learning rate": (after(1, slower), ANEW),
    "module": (after(1, another_decoder), ANEW),
    "parameter": (after(1, lambda p, e, x, t: setattr(p.decoder, "bias", nn.Parameter(p.decoder.bias + 1))), ANEW),
    "a parameter's data, every epoch": (
        lambda p, e, x, t: setattr(p.decoder.weight, "data", p.decoder.weight.data.clamp(-0.3, 0.3)),
        "",
    ),
    "buffer, every epoch": (lambda p, e, x, t: setattr(p, "factor", torch.tensor(e / 5, dtype=x.dtype)), ""),
    "mode": (after(1, lambda p, e, x, t: p.encoder[1].eval()), ANEW),
    "mode of all": (after(1, lambda p, e, x, t: p.eval()), ""),
    "data order": (after(1, lambda p, e, x, t: x.copy_(x.flip(0))), ""),
    "hook": (
        after(1, lambda p, e, x, t: p.decoder.register_forward_hook(lambda m, i, out: 0.5 * out)),
        "would not be called",
    ),
    "a gradient's hook": (
        after(1, lambda p, e, x, t: p.decoder.weight.register_hook(lambda g: 0.1 * g)),
        "would not be called",
    ),
    "a layer in reserve": (after(1, lambda p, e, x, t: setattr(p, "uses_reserve", True)), ANEW),
    "method": (after(1, lambda p, e, x, t: setattr(p, "scale", types.MethodType(lambda self: 0.1, p))), ANEW),
}
FAST = {"attribute"}


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "compiled", lambda graph, example: lambda tensors: graph(*tensors))


def trained(
    compile: str, change: Change, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors after four epochs, and what was said of compiling."""
    trainers: list[Any] = []
    make = loop.Trainer.__init__

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        trainers.append(self)

    with seeded(0):
        program = Annealed().double()
    x = torch.randn(100, 4, generator=generator("test of callbacks"), dtype=torch.float64)

    def callback(metrics: dict[str, Any]) -> None:
        with torch.no_grad():
            change(program, metrics["epoch"], x, trainers[-1])

    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(loop.Trainer, "__init__", noted)
        given = {"epochs": 4, "batch_size": 20, "lr": 0.01, "compile": compile, "callback": callback, **settings}
        pv.fit(program, x, **given)
    told = [str(w.message) for w in caught if issubclass(w.category, CaptureWarning)]
    return {n: t.detach().clone() for n, t in program.state_dict().items()}, told


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max()) for n in a)


@pytest.mark.parametrize("kind", [k if k in FAST else pytest.param(k, marks=pytest.mark.slow) for k in CHANGES])
@pytest.mark.usefixtures("uncompiled")
def test_a_compiled_step_follows_what_a_callback_changes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, said = CHANGES[kind]
    settings = {"optimizer": "adamw", "clip_norm": 0.5}
    plain, _ = trained("off", change, monkeypatch, **settings)
    untouched, _ = trained("off", lambda p, e, x, t: None, monkeypatch, **settings)
    compiled, told = trained("on", change, monkeypatch, **settings)
    assert difference(plain, compiled) < LIMIT
    if kind not in ("module", "mode of all"):  # other parameters; an all-round eval() that training ends
        assert difference(plain, untouched) > 1e4 * LIMIT
    assert bool(told) == bool(said)
    assert said in " ".join(told)
    assert all("\n" not in line for line in told)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="Inductor needs a C++ compiler")
def test_the_same_with_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("attribute", "buffer, every epoch", "a layer in reserve"):
        change, said = CHANGES[kind]
        compiled, told = trained("on", change, monkeypatch)
        assert difference(trained("off", change, monkeypatch)[0], compiled) < LIMIT
        assert said in " ".join(told)


@pytest.mark.usefixtures("uncompiled")
def test_a_parameter_without_a_gradient_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW would take 1e-4 of it at every step: 2e-3 in all."""
    nothing: Change = lambda p, e, x, t: None  # noqa: E731
    with seeded(0):
        before = Annealed().double().reserve.weight.detach()
    for compile in ("off", "on"):
        weights, told = trained(compile, nothing, monkeypatch, optimizer="adamw", lr=0.01)
        assert torch.equal(weights["reserve.weight"], before)
        assert told == []


@pytest.mark.usefixtures("uncompiled")
def test_a_program_that_counts_its_calls_is_not_compiled() -> None:
    class Counting(Annealed):
        calls = 0

        def scale(self) -> Any:
            self.calls += 1
            return 1.0 if self.calls > 1000 else 0.1

    with seeded(0):
        program = Counting()
    x = torch.randn(40, 4, generator=generator("test of callbacks"))
    with pytest.warns(CaptureWarning, match=r"the program changes program\.calls itself when it runs"):
        pv.fit(program, x, epochs=1, batch_size=20, compile="on")


def test_nothing_left_to_train() -> None:
    with seeded(0):
        program = Annealed()
    x = torch.randn(40, 4, generator=generator("test of callbacks"))
    with pytest.raises(UserError, match="nothing left to train"):
        pv.fit(program, x, epochs=3, callback=lambda m: program.requires_grad_(False) and None)
