"""Programs at random: what the library says of each is what a plain computation says, row by row, or it is refused in one line.

A program that is legal must be taken, and one that is not must be refused at every door: neither a wrong number nor a needless
refusal passes. Numbers are compared with the very draws of the guide, to rounding, so there is no chance in it but that of
``test`` of samples' spread (6 standard errors: a false alarm in 5e8). In 500 programs each twist occurs about 12 times.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_reference import Plain, trained
from random_programs import DISCRETE, PATHWISE, SUPPORT_OF, SUPPORTS, Declared, Drawn, Site, law, program_of
from torch import Tensor
from torch import distributions as td

import pyro_vae as pv
from pyro_vae.errors import UserError
from pyro_vae.evaluation.result import UnreliableEstimateWarning

LEGAL = (
    "none", "factor", "factor of x", "row mask", "latent mask", "deterministic", "element mask", "scale", "change of variables",
    "point",
)  # fmt: skip
ILLEGAL = (
    "second observation", "prior reads x", "model reads x", "model reads the mean of x", "rows coupled", "coupled by y",
    "rows across", "place of a row", "number of rows", "hidden noise", "one element for all", "axis too many", "axis too few",
    "transposed observation", "observation of other units", "observation of the first row", "auxiliary noise",
    "wrong Jacobian", "guide of one element", "missing in the guide", "param store", "outside the plate", "subsampled",
    "lone datum", "missing value", "outside the support", "guide couples rows", "hidden noise in the guide",
    "factor in the guide", "second plate", "no observation",
)  # fmt: skip
OF_THE_GUIDE = (
    "auxiliary noise", "wrong Jacobian", "guide of one element", "missing in the guide", "guide couples rows",
    "hidden noise in the guide", "factor in the guide",
)  # fmt: skip
OF_DATA = ("lone datum", "missing value", "outside the support")
SEEN: Counter[str] = Counter()
DRAWS = 5


def applies(d: Declared) -> bool:
    """Whether a twist changes the program at all."""
    given_y = d.y == "required" or (d.y == "optional" and d.y_given)
    real = bool(d.sites) and SUPPORT_OF[d.sites[0].prior] == "real"
    differ = d.rows > 1 and bool((d.data()[0][1:] != d.data()[0][:1]).any())
    needs = {
        "prior reads x": bool(d.sites),
        "rows coupled": bool(d.sites) and d.rows > 1,
        "coupled by y": given_y and d.rows > 1 and len(set(d.data()[1].tolist())) > 1,  # type: ignore[union-attr]
        "rows across": given_y and d.rows > 1,
        "one element for all": d.size > 1,
        "transposed observation": len(d.event) == 2
        and not d.flat
        and bool(d.size == 2 or (d.data()[0] != d.data()[0].mT).any()),
        "observation of the first row": differ,
        "auxiliary noise": bool(d.sites),
        "change of variables": real,
        "wrong Jacobian": real,
        "point": real,
        "guide of one element": bool(d.sites) and (d.sites[0].width or 1) > 1,
        "missing in the guide": bool(d.sites),
        "subsampled": d.rows > 1,
        "missing value": d.data_dtype.is_floating_point,
        "outside the support": d.likelihood in DISCRETE and d.data_dtype.is_floating_point,
        "guide couples rows": bool(d.sites) and differ,
        "hidden noise in the guide": bool(d.sites),
        "factor in the guide": bool(d.sites),
        "row mask": given_y,
        "latent mask": given_y,
    }
    return bool(needs.get(d.twist, True))


def program_from(random: Random) -> Declared:
    """Any program; all of its parts are as likely whatever was drawn before, but for what the twist needs."""
    twist = random.choice([*["none"] * 6, *LEGAL, *ILLEGAL])
    while not applies(declared := untwisted(random, twist)):
        pass
    return declared


def untwisted(random: Random, twist: str) -> Declared:
    families = list(SUPPORT_OF)

    def site() -> Site:
        prior = random.choice(families)
        guide = random.choice(families if random.random() < 0.1 else SUPPORTS[SUPPORT_OF[prior]])
        return Site(prior, guide, random.choice([None, 1, 2]), random.choice(["exact", "none", "one"]))

    likelihood = random.choice(["normal", "student", "bernoulli", "poisson", "categorical"])
    dtypes = [torch.float32, torch.float64, torch.int64]
    return Declared(
        rows=random.randint(1, 4),
        event=random.choice([(1,), (2,), (3,), (3,), (2, 2), (1, 2), (2, 1), ()]),
        flat=random.random() < 0.5,
        likelihood=likelihood,
        sites=tuple(site() for _ in range(random.choice([0, 1, 1, 1, 2, 2, 3]))),
        chained=random.random() < 0.5,
        dtype=random.choice([torch.float32, torch.float64]),
        data_dtype=random.choice([*dtypes, torch.uint8] if likelihood in DISCRETE else dtypes),
        tensors=random.choice(["trained", "trained", "frozen", "buffers"]),
        y=random.choice(["none", "none", "optional", "required"]),
        y_given=random.random() < 0.7,
        twist=twist,
        seed=random.randrange(10**6),
    )


def kinds(d: Declared) -> set[str]:
    """How each site's guide lies to its prior: same, wider, narrower or other (discrete against continuous, or neither)."""
    found = set()
    for j, site in enumerate(d.sites):
        ours, theirs = SUPPORT_OF[site.guide], SUPPORT_OF[site.prior]
        if j == 0 and d.twist in ("change of variables", "point"):
            continue
        within = [("unit", "positive"), ("unit", "real"), ("positive", "real"), ("bits", "classes"), ("bits", "counts"),
                  ("classes", "counts")]  # fmt: skip
        if ours != theirs:
            found.add("narrower" if (ours, theirs) in within else "wider" if (theirs, ours) in within else "other")
    return found


