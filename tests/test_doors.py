"""What is refused, or made no difference, at the doors: y, surroundings, programs whose rows know of each other, no latents."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from contract_programs import DOORS, Base, made, rows
from torch import Tensor, nn
from torch.utils.data import Dataset

import pyro_vae as pv
from pyro_vae.analysis.calibration import sbc
from pyro_vae.analysis.imputation import impute
from pyro_vae.errors import DataError, UserError
from pyro_vae.programs.contract import admit

# y: of any wrong kind, at every door that takes it


class Conditional(Base):
    """x | z, y ~ N(W z + table[y], I): y are labels of three classes, or rows of three numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.event_shape = (4,)
        self.table = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))

    def shift(self, y: Tensor) -> Tensor:
        return y @ self.table if y.is_floating_point() else nn.functional.embedding(y, self.table)

    def model(self, x: Tensor, y: Tensor) -> None:  # type: ignore[override]
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.decoder + self.shift(y), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor) -> None:  # type: ignore[override]
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.posterior(x - self.shift(y)))


N = 20
LABELS = torch.arange(N) % 3
CONDITIONED: dict[str, Callable[[Any, Tensor, Any], Any]] = {
    "log_likelihood": lambda p, x, y: pv.log_likelihood(p, x, y, num_samples=30),
    "bound_curve": lambda p, x, y: pv.bound_curve(p, x, y, num_samples=30),
    "posterior": lambda p, x, y: pv.posterior(p, x, y, num_samples=5),
    "annealing": lambda p, x, y: pv.annealed_log_likelihood(p, x, y, num_distributions=3, num_leapfrog=1),
    "bidirectional": lambda p, x, y: pv.bidirectional(p, N, y, num_distributions=3, num_leapfrog=1, num_chains=2),
    "gaps": lambda p, x, y: pv.inference_gaps(p, x, y, num_steps=1, num_final_draws=2),
    "information": lambda p, x, y: pv.latent_information(p, x, y),
    "impute": lambda p, x, y: impute(p, x, torch.ones(4, dtype=torch.bool), y, num_rounds=2, num_chains=2),
    "sbc": lambda p, x, y: sbc(p, N, 9, y),
    "encode": lambda p, x, y: pv.encode(p, x, y),
    "reconstruct": lambda p, x, y: pv.reconstruct(p, x, y),
    "decode": lambda p, x, y: pv.decode(p, x[:, :2], y),
    "sample": lambda p, x, y: pv.sample(p, N, y),
    "traversals": lambda p, x, y: pv.traversals(p, x, y, num_units=1, steps=2),
    "embedding": lambda p, x, y: pv.embedding(p, x, y),
    "aggregate": lambda p, x, y: pv.aggregate_posterior(p, x, y),
    "uncertainty": lambda p, x, y: pv.reconstruction_uncertainty(p, x, y, num_samples=3),
}
ONE_HOT = nn.functional.one_hot(LABELS, 3)
WRONG_Y: dict[str, tuple[Any, str]] = {
    "none": (None, "give y"),
    "a list that is too short": (LABELS.tolist()[1:], rf"got shape \({N - 1},\)"),
    "strings": (["a"] * N, "y hold <U1"),
    "a set": ({1, 2}, "got set"),
    "one number": (torch.tensor(1), r"got shape \(\)"),
    "one row": (LABELS[:1], r"got shape \(1,\)"),
    "too few": (LABELS[:-1], rf"got shape \({N - 1},\)"),
    "sparse": (ONE_HOT.double().to_sparse(), "y: expected a dense tensor"),
    "complex": (ONE_HOT.to(torch.complex64), "y: expected a dense tensor of real numbers"),
    "another width": (torch.ones(N, 5), "does not run on"),
    "no class -1": (LABELS.masked_fill(torch.arange(N) == N - 1, -1), f"row {N - 1}|does not run|out of range"),
    "no class 3": (LABELS.masked_fill(torch.arange(N) == N - 1, 3), f"row {N - 1}|does not run|out of range"),
    "NaN": (ONE_HOT.double().masked_fill(torch.arange(N)[:, None] == N - 1, math.nan), f"row {N - 1}|NaN"),
}


