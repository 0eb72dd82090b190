"""Programs as people write them for Pyro, with no line changed: equal to Pyro's own ELBO, and to log p(x)."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from patterns import MODULES, ONES, ZEROS, Base, N, PixelsOutside, W, X, exact, like, our_loss, same_gradients, svi_loss
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.analysis.imputation import WithMissing, impute
from pyro_vae.errors import UserError
from pyro_vae.programs.folding import FOLDS
from pyro_vae.seeding import generator, seeded

pytestmark = pytest.mark.usefixtures("pyro_store_put_back")


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
@pytest.mark.parametrize(
    "pattern",
    ["BatchNorm1d", *(pytest.param(p, marks=pytest.mark.slow) for p in ("pixels inside", "no plate", "another site"))],
)
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


@pytest.mark.parametrize("plate", ["subsample=x", "subsample_size"])
def test_more_samples_than_a_plate_has_rows(plate: str) -> None:
    members = {"plate": staticmethod(MODULES[plate].plate), "decode": MODULES["view"].decode}
    program = type("Folded", (Base,), members)()  # 100 samples of 12 rows, of a plate of 1,000
    found = pv.log_likelihood(program, X, num_samples=100).log_likelihood
    torch.testing.assert_close(found, exact(), rtol=0, atol=1e-9)


# Training and filling, where samples are folded into rows


@pytest.mark.parametrize("objective", ["elbo:num_particles=3", "iwae:num_particles=3"])
def test_statistics_of_a_batch_are_those_of_one_sample(objective: str) -> None:
    program = MODULES["BatchNorm1d"]()
    program.norm.train().eps = 1e-5
    pv.fit(program, X, steps=1, batch_size=6)
    with pytest.raises(UserError, match=r"BatchNorm 'norm' takes its statistics .*norm\.eval"):
        pv.fit(program, X, steps=1, batch_size=6, objective=objective)
    program.norm.eval()
    pv.fit(program, X, steps=1, batch_size=6, objective=objective)


class Bits(Base):
    """z ~ Bernoulli(1/2) twice; the guide's logits are those of the posterior's means."""

    def prior(self, x: Tensor) -> Any:
        return dist.Bernoulli(probs=0.5 * ONES).expand([len(x), 2]).to_event(1)

    def posterior(self, x: Tensor) -> Any:
        return dist.Bernoulli(logits=x @ W.T + self.raw)


class BitsInside(Bits):
    """In plates inside the rows' own."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-2):
            with pyro.plate("bits", 2, dim=-1):
                z = pyro.sample("z", dist.Bernoulli(probs=0.5 * ONES))
            with pyro.plate("pixels", 4, dim=-1):
                pyro.sample("x", dist.Normal(z @ self.weight, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-2), pyro.plate("bits", 2, dim=-1):
            pyro.sample("z", self.posterior(x))


@pytest.mark.parametrize("kind", [Bits, type("View", (Bits,), {"decode": MODULES["view"].decode}), BitsInside])
def test_states_are_summed_over_where_they_are_folded(kind: type[Bits]) -> None:
    program = kind()
    pv.encode(program, X)
    loss, surrogate = our_loss(program, X, objective="enumerated-elbo")
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=X.dtype)] * 2)
    q = dist.Bernoulli(logits=(X @ W.T)[None]).log_prob(states[:, None]).sum(-1)
    p = dist.Normal(states @ W, 1.0).to_event(1).log_prob(X[:, None]).T - 2 * math.log(2)
    torch.testing.assert_close(loss, -(q.exp() * (p - q)).sum(0).mean(), rtol=0, atol=1e-9)
    plain = Bits()
    pv.encode(plain, X)
    theirs = our_loss(plain, X, objective="enumerated-elbo")[1]
    same_gradients(program, theirs, list(plain.parameters()), surrogate)


