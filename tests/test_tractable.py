"""Programs without latents: log p(x) is exact, whatever is reported of latents is left out, and what is about them refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import pyro
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.evaluation.evaluate import evaluate
from pyro_vae.likelihoods.autoregressive_bernoulli import AutoregressiveBernoulli


class Pixels(nn.Module):
    """p(x) = prod_d Bernoulli(x_d; f_d(x_<d))."""

    def __init__(self, event_shape: tuple[int, ...] = (1, 2, 4)) -> None:
        super().__init__()
        self.event_shape = event_shape
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            self.likelihood = AutoregressiveBernoulli((1,), event_shape, channels=4, layers=1, kernel=3)
            for parameter in self.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.likelihood(x.new_ones(len(x), 1)), obs=x)

    def guide(self, x: Tensor) -> None:
        pass


ALL = torch.tensor(list(itertools.product([0.0, 1.0], repeat=8))).reshape(-1, 1, 2, 4)


@pytest.mark.parametrize("options", [{"num_samples": 1}, {"num_samples": 300, "noise": "sobol"}, {"target_se": 0.1}])
def test_the_density_is_exact_and_adds_up_to_one(options: dict[str, object]) -> None:
    found = pv.log_likelihood(Pixels(), ALL, **options)  # type: ignore[arg-type]
    assert float(found.log_likelihood.exp().sum()) == pytest.approx(1, abs=1e-5)
    assert float(found.mc_se.max()) == 0
    assert bool(torch.isneginf(found.khat).all())
    assert found.states == 1
    assert "exact" in str(found)


def test_it_is_trained_evaluated_sampled_compared_and_reported(tmp_path: Path) -> None:
    x = ALL[torch.arange(512) * 7 % 256]
    run = pv.fit(
        Pixels(), pv.Data("pixels", x[:300], x[300:400], x[400:], 2), epochs=2, compile="off", out=tmp_path / "run"
    )
    figures, result = evaluate(run.program, run.data, num_samples=50)
    assert figures["active_units"] == []
    assert figures["kl"] == 0
    assert figures["nll"] == pytest.approx(-figures["elbo"])
    assert pv.compare(result, result).mean == 0
    assert pv.sample(run.program, 3).shape == (3, 1, 2, 4)
    assert pv.load(tmp_path / "run", program=Pixels()).program is not None


def test_what_is_about_latents_is_refused_by_name() -> None:
    program, x = Pixels(), ALL[:4]
    for call in (pv.encode, pv.reconstruct, pv.posterior, pv.prove, pv.latent_information):
        with pytest.raises(pv.UserError, match="is about latents, and the program has none"):
            call(program, x)
    with pytest.raises(pv.UserError, match="export its density"):
        pv.export(program)


class Columns(nn.Module):
    """p(x) = prod_d N(x_d; m_d, 1) of a table."""

    event_shape = (3,)

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(3))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", pyro.distributions.Normal(self.loc, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pass


def test_a_table_without_latents_is_reported(tmp_path: Path) -> None:
    # what was expected of an entry is the mean given the latents, of which there are none
    (tmp_path / "a.csv").write_text("\n".join(["a,b,c", *(f"{i % 7},{i % 5},{i % 3}" for i in range(60))]))
    run = pv.fit(Columns(), pv.load_data(tmp_path / "a.csv"), epochs=1, compile="off", out=tmp_path / "run")
    pv.report(run, tmp_path / "report.html", num_samples=20)
    assert "least expected" not in (tmp_path / "report.html").read_text(encoding="utf-8")
