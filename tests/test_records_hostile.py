"""Records through programs that the mechanism was not written for, each held to a closed form or a sum done by hand."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from record_programs import SIZES, JointGaussian, gaussian_data
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import Record

GAUSS = torch.linspace(-10, 10, 2001, dtype=torch.float64)


def integrated(log_density: Tensor) -> Tensor:
    """log of the integral over GAUSS, the first axis."""
    return log_density.logsumexp(0) + math.log(float(GAUSS[1] - GAUSS[0]))


def z_scores(found: pv.LogLikelihood, truth: Tensor) -> float:
    """The largest distance from the truth in standard errors; exact results are to be exact."""
    off = (found.log_likelihood - found.bias - truth).abs()
    assert float(off[found.mc_se == 0].max() if bool((found.mc_se == 0).any()) else 0.0) < 1e-6
    return float((off / found.mc_se.clamp(min=1e-9)).max())


class Folded(JointGaussian):
    """Its decoder has a ``view`` that takes no axis of samples; and the guide draws the elements of b that are missing."""

    def model(self, x: Record) -> None:
        """The same."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.shift.new_zeros(2), 1.0).expand([len(x), 2]).to_event(1))
            means = (z.view(len(x), 2) @ self.weight.T + self.shift).split(list(SIZES.values()), -1)
            for name, mean in zip(SIZES, means, strict=True):
                pyro.sample(name, dist.Normal(mean, self.scale).to_event(1), obs=x[name])

    def guide(self, x: Record) -> None:
        """The same, and q(b | z)."""
        values = torch.cat([x[name] for name in SIZES], 1)
        known = torch.cat([x.present[n].reshape(len(x), -1).expand(len(x), size) for n, size in SIZES.items()], 1)
        mean, precision = self.posterior(values, known)
        with pyro.plate("data", len(x)):
            tril = torch.linalg.cholesky(torch.linalg.inv(precision)) * self.wide
            z = pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=tril))
            own = (z.view(len(x), 2) @ self.weight.T + self.shift)[:, 2:5]
            pyro.sample("b", dist.Normal(own, self.scale * 1.1).to_event(1))


@pytest.mark.slow
def test_samples_folded_into_rows_and_elements_that_the_guide_draws() -> None:
    """log p of what is present and imputed means, of a program whose rows hold its samples."""
    program = Folded()
    record, values, known = gaussian_data(program, 60)
    found = pv.log_likelihood(program, record, num_samples=400)
    assert z_scores(found, program.log_prob(values, known)) < 4.5
    filled = pv.impute(program, record, num_samples=400)
    mean, _ = program.posterior(values, known)
    truth = (mean @ program.weight.T + program.shift)[:, 2:5].detach()
    missing = ~known[:, 2:5]
    off = ((filled.mean["b"] - truth) / filled.mc_se["b"])[missing]
    assert float(off.abs().max()) < 4.8