@pytest.mark.parametrize("pattern", ["view", "pixels inside", "two latents", "BatchNorm1d"])
def test_missing_elements_are_filled_by_their_posterior(pattern: str) -> None:
    seen = torch.rand(4, 4, generator=generator("seen")) < 0.6
    covariance = W.T @ W + torch.eye(4, dtype=W.dtype)
    expected = X[:4].clone()
    for row, known in zip(expected, seen, strict=True):
        weights = torch.linalg.solve(covariance[known][:, known], row[known])
        row[~known] = covariance[~known][:, known] @ weights
    found = impute(MODULES[pattern](), X[:4], seen, num_rounds=200)
    assert ((found.mean - expected).abs() <= 5 * found.mc_se + 1e-12).all()
    if pattern == "pixels inside":
        with pytest.raises(UserError, match=r"to_event") as caught:
            pv.log_likelihood(WithMissing(MODULES[pattern]()), X[:4], seen, num_samples=30)
        assert "\n" not in str(caught.value)


class Tokens(nn.Module):
    """Sentences of five words out of seven, whose encoder looks words up: z is one of three, so that log p(x) is a sum."""

    def __init__(self) -> None:
        super().__init__()
        with seeded(1):
            self.table, self.words = nn.Embedding(7, 3).double(), nn.Parameter(torch.randn(3, 7, dtype=torch.float64))

    def model(self, tokens: Tensor) -> None:
        with pyro.plate("sentences", len(tokens)):
            z = pyro.sample("z", dist.Categorical(self.words.new_ones(3)))
            logits = self.words[z].unsqueeze(-2).expand(*z.shape, tokens.shape[1], 7)
            pyro.sample("words", dist.Categorical(logits=logits).to_event(1), obs=tokens)

    def guide(self, tokens: Tensor) -> None:
        with pyro.plate("sentences", len(tokens)):
            pyro.sample("z", dist.Categorical(logits=self.table(tokens).mean(1)))


def test_tokens_are_looked_up_as_whole_numbers() -> None:
    program = Tokens()
    tokens = torch.randint(7, (N, 5), generator=generator("sentences"))
    by_word = torch.log_softmax(program.words, -1)[:, tokens].sum(-1)
    found = pv.log_likelihood(program, tokens).log_likelihood
    torch.testing.assert_close(found, torch.logsumexp(by_word - math.log(3), 0).detach(), rtol=0, atol=1e-9)
    theirs = svi_loss(program.model, program.guide, tokens)
    ours, surrogate = our_loss(program, tokens.double())
    torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-9)
    same_gradients(program, theirs, list(program.parameters()), surrogate)
    assert pv.sample(program, 4, event_shape=(5,)).shape == (4, 5)
    with pytest.raises(UserError, match="row 11 are no whole numbers, and this program takes nothing else"):
        pv.encode(program, torch.cat([tokens[:11].double(), tokens[:1] + 0.5]))


def test_reading_data_that_are_zeros_and_ones_by_turns_is_seen() -> None:
    """By which the data are replaced to see whether the model reads them (found by tests/test_random_programs.py)."""
    program = like("Reads", decode=lambda s, z, x: z @ s.weight + 0.5 * x)()
    with pytest.raises(UserError, match="reads x itself"):
        pv.encode(program, torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, 4))


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")
@pytest.mark.parametrize("base", ["another site", "view"])
def test_a_distribution_of_torchs_own_is_drawn_from(base: str) -> None:
    """Which Pyro scores, and cannot call: nothing but a proof draws what is observed."""

    def observe(self: Any, loc: Tensor, x: Tensor) -> None:
        normal = torch.distributions.Normal(loc, torch.ones_like(loc))
        pyro.sample("x", torch.distributions.Independent(normal, 1), obs=x)

    program = type("Torch", (MODULES[base],), {"observe": observe})()
    found = pv.log_likelihood(program, X, num_samples=30).log_likelihood
    torch.testing.assert_close(found, exact(), rtol=0, atol=1e-9)