@pytest.mark.parametrize("door", CONDITIONED)
def test_what_y_has_to_be_is_said_at_every_door(door: str) -> None:
    for kind, (y, words) in WRONG_Y.items():
        with pytest.raises(UserError, match=words) as caught:
            CONDITIONED[door](Conditional(), rows(4, n=N), y)
        assert "\n" not in str(caught.value), kind


@pytest.mark.parametrize("door", CONDITIONED)
def test_lists_and_arrays_of_numbers_are_taken_as_y(door: str) -> None:
    if door in ("sample", "decode"):  # what these give is a tensor
        found = [CONDITIONED[door](Conditional(), rows(4, n=N), y) for y in (LABELS, LABELS.tolist(), LABELS.numpy())]
        assert all(torch.equal(found[0], other) for other in found)


def test_a_late_label_is_named_by_its_row_before_training() -> None:
    class Labelled(Dataset[Any]):
        def __len__(self) -> int:
            return N

        def __getitem__(self, i: int) -> Any:
            if i == 13:
                raise OSError("a picture that is none")
            return rows(4, n=N)[i], LABELS[i]

    for y in (-1, 3):
        with pytest.raises(DataError, match=rf"y in row 17 \({y}\) is none that the program takes"):
            pv.log_likelihood(Conditional(), rows(4, n=N), LABELS.masked_fill(torch.arange(N) == 17, y), num_samples=30)
    with pytest.raises(DataError, match="item 13 of Labelled cannot be read: OSError: a picture that is none"):
        pv.fit(Conditional(), Labelled(), epochs=1)


def test_floats_of_any_kind_are_one_y() -> None:
    x, y = rows(4, n=N), ONE_HOT.double()
    plain = pv.log_likelihood(Conditional(), x, y, num_samples=30).log_likelihood
    for other in (y.float(), y.bfloat16(), y.mT.contiguous().mT, y.clone().requires_grad_()):
        assert torch.equal(pv.log_likelihood(Conditional(), x, other, num_samples=30).log_likelihood, plain)
    assert torch.equal(pv.log_likelihood(Conditional(), x, LABELS, num_samples=30).log_likelihood, plain)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_an_axis_of_rows_does_not_pass_for_one_of_samples(n: int) -> None:
    """Labels ``(N, 1)`` spread over the samples' axis, where there are as many of these as rows."""
    y = torch.arange(n)[:, None]
    with pytest.raises(UserError, match=r"does not run|log_prob of the site|in one row depends"):
        pv.log_likelihood(Conditional(), rows(4, n=n), y, num_samples=n)


# Rows and draws that know of each other, and noise outside of the sites