class LabelAfterLatents(nn.Module):
    """z -> value, z -> label: a class that depends on z; q(label | value) comes before q(z | value, label) in the guide."""

    def model(self, x: Record) -> None:
        """p(z) p(value | z) p(label | z)."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(GAUSS.new_zeros(()), 1.0))
            pyro.sample("value", dist.Normal(z, 0.5), obs=x["value"])
            pyro.sample("label", dist.Categorical(logits=torch.stack([z, -z, 0 * z], -1)))

    def guide(self, x: Record) -> None:
        """q(label | value) q(z | value, label)."""
        with pyro.plate("data", len(x)):
            near = x["value"]
            label = pyro.sample("label", dist.Categorical(logits=torch.stack([near, -near, 0 * near], -1)))
            wide = torch.where(x.present["value"], 0.6, 1.2)
            pyro.sample("z", dist.Normal(0.7 * near + 0.1 * (1.0 * (label == 0) - 1.0 * (label == 1)), wide))


def test_a_class_below_the_latents() -> None:
    """log p(value, label), log p(value), log p(label), log p(label | value) and p(label | value), by quadrature."""
    value = torch.tensor([0.3, -1.0, 2.0, 0.0, 0.7], dtype=torch.float64)
    label = torch.tensor([0, 1, 2, 0, 1])
    record = Record({"value": value, "label": label}, {"label": torch.tensor([True, True, False, False, True])})
    prior = dist.Normal(0.0, 1.0).log_prob(GAUSS)[:, None]
    of_value = dist.Normal(GAUSS[:, None], 0.5).log_prob(value)
    classes = torch.stack([GAUSS, -GAUSS, 0 * GAUSS], -1).log_softmax(-1)
    both = integrated(prior + of_value + classes[:, label])
    alone, only_label = integrated(prior + of_value), integrated(prior + classes[:, label])
    program, there = LabelAfterLatents(), record.present["label"]
    found = pv.log_likelihood(program, record, num_samples=3000)
    assert z_scores(found, torch.where(there, both, alone)) < 4.5
    assert z_scores(pv.log_likelihood(program, record, of="value", num_samples=3000), alone) < 4.5
    of_label = pv.log_likelihood(program, record, of="label", num_samples=3000)
    assert z_scores(of_label, torch.where(there, only_label, 0.0)) < 4.5
    given = pv.log_likelihood(program, record, of="label", given="value", num_samples=3000)
    assert z_scores(given, torch.where(there, both - alone, 0.0)) < 4.5
    truth = torch.stack([integrated(prior + of_value + classes[:, [k]]) for k in range(3)], 1).softmax(1)
    probability = pv.impute(program, record, num_samples=3000).probability["label"]
    assert float((probability - truth)[~there].abs().max()) < 0.03
    with pytest.raises(pv.UserError, match="after latents"):
        pv.sample_columns(program, 4, given={"label": 1})
    drawn = pv.sample_columns(program, 4000, seed=1)
    assert abs(float((drawn["label"] == 0).double().mean()) - float(integrated(prior + classes)[0].exp())) < 0.035


def test_functions_that_are_adopted_read_columns_and_covariates() -> None:
    """value = a + b * age + noise, without and with a value; every density in closed form."""

    def model(x: Record) -> None:
        slope = pyro.param("slope", torch.tensor(0.5))
        with pyro.plate("rows", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("value", dist.Normal(a + slope * x["age"], 1.0), obs=x["value"])

    def guide(x: Record) -> None:
        with pyro.plate("rows", len(x)):
            off = 0.5 * (x["value"] - 0.5 * x["age"]) * x.present["value"]
            pyro.sample("a", dist.Normal(off, torch.where(x.present["value"], 0.8, 1.05)))

    value, age = torch.tensor([0.3, -1.0, 2.0, 9.9]), torch.tensor([1.0, 2.0, -1.0, 0.0])
    record = Record({"value": value, "age": age}, {"value": torch.tensor([True, True, True, False])})
    program = pv.adopt(model, guide)
    found = pv.log_likelihood(program, record, num_samples=2000)
    truth = dist.Normal(0.5 * age, math.sqrt(2.0)).log_prob(value)
    truth[3] = 0.0
    assert z_scores(found, truth.double()) < 4.5
    assert torch.equal(
        pv.log_likelihood(program, record, of="value", num_samples=2000).log_likelihood, found.log_likelihood
    )


def test_models_that_read_a_column_and_names_that_clash_are_refused() -> None:
    """A likelihood fed with its own column; a site that is called as the observed half of another; joint axes with gaps."""

    class Broken(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind = kind

        def model(self, x: Record) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                mean = x["b"].sum(-1) if self.kind == "reads" else z
                pyro.sample("c_observed" if self.kind == "clash" else "other", dist.Normal(z, 1.0), obs=x["d"])
                fn = dist.Normal(mean[..., None] + torch.zeros(2), 1.0).to_event(1)
                if self.kind == "joint":
                    fn = dist.MultivariateNormal(mean[..., None] + torch.zeros(2), torch.eye(2))
                pyro.sample("b", fn, obs=x["b"])
                pyro.sample("c", dist.Normal(z, 1.0))

        def guide(self, x: Record) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x["c"], 1.0))
                pyro.sample("c", dist.Normal(z, 1.1))

    b = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    known = torch.ones(8, 2, dtype=torch.bool)
    known[0, 1] = known[3, 0] = False
    c_there = torch.arange(8) % 2 == 0
    for kind, match, name in (
        ("reads", "reads x itself", "other"),
        ("clash", "rename it", "c_observed"),
        ("joint", "joint axes", "other"),
    ):
        columns = {"b": b, "c": b[:, 0], "d": b[:, 1], name: b[:, 1]}
        record = Record(columns, {"c": c_there, **({"b": known} if kind == "joint" else {})})
        with pytest.raises(pv.UserError, match=match):
            pv.log_likelihood(Broken(kind), record, num_samples=30)
    with pytest.raises(pv.UserError, match="call a column"):
        pv.log_likelihood(Broken("plain"), Record({"b": b, "c": b[:, 0], "d": b[:, 1]}, {"c": c_there}), num_samples=30)


class Lossy(nn.Module):
    """Positive values of which some are missing: zeros, that stand where nothing is, are outside of the support."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def model(self, x: Record) -> None:
        """p(z) LogNormal(value; z + mean, 1)."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.mean * 0, 1.0))
            pyro.sample("value", dist.LogNormal(z + self.mean, 1.0), obs=x["value"])

    def guide(self, x: Record) -> None:
        """q(z | value)."""
        with pyro.plate("data", len(x)):
            near = torch.log(torch.where(x.present["value"], x["value"], 1.0))
            pyro.sample("z", dist.Normal(0.5 * near, torch.where(x.present["value"], 0.8, 1.05)))


def test_missing_values_outside_of_a_support_leave_gradients_finite() -> None:
    """The loss and its gradient of rows with a value, as if the others were not there."""
    value = torch.tensor([0.5, 1.0, 3.0, 2.0, 0.7, 1.5], dtype=torch.float64)
    there = torch.tensor([True, False, True, True, False, True])
    program = Lossy()
    found = pv.log_likelihood(program, Record({"value": value}, {"value": there}), num_samples=2000)
    truth = dist.LogNormal(0.0, math.sqrt(2.0)).log_prob(value)
    assert z_scores(found, torch.where(there, truth, 0.0)) < 4.5
    run = pv.fit(program, Record({"value": value}, {"value": there}), steps=3, batch_size=6)
    assert all(bool(p.isfinite().all()) for p in run.program.parameters())


def test_scales_masks_and_more_particles() -> None:
    """poutine.scale of a row and several particles: the mean loss of many draws is that of rows counted so often."""
    from record_programs import M2, m2_data

    from pyro_vae.objectives.elbo import ELBO
    from pyro_vae.programs.columns import packed
    from pyro_vae.programs.contract import admit

    class Scaled(M2):
        def model(self, x: Record) -> None:
            with pyro.poutine.scale(scale=2.0):
                super().model(x)

        def guide(self, x: Record) -> None:
            with pyro.poutine.scale(scale=2.0):
                super().guide(x)

    losses = []
    for program in (M2(), Scaled()):
        x = packed(program, m2_data(6))
        admit(program, x)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            losses.append(ELBO(num_particles=50)(program, x)[0])
    assert float((2 * losses[0] - losses[1]).abs()) < 1e-9


class Plates(nn.Module):
    """Rows at dim -2 of a plate of three places, in which elements are missing; a column is called as the plate of rows is."""

    def model(self, x: Record) -> None:
        """p(z) prod_k N(value_k; z + data, 1), data a covariate."""
        with pyro.plate("rows", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1, dtype=torch.float64), 1.0))
            with pyro.plate("data", 3, dim=-1):
                pyro.sample("value", dist.Normal(z + x["data"][:, None], 1.0), obs=x["value"])

    def guide(self, x: Record) -> None:
        """q(z | what is present), exact but for its width."""
        known = x.present["value"].to(torch.float64)
        count = known.sum(1, keepdim=True)
        mean = ((x["value"] - x["data"][:, None]) * known).sum(1, keepdim=True) / (1 + count)
        with pyro.plate("rows", len(x), dim=-2):
            pyro.sample("z", dist.Normal(mean, 1.2 / (1 + count).sqrt()))


def test_elements_in_plates_inside_the_rows_and_a_column_called_as_a_plate() -> None:
    """log p of what is present in closed form, by importance weights and by annealing."""
    random = torch.Generator().manual_seed(0)
    value = torch.randn(12, 3, generator=random, dtype=torch.float64)
    age = torch.randn(12, generator=random, dtype=torch.float64)
    known = torch.rand(12, 3, generator=random) < 0.7
    record = Record({"value": value, "data": age}, {"value": known})
    truth = []
    for row in range(12):
        at = known[row].nonzero()[:, 0]
        covariance = torch.eye(len(at), dtype=torch.float64) + 1
        law = dist.MultivariateNormal(age[row].expand(len(at)), covariance) if len(at) else None
        truth.append(torch.zeros((), dtype=torch.float64) if law is None else law.log_prob(value[row, at]))
    found = pv.log_likelihood(Plates(), record, num_samples=1000)
    assert z_scores(found, torch.stack(truth)) < 4.5
    annealed = pv.annealed_log_likelihood(Plates(), record, num_distributions=50, num_chains=64)
    assert z_scores(annealed, torch.stack(truth)) < 4.5


def test_a_program_that_changes_is_looked_at_anew() -> None:
    """The guide has a site for a column, then not, then has it again: log p is right each time."""
    program = JointGaussian(draws=False)
    record, values, known = gaussian_data(program, 30)
    for draws in (True, False, True):
        program.draws = draws
        assert z_scores(pv.log_likelihood(program, record, num_samples=400), program.log_prob(values, known)) < 4.5


class ReadsOne(nn.Module):
    """Of twelve columns with gaps, the last is read by a site: seldom is it missing in the rows that are looked at."""

    def model(self, x: Record) -> None:
        """p(z) prod_k N(c_k; z, 1) N(d; c_11, 1)."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            value = [pyro.sample(f"c{k}", dist.Normal(z, 1.0), obs=x[f"c{k}"]) for k in range(12)]
            pyro.sample("d", dist.Normal(value[-1], 1.0), obs=x["d"])

    def guide(self, x: Record) -> None:
        """q(z | what is present)."""
        count = sum((x.present[f"c{k}"].to(torch.float64) for k in range(12)), torch.ones(len(x), dtype=torch.float64))
        total = sum((x[f"c{k}"] for k in range(12)), torch.zeros(len(x), dtype=torch.float64))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(total / count, 1.3 / count.sqrt()))