def answer(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What a call returns, None where it is refused in one line, and what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = call()
        except UserError as error:
            found = error
    if isinstance(found, UserError):
        assert len(str(found).splitlines()) == 1
        return None, [str(found)]
    assert all(issubclass(w.category, (UnreliableEstimateWarning, UserWarning)) for w in caught)
    return found, [str(w.message) for w in caught]


def close(found: Any, expected: Any, d: Declared) -> None:
    rtol, atol = (1e-4, 1e-3) if d.dtype == torch.float32 else (1e-9, 1e-8)
    found, expected = (torch.as_tensor(v, dtype=torch.float64) for v in (found, expected))
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, equal_nan=False)


def last_draws(program: Drawn, rows: int) -> list[dict[str, Tensor]]:
    """The draws ``(K, *latent)`` of each row, put together from the last calls of the guide."""
    needed, blocks = rows * DRAWS, []
    for x, _, draws in reversed(program.calls):
        if needed <= 0:
            break
        blocks.append((len(x), draws))
        needed -= len(x) * len(next(iter(draws.values())))
    assert needed == 0
    found: list[dict[str, Tensor]] = []
    width, open_, pending = 0, 0, []
    for width, draws in reversed(blocks):
        pending.append(draws)
        open_ += len(next(iter(draws.values())))
        if open_ == DRAWS:
            joined = {n: torch.cat([p[n] for p in pending]) for n in draws}
            found += [{n: v[:, i] for n, v in joined.items()} for i in range(width)]
            open_, pending = 0, []
    return found


def plain_of(d: Declared, program: Drawn) -> Plain:
    return Plain(d, {n: t.detach().double().clone() for n, t in program.state_dict().items()})


def label(y: Tensor | None, i: int) -> float | None:
    return None if y is None else float(y[i])


def require_likelihood(d: Declared, x: Tensor, y: Tensor | None, chunk: int | None) -> None:
    program = program_of(d)
    result, said = answer(lambda: pv.log_likelihood(program, x, y, num_samples=DRAWS, compile="off", chunk_size=chunk))
    legal = d.twist in LEGAL and d.event != ()
    kind = kinds(d)
    if not legal or d.twist == "point" or "other" in kind:
        assert result is None, f"log_likelihood took {d}"
        return
    if result is None:
        assert kind, f"log_likelihood refused {d}: {said}"
        return
    plain = plain_of(d, program)
    draws = [{}] * len(x) if not d.sites or plain.states is not None else last_draws(program, len(x))
    expected = [plain.log_likelihood(x[i].double(), label(y, i), draws[i]) for i in range(len(x))]
    close(result.log_likelihood, expected, d)
    if plain.states is None and d.sites:
        rows = [plain.row(x[i].double(), label(y, i), draws[i]) for i in range(len(x))]
        close(result.reconstruction, [float(r.log_likelihood.expand(DRAWS).mean()) for r in rows], d)
        discrete = any(s.prior in DISCRETE for s in d.sites)
        if "narrower" in kind or (discrete and not result.proof.reaches):
            assert any("lives on" in text or "discrete" in text for text in said), (d, said)
        for other in (result.mc_se, result.ess):
            assert not bool((other < 0).any())


def require_encoding(d: Declared, x: Tensor, y: Tensor | None) -> None:
    program = program_of(d)
    found, said = answer(lambda: pv.encode(program, x, y))
    if d.twist not in (*LEGAL, "outside the support") or d.event == ():
        assert found is None, f"encode took {d}"
        return
    if found is None:
        assert kinds(d), f"encode refused {d}: {said}"
        return
    plain = plain_of(d, program)
    sites = {f"z{j}": s for j, s in enumerate(d.sites)}
    found = found if isinstance(found, dict) else {"z0": found}
    assert list(found) == list(sites)
    rows = [plain.encoded(x[i].double(), label(y, i)) for i in range(len(x))]
    for j, (name, site) in enumerate(sites.items()):
        assert found[name].shape == (len(x), *site.shape)
        close(found[name].reshape(len(x), -1), torch.stack([r[j] for r in rows]), d)
    drawn, _ = answer(lambda: pv.encode(program, x, y, num_samples=3))
    drawn = drawn if isinstance(drawn, dict) else {"z0": drawn}
    for name in sites:
        assert torch.equal(drawn[name], program.calls[-1][2][name])
        assert drawn[name].shape == (3, len(x), *sites[name].shape)


