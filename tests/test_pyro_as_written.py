"""Programs as people write them for Pyro, one pattern each, with no line changed: equal to Pyro's own ELBO, and to log p(x).

z ~ N(0, I) in two dimensions, x | z ~ N(W z, I) in four, W with orthogonal columns, so that the posterior is a product of
normals. The guide's scale has a free factor, at 1 of which weights are all p(x).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.errors import ProgramError, UserError
from pyro_vae.programs.folding import FOLDS
from pyro_vae.seeding import generator, seeded
from pyro_vae.training.fit import _objective
from pyro_vae.training.settings import Settings

N = 12
X = torch.randn(N, 4, generator=generator("programs as written"), dtype=torch.float64)
CONTEXT = torch.randn(N, 4, generator=generator("their context"), dtype=torch.float64)
W = torch.tensor([[1.0, 0.5, 0.0, -0.5], [0.5, -1.0, 1.0, 0.0]], dtype=torch.float64)
ONES, ZEROS = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
PRECISION = (W @ W.T).diagonal() + 1


def exact(x: Tensor = X) -> Tensor:
    covariance = W.T @ W + torch.eye(4, dtype=W.dtype)
    return torch.distributions.MultivariateNormal(torch.zeros(4, dtype=W.dtype), covariance).log_prob(x)


@pytest.fixture(autouse=True)
def _store_put_back() -> Iterator[None]:
    with pyro.get_param_store().scope():
        yield


class Base(nn.Module):
    """As the contract had it; patterns differ from it in one thing each."""

    plate = staticmethod(lambda x: pyro.plate("data", len(x)))
    site = "x"

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.raw = nn.Parameter(W.clone()), nn.Parameter(ZEROS.clone())

    def decode(self, z: Tensor, x: Tensor) -> Tensor:
        return z @ self.weight

    def prior(self, x: Tensor) -> Any:
        return dist.Normal(ZEROS, ONES).expand([len(x), 2]).to_event(1)

    def observe(self, loc: Tensor, x: Tensor) -> None:
        pyro.sample(self.site, dist.Normal(loc, 1.0).to_event(1), obs=x)

    def model(self, x: Tensor) -> None:
        with self.plate(x):
            z = pyro.sample("z", self.prior(x))
            self.observe(self.decode(z, x), x)

    def posterior(self, x: Tensor) -> Any:
        return dist.Normal(x @ W.T / PRECISION, self.raw.exp() * PRECISION.rsqrt())

    def guide(self, x: Tensor) -> None:
        with self.plate(x):
            pyro.sample("z", self.posterior(x).to_event(1))


def like(name: str, **members: Any) -> type[Base]:
    return type(name, (Base,), members)


class NoPlate(Base):
    def model(self, x: Tensor) -> None:
        self.observe(self.decode(pyro.sample("z", self.prior(x)), x), x)

    def guide(self, x: Tensor) -> None:
        pyro.sample("z", self.posterior(x).to_event(1))


class UnsizedPlate(Base):
    plate = staticmethod(lambda x: pyro.plate("rows"))


class PixelsInside(Base):
    plate = staticmethod(lambda x: pyro.plate("rows", len(x), dim=-2))

    def model(self, x: Tensor) -> None:
        with self.plate(x):
            with pyro.plate("latent", 2, dim=-1):
                z = pyro.sample("z", dist.Normal(ZEROS, ONES))
            with pyro.plate("pixels", 4, dim=-1):
                pyro.sample("x", dist.Normal(self.decode(z, x), 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with self.plate(x), pyro.plate("latent", 2, dim=-1):
            pyro.sample("z", self.posterior(x))


class PixelsOutside(Base):
    """Rows at -1, what belongs to one of them at -2."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-1):
            z = pyro.sample("z", self.prior(x))
            with pyro.plate("pixels", 4, dim=-2):
                pyro.sample("x", dist.Normal(self.decode(z, x).mT, 1.0), obs=x.mT)


class TwoLatents(Base):
    def model(self, x: Tensor) -> None:
        with self.plate(x):
            a = pyro.sample("a", dist.Normal(x.new_zeros(len(x)), 1.0))
            b = pyro.sample("b", dist.Normal(torch.zeros_like(a), 1.0))
            self.observe(self.decode(torch.stack([a, b], 1), x), x)

    def guide(self, x: Tensor) -> None:
        loc, scale = self.posterior(x).loc, self.posterior(x).scale
        with self.plate(x):
            pyro.sample("a", dist.Normal(loc[:, 0], scale[:, 0]))
            pyro.sample("b", dist.Normal(loc[:, 1], scale[:, 1]))