def test_what_is_read_is_found_in_whatever_rows_it_is_missing() -> None:
    """log p in closed form where the column that is read is missing in one row of forty; annealing refuses by name."""
    random = torch.Generator().manual_seed(0)
    columns = {f"c{k}": torch.randn(40, generator=random, dtype=torch.float64) for k in range(12)}
    columns["d"] = torch.randn(40, generator=random, dtype=torch.float64)
    present = {f"c{k}": torch.rand(40, generator=random) < 0.6 for k in range(11)}
    present["c11"] = torch.arange(40) != 37
    record = Record(columns, present)
    found = pv.log_likelihood(ReadsOne(), record, num_samples=2000)
    names = [f"c{k}" for k in range(12)]
    joint = torch.ones(13, 13, dtype=torch.float64) + torch.eye(13, dtype=torch.float64)
    joint[12, 11] = joint[11, 12] = 2.0  # d = c_11 + noise
    joint[12, 12] = 3.0
    truth = []
    for row in range(40):
        at = [k for k, n in enumerate(names) if bool(record.present[n][row])] + [12]
        value = torch.stack([columns[n][row] for n in [*names, "d"]])[at]
        truth.append(
            dist.MultivariateNormal(torch.zeros(len(at), dtype=torch.float64), joint[at][:, at]).log_prob(value)
        )
    assert z_scores(found, torch.stack(truth)) < 4.5
    with pytest.raises(pv.UserError, match="read by later sites"):
        pv.annealed_log_likelihood(ReadsOne(), record, num_distributions=20)