def require_samples(d: Declared, y: Tensor | None) -> None:
    program, number = program_of(d), d.rows if y is not None else 50
    means, said = answer(lambda: pv.sample(program, number, y, mean=True))
    if d.twist not in LEGAL and d.twist not in (*OF_THE_GUIDE, *OF_DATA):
        assert means is None, f"sample took {d}"
        return
    if means is None:
        assert d.event == () or kinds(d), f"sample refused {d}: {said}"
        return
    plain = plain_of(d, program)
    drawn, _ = answer(lambda: pv.sample(program, number, y))
    assert means.shape == drawn.shape == (number, *d.event)
    latents = [g.double().reshape(number, -1) for g in program.generated]
    if any(s.prior in DISCRETE for s in d.sites) or d.twist.startswith("factor"):
        pass
    locs = torch.cat([plain.loc([z[i : i + 1] for z in latents], label(y, i)).expand(1, -1) for i in range(number)])
    fn = law(d.likelihood, locs, td)
    flat = drawn.double().reshape(number, -1)
    assert bool(fn.support.check(flat).all())
    if d.likelihood == "categorical":
        return
    again, _ = answer(lambda: pv.sample(program, number, y, mean=True))
    locs = torch.cat([
        plain.loc([g.double().reshape(number, -1)[i : i + 1] for g in program.generated], label(y, i)).expand(1, -1)
        for i in range(number)
    ])  # fmt: skip
    close(again.reshape(number, -1), law(d.likelihood, locs, td).mean, d)
    errors = (flat - fn.mean) / fn.stddev
    assert abs(float(errors.mean())) < 6 / math.sqrt(errors.numel())


def require_training(d: Declared, x: Tensor, y: Tensor | None, steps: int, batch: int) -> None:
    program = program_of(d)
    before = {n: t.detach().double().clone() for n, t in program.state_dict().items()}
    frozen = {n for n, t in before.items() if n not in {m for m, p in program.named_parameters() if p.requires_grad}}
    data: Any = x if y is None or x.shape[:1] != y.shape else torch.utils.data.TensorDataset(x, y)
    how: dict[str, Any] = {"steps": steps, "batch_size": batch, "optimizer": "sgd", "lr": 0.01, "schedule": "constant"}
    run, said = answer(lambda: pv.fit(program, data, average=None, compile="off", **how))
    if d.twist not in LEGAL or d.event == () or len(frozen) == len(before):
        assert run is None, f"fit took {d}"
        return
    if run is None:
        assert kinds(d), f"fit refused {d}: {said}"
        return
    calls = program.calls[-steps:]
    size, per_epoch = min(batch, len(x)), max(1, len(x) // batch)
    for first in range(0, steps, per_epoch):
        rows = torch.cat([c[0] for c in calls[first : first + per_epoch]]).double()
        assert len(rows) == size * len(calls[first : first + per_epoch])
        left = [(r.tolist(), label(y, i)) for i, r in enumerate(x.double())]
        labels = [label(c[1], i) for c in calls[first : first + per_epoch] for i in range(len(c[0]))]
        for row, own in zip(rows.tolist(), labels, strict=True):
            same = [k for k in left if torch.allclose(torch.tensor(k[0]), torch.tensor(row)) and k[1] == own]
            assert same, f"fit trained on a row that is none: {d}"
            left.remove(same[0])
    after, losses = trained(d, before, frozen, calls, 0.01)
    by_epoch = [losses[i : i + per_epoch] for i in range(0, steps, per_epoch)]
    pathwise = all(s.guide in (*PATHWISE, *DISCRETE) for s in d.sites)
    known = by_epoch if pathwise else by_epoch[:1] if per_epoch == 1 else []
    for metrics, expected in zip(run.metrics, known, strict=False):
        close(metrics["train_loss"], sum(expected) / len(expected), d)
    now = program.state_dict()
    for name in frozen:
        assert torch.equal(now[name].double(), before[name]), f"fit moved {name} of {d}"
    if pathwise:
        for name, value in after.items():
            close(now[name], value, d)


@pytest.mark.parametrize("number", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_programs(number: int) -> None:
    @settings(
        max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.randoms(use_true_random=True))
    def run(random: Random) -> None:
        d = program_from(random)
        chunk, steps, batch = random.choice([None, 1, 3, 7]), random.randint(1, 3), random.randint(1, 4)
        with torch.random.fork_rng(devices=[]):
            x, y = d.data()
            shown = x[0] if d.twist == "lone datum" else x
            SEEN[d.twist] += 1
            require_encoding(d, shown, y)
            require_likelihood(d, shown, y, chunk)
            require_samples(d, y)
            require_training(d, shown, y, steps, batch)

    run()
    print(dict(SEEN))
