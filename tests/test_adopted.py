"""What is adopted: functions, objects that are no module, ``pyro.param``, arguments by name, sites that are conditioned on."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from patterns import (
    CONTEXT,
    ONES,
    PRECISION,
    ZEROS,
    Base,
    CalledGuide,
    CalledModel,
    N,
    W,
    X,
    exact,
    our_loss,
    same_gradients,
    svi_loss,
)
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.analysis.diagnostics import predictive_check
from pyro_vae.errors import ProgramError, UserError
from pyro_vae.seeding import generator, seeded

pytestmark = pytest.mark.usefixtures("pyro_store_put_back")
IGNORED = pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")


def decoder(z: Tensor, weight: Tensor) -> Tensor:
    return z @ weight


def param_model(x: Tensor) -> None:
    weight = pyro.param("weight", lambda: W.clone())
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(ZEROS, ONES).expand([len(x), 2]).to_event(1))
        pyro.sample("obs", dist.Normal(decoder(z, weight), 1.0).to_event(1), obs=x)


def param_guide(x: Tensor) -> None:
    scale = pyro.param("guide.scale", PRECISION.rsqrt(), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x @ W.T / PRECISION, scale).to_event(1))


class NoModule:
    """An object with a network."""

    def __init__(self) -> None:
        self.network = nn.Linear(2, 4, bias=False, dtype=torch.float64)
        self.network.weight.data.copy_(W.T)

    def model(self, x: Tensor) -> None:
        pyro.module("network", self.network)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(ZEROS, ONES).expand([len(x), 2]).to_event(1))
            pyro.sample("obs", dist.Normal(self.network(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        param_guide(x)


def named_model(sizes: Tensor, ys: Tensor | None = None, scale: float = 2.0) -> None:
    weight = pyro.param("weight", lambda: W.clone())
    with pyro.plate("data", len(sizes)):
        z = pyro.sample("z", dist.Normal(ZEROS, ONES).expand([len(sizes), 2]).to_event(1))
        pyro.sample("obs", dist.Normal(decoder(z, weight) + sizes, scale).to_event(1), obs=ys)


def named_guide(sizes: Tensor, ys: Tensor | None = None, scale: float = 2.0) -> None:
    assert ys is not None
    param_guide(ys - sizes)


def any_model(*args: Any, **kwargs: Any) -> None:
    param_model(*args)


def shifted_model(offset: float, x: Tensor) -> None:
    param_model(x)


ADOPTED: dict[str, Callable[[], tuple[Any, Any, dict[str, Any], dict[str, Any]]]] = {
    "functions": lambda: (param_model, param_guide, {}, {}),
    "an object": lambda: ((o := NoModule()).model, o.guide, {}, {}),
    "a closure": lambda: (*closed(nn.Linear(2, 4, bias=False, dtype=torch.float64)), {}, {}),
    "by name": lambda: (
        named_model,
        named_guide,
        {"observed": "ys", "constants": {"scale": 1.0}},
        {"sizes": CONTEXT},
    ),
    "PyroModules that are called": lambda: (CalledModel(), CalledGuide(), {}, {}),
    "any arguments": lambda: (any_model, param_guide, {}, {}),
    "partial": lambda: (functools.partial(shifted_model, 1.0), param_guide, {}, {}),
}


def closed(network: nn.Linear) -> tuple[Any, Any]:
    with torch.no_grad():
        network.weight.copy_(W.T)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(ZEROS, ONES).expand([len(x), 2]).to_event(1))
            pyro.sample("obs", dist.Normal(network(z), 1.0).to_event(1), obs=x)

    return model, param_guide


@IGNORED
@pytest.mark.parametrize("pattern", ADOPTED)
def test_what_is_adopted_is_pyros_elbo_and_the_exact_log_likelihood(pattern: str, tmp_path: Any) -> None:
    with seeded(0):
        model, guide, about, inputs = ADOPTED[pattern]()
    program = pv.adopt(model, guide, **about)
    x = X + CONTEXT if inputs else X
    given: dict[str, Any] = {"inputs": inputs} if inputs else {}
    result = pv.log_likelihood(program, x, num_samples=30, **given)
    torch.testing.assert_close(result.log_likelihood, exact(), rtol=0, atol=1e-9)
    assert "weight" not in pyro.get_param_store()
    named = {about.get("observed", "x"): x, **inputs, **about.get("constants", {})} if inputs else {}
    theirs = svi_loss(model, guide, **named) if named else svi_loss(model, guide, x)
    y = program.with_inputs(None, inputs) if inputs else None
    ours, surrogate = our_loss(program, x, *([] if y is None else [y]))
    torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-9)
    store = pyro.get_param_store()
    parameters = [
        store._params[n.removeprefix("param.").replace("/", ".")] if n.startswith("param.") else p
        for n, p in program.named_parameters()
    ]
    same_gradients(program, theirs, parameters, surrogate)
    run = pv.fit(program, x, steps=3, out=tmp_path / "run", **given)
    after = pv.log_likelihood(program, x, num_samples=30, **given).log_likelihood
    with seeded(0):
        model, guide, about, _ = ADOPTED[pattern]()
    again = pv.load(run.path, program=pv.adopt(model, guide, **about))
    assert torch.equal(pv.log_likelihood(again.program, x, num_samples=30, **given).log_likelihood, after)


def test_a_program_trained_by_svi_keeps_its_values_and_the_store_is_not_written() -> None:
    svi = pyro.infer.SVI(param_model, param_guide, pyro.optim.SGD({"lr": 0.01}), pyro.infer.Trace_ELBO())
    with seeded(1):
        svi.step(X)
    weight = pyro.param("weight").detach().clone()
    program = pv.adopt(param_model, param_guide)
    pv.fit(program, X, steps=3, lr=0.1)
    assert torch.equal(pyro.param("weight"), weight)
    assert not torch.equal(program.param.weight, weight)
    fresh = pv.adopt(param_model, param_guide)
    pv.encode(fresh, X)
    assert torch.equal(fresh.param.weight, weight)


def test_conditioning_on_what_latents_do_not_touch_and_on_nothing_else() -> None:
    def model(x: Tensor, ys: Tensor, chain: bool = False) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(ZEROS, ONES).expand([len(x), 2]).to_event(1))
            pyro.sample("y", dist.Normal(z[..., 0] if chain else ys.new_zeros(()), 1.0), obs=ys)
            pyro.sample("x", dist.Normal(z @ W, 1.0).to_event(1), obs=x)

    def guide(x: Tensor, ys: Tensor, chain: bool = False) -> None:
        param_guide(x)

    y = CONTEXT[:, 0]
    with pytest.raises(ProgramError, match=r"second observed site .*conditioned="):
        pv.log_likelihood(pv.adopt(model, guide), X, y, num_samples=30)
    program = pv.adopt(model, guide, conditioned=("y",))
    torch.testing.assert_close(
        pv.log_likelihood(program, X, y, num_samples=30).log_likelihood, exact(), rtol=0, atol=1e-9
    )
    chained = pv.adopt(model, guide, conditioned=("y",), constants={"chain": True})
    with pytest.raises(ProgramError, match="depends on the latents"):
        pv.log_likelihood(chained, X, y, num_samples=30)


def test_what_cannot_be_is_refused_by_name() -> None:
    def shared(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(ZEROS, ONES).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(4), 1.0).to_event(1), obs=x)

    def weight(x: Tensor, beta: Any = None) -> None:
        assert beta is None  # labels are no weights of a KL
        param_model(x)

    for call, words in (
        (lambda: pv.encode(pv.adopt(shared, shared), X), "the site 'z' stands outside the data plate"),
        (lambda: pv.encode(Base(), X, inputs={"context": X}), "adopt"),  # type: ignore[call-arg]
        (lambda: pv.adopt(param_model), "expected a model and a guide"),
        (lambda: pv.adopt(param_model, param_guide, observed="ys"), "no argument 'ys'"),
        (
            lambda: pv.encode(type("Param", (Base,), {"guide": lambda s, x: param_guide(x)})(), X),
            r"pv\.adopt\(program\)",
        ),
        (
            lambda: pv.encode(pv.adopt(named_model, named_guide, observed="ys"), X, inputs={"other": X}),
            "no argument 'other'",
        ),  # type: ignore[call-arg]
        (
            lambda: pv.encode(pv.adopt(lambda x, a, b: param_model(x), param_guide), X, inputs={"a": X}),  # type: ignore[call-arg]
            "nothing is given for its argument 'b'",
        ),
    ):
        with pytest.raises(UserError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    labelled = torch.utils.data.TensorDataset(X, torch.arange(N))
    pv.fit(pv.adopt(weight, param_guide), labelled, steps=1)


def test_inputs_of_one_call_are_not_those_of_the_next() -> None:
    program = pv.adopt(named_model, named_guide, observed="ys", constants={"scale": 1.0})
    pv.encode(program, X, inputs={"sizes": CONTEXT})  # type: ignore[call-arg]
    found = pv.log_likelihood(
        program, X + CONTEXT, CONTEXT, num_samples=30
    ).log_likelihood  # as y, the required argument
    torch.testing.assert_close(found, exact(), rtol=0, atol=1e-9)
    with pytest.raises(UserError, match="whole numbers above"):
        pv.encode(program, X.float(), inputs={"sizes": torch.full((N, 4), 2**60)})  # type: ignore[call-arg]


# What it refers to, and what its parts are called


def linear() -> nn.Linear:
    network = nn.Linear(2, 4, bias=False, dtype=torch.float64)
    network.weight.data.copy_(W.T)
    return network


def of_a_python_module() -> Any:
    networks = types.ModuleType("their_networks")
    networks.decoder = linear()  # type: ignore[attr-defined]
    return lambda z: networks.decoder(z)  # type: ignore[attr-defined]


def of_an_inner_function() -> Any:
    network = linear()

    def decode(z: Tensor) -> Tensor:
        def twice(z: Tensor) -> Tensor:
            return network(z)  # type: ignore[no-any-return]

        return twice(z)

    return decode


def of_containers() -> Any:
    by_name = {"a.b": linear()}
    layers = Layers([linear()])
    return lambda z: (by_name["a.b"](z) + layers.layers[0](z)) / 2


class Layers:
    def __init__(self, layers: list[nn.Linear]) -> None:
        self.layers = layers


@IGNORED
@pytest.mark.parametrize("finds", [of_a_python_module, of_an_inner_function, of_containers])
def test_modules_are_found_and_copied_wherever_a_function_has_them(finds: Callable[[], Any]) -> None:
    with seeded(0):
        decode = finds()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(ZEROS, ONES).expand([len(x), 2]).to_event(1))
            pyro.sample("obs", dist.Normal(decode(z), 1.0).to_event(1), obs=x)

    program = pv.adopt(model, param_guide)
    shapes = [tuple(p.shape) for p in program.parameters()]
    assert shapes == [(4, 2)] * (2 if finds is of_containers else 1)
    run = pv.fit(program, X, steps=2, lr=0.1)
    assert not torch.equal(next(program.parameters()), W.T)
    before = pv.log_likelihood(run.program, X, num_samples=30).log_likelihood
    other = copy.deepcopy(program)
    with torch.no_grad():
        next(p for p in other.parameters() if p.shape == (4, 2)).zero_()
    assert not torch.allclose(pv.log_likelihood(other, X, num_samples=30).log_likelihood, before)
    assert torch.equal(pv.log_likelihood(program, X, num_samples=30).log_likelihood, before)


@IGNORED
def test_names_that_torch_has_itself_are_names_like_others(tmp_path: Any) -> None:
    names = ["type", "train", "", "a.b", "a/b", "a%2Fb", "%type"]

    def model(x: Tensor) -> None:
        shift = sum(pyro.param(n, 0.1 * i * torch.ones(4, dtype=x.dtype)) for i, n in enumerate(names))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(ZEROS, ONES).expand([len(x), 2]).to_event(1))
            pyro.sample("obs", dist.Normal(decoder(z, W) + shift - 2.1, 1.0).to_event(1), obs=x)

    program = pv.adopt(model, param_guide)
    torch.testing.assert_close(pv.log_likelihood(program, X, num_samples=30).log_likelihood, exact(), rtol=0, atol=1e-9)
    assert len(list(program.parameters())) == len(names) + 1
    run = pv.fit(program, X, steps=2, out=tmp_path / "run")
    after = pv.log_likelihood(program, X, num_samples=30).log_likelihood
    again = pv.load(run.path, program=pv.adopt(model, param_guide)).program
    assert torch.equal(pv.log_likelihood(again, X, num_samples=30).log_likelihood, after)
    again.to_store()
    fresh = pv.adopt(model, param_guide)  # with the values of the store
    assert torch.allclose(pv.log_likelihood(fresh, X, num_samples=30).log_likelihood, after)
    names.append("one more")
    with pytest.raises(UserError, match=r"one more.*is none of the parameters that the run was saved with") as caught:
        pv.encode(pv.load(run.path, program=pv.adopt(model, param_guide)).program, X)
    assert "\n" not in str(caught.value)


def test_what_the_guide_draws_of_a_conditioned_site_is_no_part_of_q() -> None:
    """A classifier head in the guide, beside labels that the model observes."""

    def model(x: Tensor, ys: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(x.new_full((len(x),), 0.3)), obs=ys)
            z = pyro.sample("z", dist.Normal(ZEROS, ONES).expand([len(x), 2]).to_event(1))
            pyro.sample("x", dist.Normal(z @ W, 1.0).to_event(1), obs=x)

    def head(x: Tensor, ys: Tensor) -> None:
        param_guide(x)
        with pyro.plate("labels", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x[:, 0]))

    def chained(x: Tensor, ys: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(logits=x[:, 0]))
            pyro.sample("z", dist.Normal(x @ W.T / PRECISION + y[:, None], 1.0).to_event(1))

    y = (CONTEXT[:, 0] > 0).double()
    program = pv.adopt(model, head, conditioned=("y",))
    found = pv.log_likelihood(program, X, y, num_samples=30).log_likelihood
    torch.testing.assert_close(found, exact(), rtol=0, atol=1e-9)
    with pytest.raises(ProgramError, match=r"random numbers are drawn outside of"):
        pv.log_likelihood(pv.adopt(model, chained, conditioned=("y",)), X, y, num_samples=30)


def test_training_nothing_is_refused_by_name() -> None:
    def model(x: Tensor, ys: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(pyro.param("mean", torch.zeros((), dtype=x.dtype)), 1.0), obs=ys)
            z = pyro.sample("z", dist.Normal(ZEROS, ONES).expand([len(x), 2]).to_event(1))
            pyro.sample("x", dist.Normal(z @ W, 1.0).to_event(1), obs=x)

    def guide(x: Tensor, ys: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ W.T / PRECISION, PRECISION.rsqrt()).to_event(1))

    labelled = torch.utils.data.TensorDataset(X, CONTEXT[:, 0])
    with pytest.raises(UserError, match="nothing to train"):
        pv.fit(pv.adopt(model, guide, conditioned=("y",)), labelled, steps=1)


def test_a_total_count_is_handed_to_sample_under_the_name_of_the_data() -> None:
    def model(docs: Tensor) -> None:
        total = int(docs.sum(-1).max())
        with pyro.plate("documents", len(docs)):
            z = pyro.sample("z", dist.Normal(ZEROS, ONES).expand([len(docs), 2]).to_event(1))
            pyro.sample("words", dist.Multinomial(total, logits=z @ W), obs=docs)

    docs = torch.randint(1, 7, (40, 4), generator=generator("documents")).double()
    program = pv.adopt(model, lambda docs: param_guide(docs.log()))
    with pytest.raises(UserError, match=r"inputs=\{'docs': x\}"):
        pv.sample(program, 5, event_shape=(4,))
    inputs: dict[str, Any] = {"inputs": {"docs": docs[:5]}}
    drawn = pv.sample(program, 5, event_shape=(4,), **inputs)
    assert (drawn.sum(-1) == docs[:5].sum(-1).max()).all()
    with pytest.raises(UserError, match="are the data themselves"):
        pv.encode(program, docs, inputs={"docs": docs})  # type: ignore[call-arg]


@IGNORED
def test_a_tree_calls_the_data_as_the_program_does() -> None:
    tree = pv.posterior(pv.adopt(param_model, param_guide), X, num_samples=10)
    for group in ("observed_data", "posterior_predictive", "prior_predictive", "log_likelihood"):
        assert list(tree[group].data_vars) == ["obs"] + ["obs_marginal"] * (group == "log_likelihood")
    assert set(predictive_check(tree).data_vars) == {"observed", "mean", "sd", "p_value"}
    mean = pv.posterior(pv.adopt(param_model, param_guide), X, num_samples=10, predictive="mean")
    assert list(mean["posterior_predictive"].data_vars) == ["obs_mean"]