class WithBatchNorm(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, eps=0.0, affine=False, dtype=torch.float64).eval()

    def decode(self, z: Tensor, x: Tensor) -> Tensor:
        return self.norm(z @ self.weight)  # type: ignore[no-any-return]


class WithConvolution(Base):
    def decode(self, z: Tensor, x: Tensor) -> Tensor:
        return nn.functional.conv_transpose1d(z.unsqueeze(-1), self.weight.unsqueeze(1)).squeeze(1)


class Recurrent(Base):
    """A GRU whose output counts for nothing, which takes two axes of a batch and no third."""

    def __init__(self) -> None:
        super().__init__()
        with seeded(0):
            self.gru = nn.GRU(2, 4, batch_first=True, dtype=torch.float64)

    def decode(self, z: Tensor, x: Tensor) -> Tensor:
        out, _ = self.gru(z[:, None].expand(len(x), 3, 2))
        return z @ self.weight + 0.0 * out.mean(1)


class Trainable(Base):
    """With a method of the name of one of torch's modules, that does something else."""

    def train(self, mode: Any = True) -> Any:
        return super().train(bool(mode))


MODULES: dict[str, type[Base]] = {
    "the contract": Base,
    "another site": like("Obs", site="obs"),
    "another plate": like("Rows", plate=staticmethod(lambda x: pyro.plate("mini-batch", x.shape[0]))),
    "a plate at -1": like("At", plate=staticmethod(lambda x: pyro.plate("data", x.shape[0], dim=-1))),
    "a plate without a size": UnsizedPlate,
    "no plate": NoPlate,
    "subsample=x": like("Sub", plate=staticmethod(lambda x: pyro.plate("data", 1000, subsample=x))),
    "subsample_size": like("Size", plate=staticmethod(lambda x: pyro.plate("data", 1000, subsample_size=len(x)))),
    "pixels inside": PixelsInside,
    "pixels at -2": PixelsOutside,
    "two latents": TwoLatents,
    "x reshaped": like("Reshaped", observe=lambda s, loc, x: Base.observe(s, loc, x.reshape(-1, 4))),
    "x cast": like("Cast", observe=lambda s, loc, x: Base.observe(s, loc, x.double())),
    "BatchNorm1d": WithBatchNorm,
    "ConvTranspose": WithConvolution,
    "GRU": Recurrent,
    "view": like("View", decode=lambda s, z, x: z.view(len(x), 2) @ s.weight),
    "cat along 1": like("Cat", decode=lambda s, z, x: torch.cat([z, z.new_ones(len(x), 1)], 1)[:, :2] @ s.weight),
    "columns by number": like("Columns", decode=lambda s, z, x: z[:, :1] * s.weight[0] + z[:, 1:] * s.weight[1]),
    "einsum": like("Einsum", decode=lambda s, z, x: torch.einsum("ni,ij->nj", z, s.weight)),
    "bmm": like("Bmm", decode=lambda s, z, x: torch.bmm(z[:, None], s.weight.expand(len(x), 2, 4))[:, 0]),
    "split along 1": like("Split", decode=lambda s, z, x: sum(p * w for p, w in zip(z.split(1, 1), s.weight, strict=True))),
    "a loop over rows": like("Loop", decode=lambda s, z, x: torch.stack([z[i] @ s.weight for i in range(len(x))])),
    "a prior with rows": like("Prior", prior=lambda s, x: dist.Normal(x.new_zeros(len(x), 2), x.new_ones(len(x), 2)).to_event(1)),
    "a mask of ones": like(
        "Masked", observe=lambda s, loc, x: poutine.mask(Base.observe, mask=torch.ones(len(x), dtype=torch.bool))(s, loc, x)
    ),
    "train of its own": Trainable,
}  # fmt: skip


