"""Programs written by hand go through the same functions as declared ones; what breaks the contract is refused by name."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from by_hand import Conditional, DiscreteLatent, PyroExample, TwoLayers, WithPyroParam
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.errors import ProgramError, UserError
from pyro_vae.programs.contract import admit
from pyro_vae.programs.latents import sample_latents
from pyro_vae.programs.trace import draw_terms
from pyro_vae.seeding import generator, seeded

# Guides that were hardly trained are rightly warned of.
unreliable = pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")

DIM = 6
PROGRAMS: dict[str, Callable[[], nn.Module]] = {
    "two layers": TwoLayers,
    "Pyro's own style": PyroExample,
    "a PyroModule": WithPyroParam,
    "a discrete latent": DiscreteLatent,
}
LATENTS = {
    "two layers": {"z1": 3, "z2": 2},
    "Pyro's own style": {"latent": 2},
    "a PyroModule": {"z": 2},
    "a discrete latent": {"z": 3},
}


def make(name: str, seed: int = 0) -> Any:
    with seeded(seed):
        return PROGRAMS[name]()


def rows(n: int = 120) -> Tensor:
    """Binary rows with something to learn: two halves that are copies."""
    half = torch.rand(n, DIM // 2, generator=generator(1)).round()
    return torch.cat([half, half], 1)


@pytest.fixture(params=PROGRAMS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@unreliable
def test_the_whole_way(name: str, tmp_path: Path) -> None:
    program, x = make(name), rows()
    before = {n: p.detach().clone() for n, p in program.named_parameters()}
    run = pv.fit(program, x, epochs=5, batch_size=4, lr=0.02, out=tmp_path / "run")
    assert run.program is program
    assert run.metrics[-1]["train_loss"] < run.metrics[0]["train_loss"] - 0.3
    assert all(not torch.equal(p, before[n]) for n, p in program.named_parameters())

    result = pv.log_likelihood(program, x[:20], num_samples=300)
    assert (result.log_likelihood >= result.elbo - 1e-9).all()
    assert result.nll_mc_se < 0.5
    assert (result.nll_mc_se == 0) == (result.states == 8) == (name == "a discrete latent")  # summed over its states

    other = make(name, seed=1)
    loaded = pv.load(tmp_path / "run", program=other)
    assert loaded.program is other
    again = pv.log_likelihood(other, x[:20], num_samples=300)
    assert torch.equal(again.log_likelihood, result.log_likelihood)
    with pytest.raises(UserError, match="hand the program over"):
        pv.load(tmp_path / "run")
    wrong = next(n for n in PROGRAMS if n != name)
    with pytest.raises(UserError, match="another program"):
        pv.load(tmp_path / "run", program=make(wrong))


def test_through_the_latents_and_back(name: str) -> None:
    program, x, sites = make(name), rows(5), LATENTS[name]
    z = pv.encode(program, x)
    as_dict = z if isinstance(z, dict) else {next(iter(sites)): z}
    assert {n: tuple(v.shape) for n, v in as_dict.items()} == {n: (5, d) for n, d in sites.items()}
    draws = pv.encode(program, x, num_samples=4)
    as_dict = draws if isinstance(draws, dict) else {next(iter(sites)): draws}
    assert {n: tuple(v.shape) for n, v in as_dict.items()} == {n: (4, 5, d) for n, d in sites.items()}
    assert pv.decode(program, z, event_shape=(DIM,)).shape == (5, DIM)
    assert pv.decode(program, draws, event_shape=(DIM,)).shape == (4, 5, DIM)
    assert pv.reconstruct(program, x).shape == (5, DIM)
    assert pv.reconstruct(program, x, num_samples=4).shape == (4, 5, DIM)
    assert pv.sample(program, 7, event_shape=(DIM,)).shape == (7, DIM)
    prior = sample_latents(program, 3, event_shape=(DIM,))
    assert {n: tuple(v.shape) for n, v in prior.items()} == {n: (3, d) for n, d in sites.items()}
    with pytest.raises(UserError, match="does not say the shape"):
        pv.sample(program, 7)


def test_draws_depend_on_the_seed_alone(name: str) -> None:
    program, x = make(name), rows(5)
    for call in (
        lambda seed: pv.sample(program, 5, event_shape=(DIM,), seed=seed),
        lambda seed: pv.reconstruct(program, x, num_samples=3, seed=seed),
    ):
        assert torch.equal(call(1), call(1))
        assert not torch.equal(call(1), call(2))


def test_the_log_weight_is_every_site_summed(name: str) -> None:
    program, x = make(name), rows(5)
    with seeded(0), torch.no_grad():
        terms = draw_terms(program, x, num_samples=4)
    assert terms.log_weight.shape == terms.log_likelihood.shape == (4, 5)
    torch.testing.assert_close(terms.log_weight, terms.log_likelihood + terms.log_prior - terms.log_guide)


def test_a_float64_program_stays_in_float64(name: str) -> None:
    program, x = make(name).double(), rows(5)
    assert pv.sample(program, 2, event_shape=(DIM,)).dtype == torch.float64
    assert pv.reconstruct(program, x).dtype == torch.float64
    run = pv.fit(program, x, steps=2, batch_size=5)
    assert run.record["program"]["dtype"] == "float64"
    assert {p.dtype for p in program.parameters()} == {torch.float64}


@unreliable
def test_evaluation_of_a_program_by_hand_on_a_data_set() -> None:
    data = pv.load_data("pinwheel")
    with seeded(0):
        program = TwoLayers(2)
    pv.fit(program, data, steps=5, batch_size=100)
    figures, result = pv.evaluate(program, data, num_samples=200, limit=20)
    assert figures["num_data"] == len(result) == 20
    assert figures["bits_per_dim"] is None  # a density on data without levels
    assert len(figures["active_units"]) == 2  # one count per latent site


@unreliable
def test_a_conditional_program(tmp_path: Path) -> None:
    data = pv.load_data("digits")
    with seeded(0):
        program, other = Conditional(64, 10), Conditional(64, 10)
    run = pv.fit(program, data, epochs=2, out=tmp_path / "run")
    assert run.metrics[-1]["validation_loss"] < run.metrics[0]["validation_loss"]
    figures, _ = pv.evaluate(program, data, num_samples=100, limit=20)
    assert figures["nll"] > 0
    x, y = data.observed("test")[:5], data.labels["test"][:5]
    first = pv.log_likelihood(program, x, y, num_samples=50)
    loaded = pv.load(tmp_path / "run", program=other)
    assert torch.equal(pv.log_likelihood(loaded.program, x, y, num_samples=50).log_likelihood, first.log_likelihood)
    changed = pv.log_likelihood(program, x, (y + 1) % 10, num_samples=50)
    assert not torch.equal(changed.log_likelihood, first.log_likelihood)
    assert pv.encode(program, x, y).shape == (5, 2)
    assert pv.reconstruct(program, x, y).shape == x.shape
    assert pv.sample(program, 5, y).shape == x.shape
    pairs = torch.utils.data.TensorDataset(x, y)
    assert len(pv.fit(program, pairs, steps=1, batch_size=5).metrics) == 1


def test_a_conditional_program_without_labels() -> None:
    with seeded(0):
        program = Conditional(2, 3)
    for data in (pv.load_data("checkerboard"), torch.zeros(9, 2), torch.utils.data.TensorDataset(torch.zeros(9, 2))):
        with pytest.raises(UserError, match=r"conditional, model\(x, y\), and"):
            pv.fit(program, data, steps=1)


# The contract


class Simple(nn.Module):
    """The smallest program; the refused ones below differ from it in one line."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + self.bias, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.Normal(self.bias.expand(x.shape), 1.0).to_event(1))


