"""Programs at random, as people write them for Pyro: what the library says is what Pyro says of each row alone, or it refuses.

The reference knows Pyro's handlers alone: model and guide are run on one row, with that row's draws, and the row's weight, ELBO
and gradients are those of the traces. Whether a program may be refused, and why, it finds by running it, too: a density of a row
alone that is another than in the batch, one that is another at every run, one that moves with x, sites too many or too few. So
neither a wrong number passes nor a needless refusal; numbers are compared at the guide's own draws, to rounding.
"""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any
from unittest import mock

import pyro
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor
from written_pieces import LEGAL, UNSCALED, Written, draw
from written_programs import Ready, program_of

import pyro_vae as pv
from pyro_vae.errors import UserError
from pyro_vae.evaluation import importance
from pyro_vae.programs.adopted import parameter_name
from pyro_vae.programs.folding import FOLDS, Spread
from pyro_vae.seeding import seeded
from pyro_vae.training.fit import _objective
from pyro_vae.training.settings import Settings

DRAWS = 5
SAYS = {  # what a refusal says, by the reason for it
    "rows": "other rows|it does not run on|stands outside the data plate|log_prob of the site|has a scale of its own",
    "noise": "another at every run",
    "reads x": "reads x",
    "second": "second observed site",
    "parts": "observes a tensor of shape",
    "conditioned": "depends on the latents",
    "factor": "pyro.factor 'bonus' makes q",
    "latents": "no site for the model's latent",
}
SEEN: Counter[str] = Counter()


class At(Messenger):
    """Latents at given values."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True


def traced(ready: Ready, part: str, data: dict[str, Tensor], values: dict[str, Tensor]) -> dict[str, Any]:
    """The sites of model or guide on data, at values of the latents."""
    args, kwargs = ready.given(data)
    with pyro.validation_enabled(False), At(values):
        nodes = poutine.trace(getattr(ready, part)).get_trace(*args, **kwargs).nodes
    skipped = ("_Subsample", "Delta")  # plates, and pyro.deterministic
    return {n: s for n, s in nodes.items() if s["type"] == "sample" and type(s["fn"]).__name__ not in skipped
            and not s["infer"].get("_deterministic")}  # fmt: skip


def density(site: dict[str, Any]) -> Tensor:
    """Of a site, masked and without scales, by element of its batch."""
    log_prob: Tensor = scale_and_mask(site["fn"].log_prob(site["value"]), 1.0, site["mask"])
    return log_prob


def total(sites: dict[str, Any], without: tuple[str, ...] = ()) -> Tensor:
    terms = [density(s).sum() for n, s in sites.items() if n not in without]
    return sum(terms[1:], terms[0])


def alike(made: Written, whole: Tensor, alone: list[Tensor]) -> bool:
    """Whether a site's density in the batch is that of each row alone; by element, for in a sum errors of both signs cancel."""
    rows = -2 if made.inner == "pixels at -1" else -1
    if whole.dim() < -rows or whole.shape[rows] != len(alone):
        return torch.allclose(whole.sum(), torch.stack([a.sum() for a in alone]).sum(), rtol=1e-4)
    by_row = [(w.flatten(), a.flatten()) for w, a in zip(whole.movedim(rows, 0), alone, strict=True)]
    return all(w.shape == a.shape and torch.allclose(w, a, rtol=1e-4, atol=1e-5) for w, a in by_row)


