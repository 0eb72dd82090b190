"""What records must not take from a few draws or rows: who reads what is missing, states, roads, kinds of numbers."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from test_records_hostile import GAUSS, integrated
from torch import nn

import pyro_vae as pv
from pyro_vae import Record


class Censored(nn.Module):
    """What is below a limit of detection is missing, and that it is missing is observed; the limit is at -2.6 sd of it."""

    def model(self, x: Record) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            value = pyro.sample("value", dist.Normal(5 + z, 0.5), obs=x["value"])
            pyro.sample("seen", dist.Bernoulli(torch.where(value > 2.1, 0.999, 0.001).double()), obs=x["seen"])

    def guide(self, x: Record) -> None:
        with pyro.plate("data", len(x)):
            known = x.present["value"]
            pyro.sample("z", dist.Normal(torch.where(known, 0.8 * (x["value"] - 5), -3.0), 1.2))


def test_a_limit_that_no_draw_passes_is_read() -> None:
    """Readers of what is missing are followed from tensor to tensor: by values, none of 48 draws is below the limit."""
    seen = torch.ones(8, dtype=torch.float64)
    seen[3] = 0
    record = Record({"value": torch.full((8,), 5.0, dtype=torch.float64), "seen": seen}, {"value": seen == 1})
    found = pv.log_likelihood(Censored(), record, num_samples=4000)
    grid = 5 + GAUSS
    law = dist.Normal(torch.tensor(5.0, dtype=torch.float64), math.sqrt(1.25))
    truth = integrated(law.log_prob(grid) + torch.where(grid > 2.1, 0.001, 0.999).double().log())
    assert abs(float(found.log_likelihood[3] - truth)) < 4.5 * float(found.mc_se[3]) + 0.02


def test_a_rare_class_is_a_latent_all_the_same() -> None:
    """Columns below a class that is seldom drawn cannot be given, whatever the seed."""

    class Rare(nn.Module):
        def model(self, x: Record) -> None:
            with pyro.plate("data", len(x)):
                rare = pyro.sample("rare", dist.Bernoulli(torch.tensor(0.001, dtype=torch.float64)))
                pyro.sample("flag", dist.Bernoulli(0.01 + 0.98 * rare), obs=x["flag"])

        def guide(self, x: Record) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("rare", dist.Bernoulli(0.5 * torch.ones(len(x), dtype=torch.float64)))

    for seed in range(3):
        with pytest.raises(pv.UserError, match=r"draws 'flag' .* after latents"):
            pv.sample_columns(Rare(), 4, given={"flag": 1}, columns={"flag": ()}, seed=seed)


@pytest.mark.filterwarnings("ignore:Pareto k")  # of a guide that was not trained
def test_states_are_summed_over_where_samples_are_rows() -> None:
    """M2 whose decoder takes no axis of samples: weights, the loss and imputed classes are those of the other to rounding."""
    from record_programs import M2, m2_data

    class Viewed(M2):
        def model(self, x: Record) -> None:
            with pyro.plate("data", len(x)):
                label = pyro.sample("label", dist.Categorical(logits=self.prior))
                z = pyro.sample("z", dist.Normal(self.prior.new_zeros(2), 1.0).expand([len(x), 2]).to_event(1))
                logits = self.of_label[label.view(len(x))] + z.view(len(x), 2) @ self.decoder
                pyro.sample("image", dist.Bernoulli(logits=logits).to_event(1), obs=x["image"])

    record = m2_data(8)
    found = [pv.log_likelihood(p, record, num_samples=100).log_likelihood for p in (M2(), Viewed())]
    assert torch.allclose(*found, atol=1e-9)
    losses = [pv.fit(p, record, steps=3, batch_size=8).metrics[0]["train_loss"] for p in (M2(), Viewed())]
    assert abs(losses[0] - losses[1]) < 1e-9
    classes = [pv.impute(p, record, num_samples=100).probability["label"] for p in (M2(), Viewed())]
    assert torch.allclose(*classes, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Pareto k")  # of a guide that was not trained
def test_draws_of_whole_numbers_lie_between_where_their_density_does() -> None:
    """An integer column under a Normal is filled without being cut off; one of booleans is a site's like any other."""

    class Ages(nn.Module):
        def model(self, x: Record) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
                pyro.sample("age", dist.Normal(0.5 + 0 * z, 1.0), obs=x["age"])
                pyro.sample("member", dist.Bernoulli(logits=z), obs=x["member"])

        def guide(self, x: Record) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.1))

    known = torch.arange(100) < 10
    record = Record({"age": torch.arange(100), "member": torch.arange(100) % 2 == 0}, {"age": known})
    found = pv.impute(Ages(), record, num_samples=200, num_draws=200)
    assert abs(float(found.draws["age"][:, ~known].mean()) - 0.5) < 0.05
    assert found.interval("age", 0.9).shape == (100, 2)


@pytest.mark.filterwarnings("ignore:Pareto k")  # of a guide that was not trained
def test_states_of_rows_that_have_others_are_refused() -> None:
    """A binomial with a total count of its own in one row, of which the examination's eight rows know nothing."""

    class Counts(nn.Module):
        def model(self, x: Record) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
                pyro.sample("k", dist.Binomial(x["n"], logits=torch.zeros(())), obs=x["k"])
                pyro.sample("v", dist.Normal(z[..., None].expand(*z.shape, 12), 100.0).to_event(1), obs=x["v"])

        def guide(self, x: Record) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.1))
                pyro.sample("k", dist.Binomial(x["n"], logits=torch.full((), 0.3)))

    n, v = torch.full((60,), 10.0), 100 * torch.randn(60, 12, generator=torch.Generator().manual_seed(0))
    v[37] = 0  # in the midst of every column: none of the eight rows that are looked at
    known = {"k": torch.arange(60) % 2 == 0}
    same = pv.log_likelihood(Counts(), Record({"n": n, "k": torch.full((60,), 3.0), "v": v}, known), num_samples=100)
    assert bool(torch.isfinite(same.log_likelihood).all())
    n[37] = 20
    with pytest.raises(pv.UserError, match=r"'k' .Binomial. can have differ from row to row"):
        pv.log_likelihood(Counts(), Record({"n": n, "k": torch.full((60,), 3.0), "v": v}, known), num_samples=100)


@pytest.mark.filterwarnings("ignore:Pareto k")  # of a guide that was not trained
def test_two_layouts_of_a_folded_program_do_not_meet() -> None:
    """What one kind of records has seldom drawn, one site, another has two of: results of before come again after it."""

    class Folded(nn.Module):
        def model(self, x: Record) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
                t = pyro.sample("t", dist.Normal(z.view(len(x)), 1.0), obs=x["t"])
                pyro.sample("v", dist.Normal(t.view(len(x)), 0.5), obs=x["v"])

        def guide(self, x: Record) -> None:
            with pyro.plate("data", len(x)):
                t = pyro.sample("t", dist.Normal(0.8 * x["v"], 0.6))
                pyro.sample("z", dist.Normal(0.5 * t.view(len(x)), 0.8))

    program, v = Folded(), torch.linspace(-1, 1, 6)
    half = Record({"t": v, "v": v}, {"t": torch.arange(6) % 2 == 0})
    first = pv.log_likelihood(program, half, num_samples=200).log_likelihood
    pv.log_likelihood(program, Record({"t": v, "v": v}), num_samples=200)
    assert torch.equal(pv.log_likelihood(program, half, num_samples=200).log_likelihood, first)