def normal(size: int = 2) -> Any:
    return dist.Normal(torch.zeros(size), 1.0).to_event(1)


def outside(self: Any, x: Tensor) -> None:
    pyro.sample("w", dist.Normal(0.0, 1.0))
    Simple.model(self, x)


def subsampled(self: Any, x: Tensor) -> None:
    with pyro.plate("data", x.shape[0], subsample_size=2, dim=-1) as i:
        z = pyro.sample("z", normal())
        pyro.sample("x", dist.Normal(z + self.bias, 1.0).to_event(1), obs=x[i])


def with_param(self: Any, x: Tensor) -> None:
    pyro.param("stray", torch.zeros(()))
    Simple.model(self, x)


def unobserved_x(self: Any, x: Tensor) -> None:
    with pyro.plate("data", x.shape[0], dim=-1):
        z = pyro.sample("z", normal())
        pyro.sample("x", dist.Normal(z + self.bias, 1.0).to_event(1))


def second_latent(self: Any, x: Tensor) -> None:
    Simple.model(self, x)
    with pyro.plate("more", x.shape[0], dim=-1):
        pyro.sample("w", normal())


def batch_axes(self: Any, x: Tensor) -> None:
    with pyro.plate("data", x.shape[0], dim=-1):
        z = pyro.sample("z", normal())
        pyro.sample("x", dist.Normal(z + self.bias, 1.0), obs=x)


def extra_in_guide(self: Any, x: Tensor) -> None:
    Simple.guide(self, x)
    with pyro.plate("more", x.shape[0], dim=-1):
        pyro.sample("v", normal())


def empty_guide(self: Any, x: Tensor) -> None:
    pass


def outside_in_guide(self: Any, x: Tensor) -> None:
    pyro.sample("z", dist.Normal(self.bias.expand(x.shape), 1.0).to_event(2))


def param_in_guide(self: Any, x: Tensor) -> None:
    with pyro.plate("data", x.shape[0], dim=-1):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(2)), 1.0).to_event(1))


