"""Programs as people write them for Pyro: who owns the tensors, what the arguments are called, and what the library is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor, nn
from written_pieces import ARGUMENTS, Pieces, Written

import pyro_vae as pv


class InModule(Pieces, nn.Module):
    """The tensors are the parameters of a module."""

    def __init__(self, made: Written) -> None:
        nn.Module.__init__(self)
        Pieces.__init__(self, made)
        self.table = nn.ParameterDict({n.replace(".", "_"): nn.Parameter(v.clone()) for n, v in self.values.items()})

    def tensor(self, name: str) -> Tensor:
        found: Tensor = self.table[name.replace(".", "_")]
        return found.square() + 0.1 if name == "scale" else found


class WithPyroModule(Pieces):
    """No module, but an object that holds one, and says so to Pyro."""

    def __init__(self, made: Written) -> None:
        super().__init__(made)
        self.table = nn.ParameterDict({n.replace(".", "_"): nn.Parameter(v.clone()) for n, v in self.values.items()})

    def start(self, part: str) -> None:
        pyro.module("table", self.table)
        pyro.module("up" if part == "guide" else "down", self.up if part == "guide" else self.down)

    tensor = InModule.tensor


class WithPyroParam(Pieces, pyro.nn.PyroModule):  # type: ignore[misc]
    """A PyroModule whose scale is constrained."""

    def __init__(self, made: Written) -> None:
        pyro.nn.PyroModule.__init__(self)
        Pieces.__init__(self, made)
        for name, value in self.values.items():
            kind = dist.constraints.positive if name == "scale" else dist.constraints.real
            setattr(self, f"t_{name.replace('.', '_')}", pyro.nn.PyroParam(value.clone(), kind))

    def tensor(self, name: str) -> Tensor:
        found: Tensor = getattr(self, f"t_{name.replace('.', '_')}")
        return found


KINDS = {"param": Pieces, "pyro.module": WithPyroModule, "PyroParam": WithPyroParam}


@dataclass
class Ready:
    """A program as it is handed over: the pieces, what the library is given, and how each is called."""

    pieces: Any
    model: Callable[..., Any]
    guide: Callable[..., Any]
    program: Any
    y: str | None  # which of the data goes as y
    inputs: tuple[str, ...] = ()
    constants: dict[str, float] = field(default_factory=dict)
    data_name: str = "x"

    def given(self, data: dict[str, Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """Of a call of model or guide as Pyro makes it."""
        if self.data_name == "*":
            return [data["x"]], {}
        named = {self.data_name: data["x"], **{n: data[n] for n in self.inputs}, **self.constants}
        return [], named if self.y is None else {**named, self.y: data["y"]}


def adopts(made: Written) -> bool:
    """Whether it must be: else it is an ``nn.Module`` with a model and a guide, as the library takes it."""
    plain = made.arguments in ("x", "data alone", "x, y", "x, ys=None")
    return made.owner in ("module adopted", "param", "pyro.module") or not plain or "conditioned" in made.twist


def program_of(made: Written) -> Ready:
    """The program of these pieces."""
    pieces = KINDS.get(made.owner, InModule)(made)
    signature, observed = ARGUMENTS[made.arguments]
    first = observed or signature.split(",")[0].strip(" *")
    names = [
        n
        for n in ("y", "ys", "labels")
        if n in signature.replace("anything", "").replace(",", " ").replace("=", " ").split()
    ]

    def written(part: str) -> Callable[..., Any]:
        body = getattr(pieces, part)
        if "anything" not in signature:
            y = f", y={names[0]}" if names else ""
            more = "".join(f", {n}={n}" for n in ("context", "shift") if n in signature)
            call = f"body({first}{y}{more})"
        else:
            call = (
                "body(anything[0])"
                if signature == "*anything"
                else "body(anything['docs'], context=anything['context'])"
            )
        scope: dict[str, Any] = {"__name__": __name__, "body": body}
        exec(
            f"def part({signature}): return {call}", scope
        )  # as its user writes it, whatever the order of its arguments
        found: Callable[..., Any] = scope["part"]
        return found

    model, guide = written("model"), written("guide")
    inputs = ("context",) if "context" in signature or signature == "**anything" else ()
    constants = {"shift": 0.4} if "shift" in signature else {}
    ready = Ready(
        pieces,
        model,
        guide,
        None,
        names[0] if names else None,
        inputs,
        constants,
        "*" if signature == "*anything" else first,
    )
    if adopts(made):
        conditioned = ("label",) if made.twist.startswith("conditioned") else ()
        ready.program = pv.adopt(model, guide, observed=observed, constants=constants, conditioned=conditioned)
        return ready
    kind = type(pieces)
    scope = {"__name__": __name__, "kind": kind}
    y = f", y={names[0]}" if names else ""
    for part in ("model", "guide"):
        exec(f"def {part}(self, {signature}): return kind.{part}(self, {first}{y})", scope)
    pieces.__class__ = type("Program", (kind,), {part: scope[part] for part in ("model", "guide")})
    ready.program, ready.model, ready.guide = pieces, pieces.model, pieces.guide
    return ready