def svi_loss(model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Pyro's own, in nats per row."""
    with seeded(3), pyro.validation_enabled(False):  # which asks for plates
        loss: Tensor = pyro.infer.Trace_ELBO().differentiable_loss(model, guide, *args, **kwargs)
    return loss / N


def our_loss(program: Any, *args: Any) -> tuple[Tensor, Tensor]:
    with seeded(3):
        return _objective(Settings(objective="elbo"))(program, *args)  # type: ignore[arg-type, no-any-return]


def same_gradients(program: Any, theirs: Tensor, parameters: list[Tensor], surrogate: Tensor) -> None:
    expected = torch.autograd.grad(theirs, parameters, allow_unused=True)
    found = torch.autograd.grad(surrogate, list(program.parameters()), allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        assert (a is None or not a.any()) if b is None else torch.allclose(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("pattern", MODULES)
def test_a_pattern_is_pyros_elbo_and_the_exact_log_likelihood(pattern: str) -> None:
    program = MODULES[pattern]()
    result = pv.log_likelihood(program, X, num_samples=30)
    torch.testing.assert_close(result.log_likelihood, exact(), rtol=0, atol=1e-9)
    with torch.no_grad():
        program.raw.add_(0.3)
        program.weight.add_(0.1)
    pv.encode(program, X)  # on which road it is run is found anew
    theirs = svi_loss(program.model, program.guide, X)
    ours, surrogate = our_loss(program, X)
    torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-9)
    same_gradients(program, theirs, list(program.parameters()), surrogate)


FOLDED = {
    "a plate without a size",
    "no plate",
    "pixels inside",
    "pixels at -2",
    "two latents",
    "BatchNorm1d",
    "ConvTranspose",
}
FOLDED |= {"GRU", "view", "cat along 1", "columns by number", "einsum", "bmm", "split along 1", "a loop over rows"}


@pytest.mark.parametrize("pattern", MODULES)
def test_the_fast_road_is_kept_where_it_can_be(pattern: str) -> None:
    program = MODULES[pattern]()
    pv.encode(program, X)
    assert isinstance(vars(program)[FOLDS], dict) == (pattern in FOLDED)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pattern", ["pixels inside", "BatchNorm1d", "no plate", "another site"])
def test_everything_else_goes_through(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = MODULES[pattern]()
    assert pv.sample(program, 5, event_shape=(4,)).shape == (5, 4)
    assert pv.encode(program, X, num_samples=3).shape == (3, N, 2)  # type: ignore[union-attr]
    assert pv.reconstruct(program, X, num_samples=3).shape == (3, N, 4)
    annealed = pv.annealed_log_likelihood(program, X[:4], num_distributions=50)
    assert ((annealed.log_likelihood - exact(X[:4])).abs() < 5 * annealed.mc_se + 0.05).all()
    tree = pv.posterior(program, X[:2], num_samples=40)
    assert tree["posterior"]["z"].shape[-2:] == (2, 2)
    for objective in ("iwae:num_particles=3", "stl", "dreg:num_particles=3"):
        if not (pattern == "BatchNorm1d" and "3" in objective):
            pv.fit(program, X, steps=2, batch_size=6, objective=objective)
    monkeypatch.setattr("pyro_vae.capture.compiled", lambda graph, example: lambda tensors: graph(*tensors))
    pv.fit(program, X, steps=2, batch_size=6, compile="on")


# Folding and the axis of samples are one


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")
@pytest.mark.parametrize("guide", ["diagonal", "full-rank"])
@pytest.mark.parametrize("model", ["mlp", "mixture", "student-t"])
def test_folding_is_the_fast_road(model: str, guide: str) -> None:
    """The same draws: equal to 1e-6 relative in float64, weights, annealing, objectives."""
    x = (torch.rand(5, 1, 4, 4, generator=generator("folding"), dtype=torch.float64) > 0.5).double()
    program = pv.build(model, guide, (1, 4, 4), latent_dim=3, likelihood="bernoulli").double()
    found = []
    for folds in (False, True):
        pv.encode(program, x)
        vars(program)[FOLDS] = {} if folds else False
        weights = pv.log_likelihood(program, x, num_samples=40).log_likelihood
        annealed = pv.annealed_log_likelihood(program, x[:2], num_distributions=10).log_likelihood
        losses = []
        for objective in ("elbo:num_particles=3", "iwae:num_particles=4", "dreg:num_particles=4", "stl"):
            with seeded(5):
                loss, surrogate = _objective(Settings(objective=objective))(program, x)  # type: ignore[arg-type]
            grads = torch.autograd.grad(surrogate, list(program.parameters()), allow_unused=True)
            losses += [loss.reshape(1), *(g.flatten() for g in grads if g is not None)]
        found.append(torch.cat([weights, annealed, *losses]))
    assert isinstance(vars(program)[FOLDS], dict)
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-9)


# What is no module, and what goes in by name


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


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")
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
    ):
        with pytest.raises(UserError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    labelled = torch.utils.data.TensorDataset(X, torch.arange(N))
    pv.fit(pv.adopt(weight, param_guide), labelled, steps=1)


# Parts that crashed


class Unstated(dist.TorchDistribution):  # type: ignore[misc]
    """A normal of another library's, that draws and scores, and states no support."""

    arg_constraints = {}  # noqa: RUF012
    has_rsample = True

    def __init__(self, loc: Tensor, batch_shape: Any = ()) -> None:
        self.loc, self.inner = loc, torch.distributions.Normal(loc.expand(*batch_shape, *loc.shape), 1.0)
        super().__init__(torch.Size(batch_shape), loc.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Unstated:
        return Unstated(self.loc, batch_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.inner.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.inner.log_prob(value).sum(-1)


def test_a_prior_that_states_no_support_is_evaluated_by_what_it_can_do() -> None:
    program = like("Unstated", prior=lambda s, x: Unstated(ZEROS))()
    torch.testing.assert_close(pv.log_likelihood(program, X, num_samples=30).log_likelihood, exact(), rtol=0, atol=1e-9)
    for call in (pv.annealed_log_likelihood, pv.inference_gaps):
        with pytest.raises(UserError, match=r"'z' has a distribution .Unstated. that states no support"):
            call(program, X[:2])


@pytest.mark.parametrize("compile", ["off", "on"])
def test_a_parameter_of_no_elements_trains(compile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_vae.capture.compiled", lambda graph, example: lambda tensors: graph(*tensors))
    program = Base()
    program.where = nn.Parameter(torch.empty(0, dtype=torch.float64))
    assert pv.fit(program, X, epochs=2, compile=compile).metrics[-1]["epoch"] == 2


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")
def test_a_total_count_of_the_batch_is_no_bound_of_other_rows() -> None:
    class Words(Base):
        def observe(self, loc: Tensor, x: Tensor) -> None:
            pyro.sample("x", dist.Multinomial(int(x.sum(-1).max()), logits=loc), obs=x)

    x = torch.randint(1, 7, (40, 4), generator=generator("words")).double()
    for rows in (x[x.sum(-1).argsort()], x[x.sum(-1).argsort(descending=True)]):
        assert pv.encode(Words(), rows).shape == (40, 2)  # type: ignore[union-attr]
        assert pv.log_likelihood(Words(), rows, num_samples=200).log_likelihood.isfinite().all()


@pytest.mark.parametrize("family", [dist.OneHotCategorical, dist.OneHotCategoricalStraightThrough])
def test_one_hot_latents_are_compiled(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Classes(Base):
        def prior(self, x: Tensor) -> Any:
            return family(logits=ZEROS).expand([len(x)])

        def guide(self, x: Tensor) -> None:
            with self.plate(x):
                pyro.sample("z", family(logits=x @ self.weight.T))

    monkeypatch.setattr("pyro_vae.capture.compiled", lambda graph, example: lambda tensors: graph(*tensors))
    found = []
    for compile in ("off", "on"):
        program = Classes()
        pv.fit(program, X, epochs=3, batch_size=6, compile=compile)
        found.append(program.weight.detach().clone())
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")
def test_a_plate_as_large_as_samples_times_rows_is_not_taken_for_the_rows() -> None:
    program = PixelsOutside()  # four pixels; 2 samples of 2 rows are four, too
    found = pv.log_likelihood(program, X[:2], num_samples=2).log_likelihood
    torch.testing.assert_close(found, exact(X[:2]), rtol=0, atol=1e-9)


def test_inputs_of_one_call_are_not_those_of_the_next() -> None:
    program = pv.adopt(named_model, named_guide, observed="ys", constants={"scale": 1.0})
    pv.encode(program, X, inputs={"sizes": CONTEXT})  # type: ignore[call-arg]
    found = pv.log_likelihood(
        program, X + CONTEXT, CONTEXT, num_samples=30
    ).log_likelihood  # as y, the required argument
    torch.testing.assert_close(found, exact(), rtol=0, atol=1e-9)
    with pytest.raises(UserError, match="whole numbers above"):
        pv.encode(program, X.float(), inputs={"sizes": torch.full((N, 4), 2**60)})  # type: ignore[call-arg]