@pytest.mark.parametrize(
    ("part", "function", "message"),
    [
        ("model", outside, "model: the site 'w' stands outside the data plate"),
        ("model", subsampled, "subsample"),
        ("model", with_param, r"model: pyro.param\('stray'\) belongs to no module"),
        ("model", unobserved_x, "model: no observed site"),
        ("model", second_latent, "guide: no site for the model's latent 'w'"),
        ("model", batch_axes, r"at site x dim -1, \d+ vs \d; every axis but .*to_event"),
        ("guide", extra_in_guide, "guide: the site 'v' is no latent of the model"),
        ("guide", empty_guide, "guide: no site for the model's latent 'z'"),
        ("guide", outside_in_guide, "guide: the site 'z' stands outside the data plate|to_event"),
        ("guide", param_in_guide, r"guide: pyro.param\('loc'\) belongs to no module"),
    ],
)
def test_violations_are_refused_by_name(part: str, function: Callable[..., None], message: str, tmp_path: Path) -> None:
    program = type("Wrong", (Simple,), {part: function})()
    x = torch.zeros(6, 2)
    for call in (
        lambda: admit(program, x),
        lambda: pv.fit(program, x, steps=1, out=tmp_path / "run"),
        lambda: pv.log_likelihood(program, x, num_samples=30),
    ):
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_smallest_program_is_taken() -> None:
    admit(Simple(), torch.zeros(6, 2))
    admit(Simple(), torch.zeros(1, 2))


def test_an_auxiliary_site_that_only_adds_noise_is_refused() -> None:
    """log p(x) would be too high by the entropy of u, 2.8 nats here."""

    class Auxiliary(Simple):
        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", x.shape[0], dim=-1):
                pyro.sample("u", normal(), infer={"is_auxiliary": True})
                pyro.sample("z", dist.Normal(self.bias.expand(x.shape), 1.0).to_event(1))

    with pytest.raises(ProgramError, match="auxiliary site 'u' is random"):
        admit(Auxiliary(), torch.zeros(6, 2))


def test_what_is_no_program_is_refused() -> None:
    for thing in (nn.Identity(), object(), lambda x: x):
        with pytest.raises(UserError, match="expected a Program"):
            pv.fit(thing, torch.zeros(6, 2), steps=1)
    assert isinstance(Simple(), pv.Program)


def test_an_error_of_the_programs_own_says_where() -> None:
    with pytest.raises(UserError, match=r"TwoLayers does not run on data of shape \(5,\) per row: RuntimeError"):
        pv.fit(make("two layers"), torch.zeros(4, 5), steps=1)


def test_threads_wait_for_each_other() -> None:
    program, x = make("two layers"), rows(40)

    def task(index: int) -> Tensor:
        if index % 4 == 3:
            own = make("two layers", seed=index)
            pv.fit(own, x, epochs=2, batch_size=10, seed=index)
            return torch.cat([p.detach().flatten() for p in own.parameters()])
        return pv.log_likelihood(program, x, num_samples=50, seed=index).log_likelihood

    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = [task(i) for i in range(8)]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(task, range(8)))
    assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_data_that_cannot_be_evaluated_are_named() -> None:
    program = make("two layers")
    for x, message in [
        ({"x": np.zeros((3, 6))}, "does not run on a record of the columns x .6,.: .* given a torch tensor"),
        (torch.zeros(0, 6), "at least one row"),
        (torch.full((3, 6), math.nan), "NaN or infinite values .first in row 0"),
    ]:
        with pytest.raises(UserError, match=message):
            pv.log_likelihood(program, x, num_samples=30)


def test_the_refusals_are_of_their_own_kind() -> None:
    with pytest.raises(ProgramError):
        admit(type("Wrong", (Simple,), {"guide": empty_guide})(), torch.zeros(6, 2))


@unreliable
def test_pyros_parameter_store_is_left_alone() -> None:
    store = pyro.get_param_store()
    kept = pyro.param("mine", torch.tensor(1.5))
    try:
        for name in PROGRAMS:
            program, x = make(name), rows(20)
            pv.fit(program, x, steps=2, batch_size=10)
            pv.log_likelihood(program, x, num_samples=200, chunk_size=500)
            pv.sample(program, 2)
            pv.reconstruct(program, x)
            assert list(store.keys()) == ["mine"]
        assert torch.equal(pyro.param("mine"), kept)
    finally:
        pyro.clear_param_store()


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (torch.zeros(5, 3), r"expected 'z' of shape \(N, 2\), got \(5, 3\)"),
        (torch.zeros(2), r"got \(2,\)"),
        ({"w": torch.zeros(5, 2)}, r"latents among \['z'\], got \['w'\]"),
        ({}, r"among \['z'\]"),
    ],
)
def test_decode_refuses(z: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pv.decode(Simple(), z, event_shape=(2,))
    if isinstance(z, Tensor):
        with pytest.raises(UserError, match="dict"):
            pv.decode(make("two layers"), z, event_shape=(DIM,))