def _posterior_of(change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    def guide(self: Any, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.posterior(change(x)))

    return {"guide": guide}


def _likelihood_of(change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {"likelihood": lambda self, loc: dist.Normal(change(loc), 1.0).to_event(1)}


BATCH_STATISTICS = nn.BatchNorm1d(4, track_running_stats=False, dtype=torch.float64)
MIXED = {
    "a mean over rows in the model": _likelihood_of(lambda loc: loc - loc.mean(-2, keepdim=True)),
    "a mean over draws in the model": _likelihood_of(lambda loc: loc - loc.mean(0, keepdim=True)),
    "the number of rows": _likelihood_of(lambda loc: loc / loc.shape[-2]),
    "the place of a row": _likelihood_of(lambda loc: loc + torch.arange(loc.shape[-2])[:, None]),
    "attention among rows": _likelihood_of(lambda loc: (loc @ loc.mT).softmax(-1) @ loc),
    "a mean over rows in the guide": _posterior_of(lambda x: x - x.mean(0)),
    "BatchNorm without statistics": _posterior_of(BATCH_STATISTICS),
    "observations centred by rows": {"observed": lambda self, x: x - x.mean(0)},
}
NOISY = {
    "randn in the model": _likelihood_of(lambda loc: loc + torch.randn(4)),
    "rand_like in the guide": _posterior_of(lambda x: x + torch.rand_like(x)),
    "dropout that is never off": _posterior_of(lambda x: nn.functional.dropout(x, 0.5)),
}
INDEPENDENT = {
    "LayerNorm": _posterior_of(nn.LayerNorm(4, dtype=torch.float64)),
    "BatchNorm with statistics": _posterior_of(nn.BatchNorm1d(4, dtype=torch.float64).eval()),
    "Dropout of a module": _posterior_of(nn.Dropout(0.5).eval()),
    "a mean over elements": _likelihood_of(lambda loc: loc - loc.mean(-1, keepdim=True)),
}


@pytest.mark.parametrize("n", [2, 6, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
@pytest.mark.parametrize("kind", MIXED)
def test_rows_and_draws_that_depend_on_each_other_are_refused(kind: str, n: int) -> None:
    BATCH_STATISTICS.eval()
    with pytest.raises(UserError, match=r"in one row depends on the other rows|write obs=x"):
        admit(made("Mixed", **MIXED[kind]), rows(4, n=n))


@pytest.mark.parametrize("kind", NOISY)
def test_noise_outside_of_the_sites_is_refused(kind: str) -> None:
    for door in ("fit", "log_likelihood", "encode"):
        with pytest.raises(UserError, match=r"random numbers are drawn outside of pyro\.sample"):
            DOORS[door](made("Noisy", **NOISY[kind]), rows(4))


@pytest.mark.parametrize("n", [1, 2, 6])
@pytest.mark.parametrize("kind", INDEPENDENT)
def test_rows_that_stand_for_themselves_are_taken(kind: str, n: int) -> None:
    admit(made("Independent", **INDEPENDENT[kind]), rows(4, n=n))
    admit(made("Plain").float(), 1000 * rows(4, n=n).float())  # rounding is no dependence


# Surroundings

AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("door", ["fit", "log_likelihood", "gaps", "encode"])
def test_what_torch_is_told_around_a_call_changes_nothing(door: str, around: str) -> None:
    def numbers(context: AbstractContextManager[Any]) -> Tensor:
        program = made("Plain").float()
        with context:
            found = DOORS[door](program, rows(4).float())
        if door == "fit":
            return torch.tensor([m["train_loss"] for m in found.metrics])
        return found if isinstance(found, Tensor) else found.log_likelihood

    assert torch.equal(numbers(nullcontext()), numbers(AROUND[around]()))


@pytest.mark.parametrize("door", DOORS)
def test_a_call_inside_of_a_pyro_handler_is_refused(door: str) -> None:
    for handler in (pyro.plate("outer", 3), pyro.poutine.trace(), pyro.condition(data={"z": torch.zeros(2)})):
        with pytest.raises(UserError, match="inside of a Pyro handler"), handler:
            DOORS[door](Base(), rows(4))
    with pytest.raises(UserError, match="expected the CPU as torch's default device, got meta"), torch.device("meta"):
        DOORS[door](made("Plain"), torch.zeros(6, 4, dtype=torch.float64, device="cpu"))


def test_a_program_of_inference_mode_has_no_derivatives() -> None:
    with torch.inference_mode():
        program = Base()
    assert len(pv.log_likelihood(program, rows(4), num_samples=30)) == 6
    for door in ("fit", "annealing", "gaps"):
        with pytest.raises(UserError, match=r"'encoder' was made inside of torch.inference_mode\(\)"):
            DOORS[door](program, rows(4))
    assert len(DOORS["fit"](copy.deepcopy(program), rows(4)).metrics) == 1


# No latents, and names


@pytest.mark.parametrize("size", [None, 0])
def test_a_program_without_latents_has_a_likelihood_and_nothing_about_latents(size: int | None) -> None:
    def model(self: Any, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            if size is not None:
                pyro.sample("z", dist.Normal(x.new_zeros(size), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder[0].expand(len(x), 4), 1.0).to_event(1), obs=x)

    def guide(self: Any, x: Tensor) -> None:
        if size is not None:
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(x.new_zeros(len(x), size), 1.0).to_event(1))

    program, x = made("NoLatents", model=model, guide=guide), rows(4)
    exact = torch.distributions.Normal(program.decoder[0].detach(), 1.0).log_prob(x).sum(-1)
    torch.testing.assert_close(pv.log_likelihood(program, x, num_samples=30).log_likelihood, exact)
    program.event_shape = (4,)
    for call in (
        lambda: pv.posterior(program, x), lambda: pv.latent_information(program, x), lambda: pv.traversals(program, x),
        lambda: pv.embedding(program, x), lambda: pv.aggregate_posterior(program, x),
        lambda: pv.annealed_log_likelihood(program, x, num_distributions=3),
        lambda: pv.bidirectional(program, 3, num_distributions=3),
    ):  # fmt: skip
        with pytest.raises(UserError, match="the program has none"):
            call()


@pytest.mark.parametrize("name", ["a/b", "draw", "chain", "image"])
def test_names_that_a_tree_cannot_hold_are_refused_there_alone(name: str) -> None:
    def named(part: str) -> Callable[[Any, Tensor], None]:
        def function(self: Any, x: Tensor) -> None:
            fn = dist.Normal(x.new_zeros(2), 1.0).to_event(1) if part == "model" else self.posterior(x)
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample(name, fn)
                if part == "model":
                    pyro.sample("x", self.likelihood(z @ self.decoder), obs=x)

        return function

    program = made("Named", model=named("model"), guide=named("guide"))
    assert len(pv.log_likelihood(program, rows(4), num_samples=30)) == 6
    with pytest.raises(UserError, match=r"cannot stand in a DataTree.*rename the site"):
        pv.posterior(program, rows(4), num_samples=5)


# Callbacks, paths, shapes and results


def test_a_callback_stops_with_true_alone() -> None:
    for answer, epochs in ((True, 1), (torch.ones(2), 3), ([1], 3), ("no", 3), (None, 3), (1, 3)):
        run = pv.fit(made("Plain"), rows(4), epochs=3, callback=lambda _, answer=answer: answer)
        assert len(run.metrics) == epochs, answer
    program = made("Plain")
    with pytest.raises(
        UserError, match=r"the callback made the program torch.float32, and training began in torch.float64"
    ):
        pv.fit(program, rows(4), epochs=2, callback=lambda _: program.float() and None)


def test_other_things_that_are_none(tmp_path: Path) -> None:
    program, x = made("Plain"), rows(4)
    program.event_shape = (4,)
    result = pv.log_likelihood(program, x, num_samples=30)
    run = pv.fit(program, x, epochs=1)
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: pv.fit(program, x, out=""), "expected a path, got an empty one"),
        (lambda: pv.fit(program, x, lr=True), "lr: expected|expected a number"),
        (lambda: pv.fit(program, x, epochs=True), "expected epochs to be a whole number"),
        (lambda: pv.load(""), "empty"),
        (lambda: pv.load(tmp_path, program=Base), "expected a Program"),
        (lambda: pv.report(None), "expected a run"),  # type: ignore[arg-type]
        (lambda: pv.report(run, 5), "expected a path, got int"),  # type: ignore[arg-type]
        (lambda: pv.compare(result, None), "expected two results of log_likelihood, got NoneType"),  # type: ignore[arg-type]
        (lambda: pv.compare(result, result, names=("a",)), "expected names of the two"),  # type: ignore[arg-type]
        (lambda: pv.inference_gaps(program, x, log_likelihood=3), "got int"),  # type: ignore[arg-type]
        (lambda: pv.inference_gaps(program, x, lr=0.0), "lr above 0"),
        (lambda: pv.sample(program, 2, event_shape=4), "event_shape as whole numbers"),
        (lambda: pv.sample(program, 2, event_shape="4"), "event_shape as whole numbers"),
        (lambda: pv.sample(program, 2, event_shape=(-4,)), "event_shape as whole numbers"),
        (lambda: pv.decode(program, torch.zeros(0, 2)), r"expected 'z' of shape \(N, 2\), got \(0, 2\)"),
        (lambda: pv.decode(program, torch.zeros(3, 2).to_sparse()), "latents: expected a dense tensor"),
        (lambda: pv.decode(program, torch.full((3, 2), math.nan)), "makes data that are NaN"),
    ]
    for call, words in calls:
        with pytest.raises(UserError, match=words):
            call()


def test_tensors_of_rare_kinds_are_read_as_they_are() -> None:
    program, x = made("Plain").float(), rows(4).float()
    program.event_shape = (4,)
    for other in (x.bfloat16(), torch._neg_view(-x), x.clone().requires_grad_()):
        tree = pv.posterior(program, other, num_samples=5)
        torch.testing.assert_close(torch.as_tensor(tree.observed_data["x"].values), other.detach().float())
        assert pv.nearest_training(other, x).axes
    with pytest.raises(UserError, match="8-bit floating one"):
        pv.log_likelihood(program, x.to(torch.float8_e4m3fn))