def test_what_is_observed_is_not_scaled_as_a_latent() -> None:
    """A beta of the KL weighs labels where they are drawn, and not where they are given."""
    from record_programs import M2, m2_data

    from pyro_vae.objectives.elbo import ELBO
    from pyro_vae.programs.columns import packed
    from pyro_vae.programs.contract import admit

    whole = m2_data(6)
    losses = []
    for present in (torch.ones(6, dtype=torch.bool), torch.arange(6) < 6):
        program = M2()
        record = Record({"image": whole["image"], "label": whole["label"]}, {"label": present})
        x = packed(
            program, record, whole=len(losses) == 1
        )  # given in every row, once as complete, once as it might be missing
        admit(program, x)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            losses.append(ELBO(num_particles=4000, beta=3.0)(program, x)[0])
    assert (
        float((losses[0] - losses[1]).abs()) < 0.1
    )  # other draws; unscaled labels differ by 2 E log p(label), some nats


def test_results_of_subsets_print_and_compare() -> None:
    """A conditional result has a summary, prints, and is compared with another of the same rows."""
    program = JointGaussian()
    record, _, _ = gaussian_data(program, 40)
    a, b = (
        pv.log_likelihood(p, record, of="a", given="b", num_samples=100) for p in (program, JointGaussian(wide=1.4))
    )
    assert "NLL" in str(a)
    assert a.summary()["elbo"] is None
    assert pv.compare(a, b).difference is not None