def row_of(data: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    return {name: value[n : n + 1] for name, value in data.items()}


def drawn_in(ready: Ready, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The draws of a run of the guide."""
    sites = traced(ready, "guide", data, {})
    return {name: sites[name]["value"] for name, _ in ready.pieces.made.latents if name in sites}


def reasons(made: Written) -> set[str]:
    """Why a program is none that has a log p(x) of each row; nothing where it is one."""
    ready, found = program_of(made), set[str]()
    data, other = made.data(rows=4, seed=7), made.data(rows=4, seed=8)
    with torch.no_grad():
        values = drawn_in(ready, data)
        states = states_of(ready, row_of(data, 0)) if len(values) == len(made.latents) else None
        if states:  # rows that drew the same state hide that they are coupled
            apart = [states[5 * n % len(states)] for n in range(4)]
            values = {name: torch.cat([state[name] for state in apart]) for name in values}
        whole = {part: traced(ready, part, data, values) for part in ("model", "guide")}
        alone = [
            {p: traced(ready, p, row_of(data, n), row_of(values, n)) for p in ("model", "guide")} for n in range(4)
        ]
        latents = {n for n, s in whole["model"].items() if not s["is_observed"]}
        if latents - {n for n, s in whole["guide"].items() if not s["is_observed"]}:
            return {"latents"}
        for part, sites in whole.items():
            for name, site in sites.items():
                again = density({**traced(ready, part, data, values)[name], "value": site["value"]})
                if again.shape != density(site).shape or not torch.allclose(again, density(site)):
                    found.add("noise")
                elif not alike(made, density(site), [density(a[part][name]) for a in alone]):
                    found.add("rows")
        if any(type(s["fn"]).__name__ == "Unit" for s in whole["guide"].values()):
            found.add("factor")
        observed = {n: s for n, s in whole["model"].items() if s["is_observed"] and type(s["fn"]).__name__ != "Unit"}
        conditioned = ("label",) if made.twist.startswith("conditioned") else ()
        if len(observed) > 1 + len(conditioned):
            found.add("second")
        elif not any(s["value"].numel() == data["x"].numel() for s in observed.values()):
            found.add("parts")
        elsewhere = traced(ready, "model", data, {n: v.roll(1, 0) for n, v in values.items()})
        if conditioned and not torch.allclose(density(elsewhere["label"]), density(whole["model"]["label"])):
            found.add("conditioned")
        moved = traced(ready, "model", {**data, "x": other["x"]}, values)
        for name in set(moved) & set(whole["model"]) if not found else ():
            site = {**moved[name], "value": whole["model"][name]["value"]}
            if not torch.allclose(density(site), density(whole["model"][name])):
                found.add("reads x")
    return found


def asked(ready: Ready, data: dict[str, Tensor]) -> dict[str, Any]:
    """y and inputs, as functions of the library take them."""
    found: dict[str, Any] = {"inputs": {n: data[n] for n in ready.inputs}} if ready.inputs else {}
    return found if ready.y is None else {**found, "y": data["y"]}


def answer(call: Any) -> tuple[Any, str]:
    """What a call returns, or None and the refusal in one line."""
    try:
        return call(), ""
    except UserError as error:
        found = str(error)
    assert "\n" not in found
    return None, found


def require_reason(made: Written, why: set[str], found: Any, said: str, what: str) -> bool:
    """A program is taken if nothing is against it; else refused, with one of the reasons that there are."""
    assert (found is None) == bool(why), f"{what}: {why or 'nothing'} is against {made}, and it was {said or 'taken'}"
    assert found is not None or any(re.search(SAYS[w], said) for w in why), (why, said, made)
    return found is not None


@contextmanager
def noted(ready: Ready) -> Iterator[list[dict[str, Tensor]]]:
    """What a guide draws that is run once for all draws, of which it sees the first alone."""
    found, draw = list[dict[str, Tensor]](), Spread.__call__

    def call(self: Spread, *args: Any, **kwargs: Any) -> Tensor:
        value = draw(self, *args, **kwargs)
        found.append({ready.pieces.made.latents[0][0]: value})
        return value

    with mock.patch.object(Spread, "__call__", call):
        yield found


def by_draw(ready: Ready, rows: int, once: list[dict[str, Tensor]]) -> list[list[dict[str, Tensor]]]:
    """The last draws of the guide, by draw and row, each as on the row alone."""
    found, needed = list[list[dict[str, Tensor]]](), DRAWS
    folded = isinstance(vars(ready.program)[FOLDS], dict) and not once
    for drawn in reversed(once or ready.pieces.drawn):
        size = len(next(iter(drawn.values())))
        number = size // rows if folded else size
        if folded:
            drawn = {n: v.reshape(number, rows, *v.shape[1:]) for n, v in drawn.items()}
        found = [[{n: v[k, i : i + 1] for n, v in drawn.items()} for i in range(rows)] for k in range(number)] + found
        needed -= number
        if needed <= 0:
            break
    assert needed == 0
    return found


def states_of(ready: Ready, row: dict[str, Tensor]) -> list[dict[str, Tensor]] | None:
    """Every joint value of the latents on one row, as they have it; None where one is continuous."""
    families = ready.pieces.made.latents
    if not {f for _, f in families} <= {"bits", "class", "one-hot"}:
        return None
    each = {"bits": list(itertools.product([0.0, 1.0], repeat=2)), "class": [0, 1, 2], "one-hot": torch.eye(3).tolist()}
    like = drawn_in(ready, row)
    return [
        {n: torch.tensor(v).to(like[n]).reshape(like[n].shape) for (n, _), v in zip(families, values, strict=True)}
        for values in itertools.product(*(each[f] for _, f in families))
    ]


def close(found: Any, expected: Any, made: Written) -> None:
    rtol, atol = (1e-4, 2e-4) if made.dtype == torch.float32 else (1e-9, 1e-9)
    found, expected = (torch.as_tensor(v, dtype=torch.float64) for v in (found, expected))
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def require_weights(made: Written, why: set[str]) -> None:
    ready, data = program_of(made), made.data()
    how: dict[str, Any] = {"num_samples": DRAWS, "compile": "off", **asked(ready, data)}
    with noted(ready) as once:
        result, said = answer(lambda: pv.log_likelihood(ready.program, data["x"], **how))
    if not require_reason(made, why, result, said, "log_likelihood"):
        return
    expected = []
    draws = None if states_of(ready, row_of(data, 0)) is not None else by_draw(ready, made.rows, once)
    with torch.no_grad():
        for n in range(made.rows):
            row = row_of(data, n)
            every = states_of(ready, row) or [at[n] for at in draws or ()]
            weights = torch.stack([
                total(traced(ready, "model", row, at), ("label",))
                - (total(traced(ready, "guide", row, at)) if draws is not None else 0.0)
                for at in every
            ])  # fmt: skip
            expected.append(float(torch.logsumexp(weights.double(), 0)) - (math.log(DRAWS) if draws else 0.0))
    close(result.log_likelihood, expected, made)


def scaled(made: Written, sites: dict[str, Any]) -> Any:
    """The log-densities of one row's sites added up, each by its scale in the batch."""
    plate = UNSCALED / made.rows if made.plate.startswith("subsample") else 1.0
    latents = {name for name, _ in made.latents}
    weight = {n: plate * (0.5 if made.twist == "weighted" and n in latents else 1.0) for n in sites}
    return {n: weight[n] * density(s).sum() for n, s in sites.items()}


def require_gradients(made: Written) -> None:
    """The ELBO of one draw for each row, and its gradients: of paths, and of scores where there is none."""
    ready, data = program_of(made), made.data()
    given = asked(ready, data)
    pv.encode(ready.program, data["x"], **given)
    y = given.get("y")
    if ready.inputs:
        y = ready.program.with_inputs(y, given["inputs"])
    parameters = dict(ready.program.named_parameters())
    with seeded(3):
        loss, surrogate = _objective(Settings(objective="elbo"))(ready.program, data["x"], y)  # type: ignore[arg-type]
    found = torch.autograd.grad(surrogate, list(parameters.values()), allow_unused=True)
    with seeded(3):
        values = drawn_in(ready, data)
    for name, value in values.items():
        assert torch.equal(value.detach().flatten(), ready.pieces.drawn[-1][name].detach().flatten())
    elbo: Any = 0.0
    plain: Any = 0.0
    for n in range(made.rows):
        row, at = row_of(data, n), row_of(values, n)
        model, guide = traced(ready, "model", row, at), traced(ready, "guide", row, at)
        p = scaled(made, {n: s for n, s in model.items() if n != "label"})
        q = scaled(made, guide)
        weight = sum(p.values()) - sum(q.values())
        scores = [density(s).sum() for s in guide.values() if not s["fn"].has_rsample]
        unseen = sum(v for name, v in q.items() if not guide[name]["fn"].has_rsample)
        elbo, plain = elbo + weight.detach(), plain + weight + unseen + sum(scores) * weight.detach()
    close(loss, -elbo / made.rows, made)
    store = pyro.get_param_store()
    names = {parameter_name(n): n for n in store}
    theirs = [
        store._params[names[n.removeprefix("param.")]] if n.startswith("param.") else p for n, p in parameters.items()
    ]
    expected = torch.autograd.grad(-plain / made.rows, theirs, allow_unused=True)
    for name, a, b in zip(parameters, found, expected, strict=True):
        assert (b is None or not b.any()) if a is None else True, (name, made)
        if a is not None:
            close(a, torch.zeros_like(a) if b is None else b, made)


def require_the_rest(made: Written, why: set[str], batch: int) -> None:
    """Training takes it or refuses it as evaluation does, and what goes through a program and back has its shape."""
    ready, data = program_of(made), made.data()
    given = asked(ready, data)
    rows: Any = data["x"] if ready.y is None else torch.utils.data.TensorDataset(data["x"], data["y"])
    inputs = {n: v for n, v in given.items() if n == "inputs"}
    run, said = answer(lambda: pv.fit(ready.program, rows, steps=2, batch_size=batch, compile="off", **inputs))
    if not require_reason(made, why, run, said, "fit"):
        return
    shape = {"event_shape": (made.width,)}
    assert pv.sample(ready.program, made.rows, **given, **shape).shape == data["x"].shape
    assert pv.reconstruct(ready.program, data["x"], num_samples=2, **given).shape == (2, *data["x"].shape)
    found = pv.encode(ready.program, data["x"], num_samples=3, **given)
    for value in found.values() if isinstance(found, dict) else [found]:
        assert value.shape[:2] == (3, made.rows)


@pytest.mark.parametrize("number", [8, pytest.param(500, marks=pytest.mark.slow)])
def test_programs_as_people_write_them(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "measured", lambda *a: None)  # of rounding, which draws anew after the weights

    @settings(
        max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.randoms(use_true_random=True))
    def run(random: Random) -> None:
        made, batch = draw(random), random.randint(1, 4)
        SEEN[made.twist] += 1
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pyro.get_param_store().scope():
                why = reasons(made)
            assert not (why and made.twist in LEGAL), (why, made)
            for law in (lambda: require_weights(made, why), lambda: require_the_rest(made, why, batch),
                        lambda: None if why else require_gradients(made)):  # fmt: skip
                with pyro.get_param_store().scope():
                    law()

    run()
    print(dict(SEEN))
