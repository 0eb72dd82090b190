"""Records: log p of what is present, of columns and of columns given others, against closed forms and sums done by hand."""

from __future__ import annotations

import math
from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from record_programs import M2, SIZES, JointGaussian, gaussian_data, m2_data
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import Record
from pyro_vae.evaluation.subsets import ConditionalLogLikelihood
from pyro_vae.objectives.elbo import ELBO
from pyro_vae.programs.columns import packed
from pyro_vae.programs.contract import admit

LEVEL = 1e-4  # false alarms of a test of z-scores


def require_standard(z: Tensor) -> None:
    """Fail unless z-scores have mean 0 and variance at most 1, at LEVEL: errors may be too large, and not too small."""
    n = len(z)
    assert abs(float(z.mean())) * math.sqrt(n) < 3.9, float(z.mean())
    high = n + 3.72 * math.sqrt(2 * n) + 10  # beyond the 1 - LEVEL quantile of chi-squared with n degrees of freedom
    assert float(z.square().sum()) < high, float(z.square().mean())


@pytest.mark.parametrize("draws", [pytest.param(False, marks=pytest.mark.slow), True])
def test_linear_gaussian_columns_with_holes(draws: bool) -> None:
    """log p of what is present of 500 rows, and of some columns given others, within their errors of the closed form."""
    program = JointGaussian(draws=draws)
    record, values, known = gaussian_data(program, 500)
    found = pv.log_likelihood(program, record, num_samples=200, seed=3)
    truth = program.log_prob(values, known)
    off = found.log_likelihood - found.bias - truth
    assert found.mc_se.min() > 0
    require_standard(off / found.mc_se)
    of, given = ("a", "c"), ("b",)
    some = pv.log_likelihood(program, record, of=of, given=given, num_samples=200, seed=3)
    assert isinstance(some, ConditionalLogLikelihood)
    assert some.error == "quadrature"
    only_b = known.clone()
    only_b[:, :2] = only_b[:, 5:] = False
    truth = program.log_prob(values, known) - program.log_prob(values, only_b)
    some_there = record.present["a"] | record.present["c"]
    assert bool((some.log_likelihood[~some_there] == 0).all())
    require_standard(((some.log_likelihood - some.bias - truth) / some.mc_se)[some_there])
    alone = pv.log_likelihood(program, record, of="b", num_samples=200, seed=3)
    require_standard((alone.log_likelihood - alone.bias - program.log_prob(values, only_b)) / alone.mc_se)


def test_a_record_of_one_column_is_the_tensor_to_the_bit() -> None:
    """The same numbers, whether x is a tensor or a record that has it as its one column."""

    class Plain(nn.Module):
        def __init__(self, name: str | None) -> None:
            super().__init__()
            self.name = name

        def data(self, x: Tensor) -> Tensor:
            return x if self.name is None else x[self.name]  # type: ignore[call-overload, no-any-return]

        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample(
                    "image", dist.Normal(z.sum(-1, keepdim=True), 4 * torch.ones(4)).to_event(1), obs=self.data(x)
                )

        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0.05 * self.data(x)[..., :2], 1.1).to_event(1))

    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    bare = pv.log_likelihood(Plain(None), x, num_samples=50)
    found = pv.log_likelihood(Plain("image"), {"image": x}, num_samples=50)
    assert torch.equal(bare.log_likelihood, found.log_likelihood)
    assert torch.equal(bare.mc_se, found.mc_se)


def by_hand(program: M2, record: Record, z: Tensor) -> tuple[Tensor, Tensor]:
    """log sum_s p(x, s, z_s) / q(z_s | x, s), and the ELBO, of each row ``(N,)``, with z ``(states, N, 2)`` as noise."""
    image, there = record["image"], record.present
    weights, elbos = [], []
    styles = (0.0, 1.0) if program.style else (None,)
    for row in range(len(record)):
        terms, chances = [], []
        for s, (label, style) in enumerate(product(range(3), styles)):
            if bool(there["label"][row]) and label != int(record["label"][row]):
                continue
            if style is not None and bool(there["style"][row]) and style != float(record["style"][row]):
                continue
            # a row that has the value of a site takes the noise of the first of its states
            first = [0 if bool(there["label"][row]) else label]
            first += [] if style is None else [0 if bool(there["style"][row]) else int(style)]
            s = first[0] if style is None else 2 * first[0] + first[1]
            log_p = program.prior.log_softmax(0)[label]
            logits = program.of_label[label]
            log_q = torch.zeros((), dtype=torch.float64)
            if not bool(there["label"][row]):
                log_q = log_q + (image[row] @ program.classifier).log_softmax(0)[label]
            if style is not None:
                bit = torch.tensor(style, dtype=torch.float64)
                log_p = log_p + dist.Bernoulli(logits=program.from_class[label]).log_prob(bit)
                logits = logits + style * program.of_style[0]
                if not bool(there["style"][row]):
                    of_bit = image[row] @ program.styles + program.from_class[label]
                    log_q = log_q + dist.Bernoulli(logits=of_bit).log_prob(bit)
            q = dist.Normal(0.2 * (image[row] @ program.encoder + program.of_class[label]), 1.1)
            draw = q.mean + 1.1 * z[s, row]
            log_p = log_p + dist.Normal(0.0, 1.0).log_prob(draw).sum()
            log_p = log_p + dist.Bernoulli(logits=logits + draw @ program.decoder).log_prob(image[row]).sum()
            terms.append(log_p - q.log_prob(draw).sum())
            chances.append(log_q)
        weights.append(torch.stack(terms).logsumexp(0))
        elbos.append(sum((c.exp() * (t - c) for c, t in zip(chances, terms, strict=True)), torch.zeros(())))
    return torch.stack(weights), torch.stack(elbos)  # type: ignore[arg-type]


@pytest.mark.parametrize("style", [False, True])
def test_discrete_columns_by_brute_force(style: bool) -> None:
    """M2, labels present, missing and mixed: weights, loss and every gradient equal the sum over states done by hand."""
    program, record = M2(style), m2_data(6, style)
    x = packed(program, record)
    admit(program, x)  # which says what is summed over
    states = 6 if style else 3
    with torch.random.fork_rng():
        torch.manual_seed(5)
        loss, surrogate = ELBO()(program, x)
        torch.manual_seed(5)
        z = torch.randn(states, 6, 2, dtype=torch.float64)
    weights, elbos = by_hand(program, record, z)
    assert float((loss + elbos.mean().detach()).abs()) < 1e-9
    ours = torch.autograd.grad(surrogate, list(program.parameters()), allow_unused=True)
    theirs = torch.autograd.grad(-elbos.mean(), list(program.parameters()), allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or float((a - b).abs().max()) < 1e-9
    del weights


def test_weights_sum_over_states() -> None:
    """log p of few draws is the sum over states of the ratio, done by hand with the same draws; of many, the truth."""
    from pyro_vae.evaluation.weights import weigh

    program, record = M2(), m2_data(6)
    x = packed(program, record)
    admit(program, x)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        log_weight = weigh(program, x, None, 1)[0]
        torch.manual_seed(5)
        z = torch.randn(3, 6, 2, dtype=torch.float64)
    assert float((log_weight[0] - by_hand(program, record, z)[0]).detach().abs().max()) < 1e-9
    # by quadrature over z, 61 x 61 points
    grid = torch.linspace(-6, 6, 61, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid)
    law = dist.Normal(0.0, 1.0).log_prob(points).sum(-1) + 2 * math.log(float(grid[1] - grid[0]))
    truth = []
    for row in range(6):
        labels = [int(record["label"][row])] if bool(record.present["label"][row]) else [0, 1, 2]
        logits = program.of_label[labels][:, None] + points @ program.decoder
        of_image = dist.Bernoulli(logits=logits).log_prob(record["image"][row]).sum(-1)
        truth.append((program.prior.log_softmax(0)[labels][:, None] + law + of_image).flatten().logsumexp(0))
    found = pv.log_likelihood(program, record, num_samples=4000)
    off = (found.log_likelihood - found.bias - torch.stack(truth).detach()) / found.mc_se
    assert float(off.abs().max()) < 4.5
    label = pv.log_likelihood(program, record, of="label", given="image", num_samples=4000)
    assert label.log_likelihood[~record.present["label"]].abs().max() == 0
    assert label.log_likelihood.max() <= 3 * label.mc_se.max()


def test_what_is_refused_by_name() -> None:
    """NaN that nobody calls missing, names of no column, functions that take no records, joint axes with missing elements."""
    program = JointGaussian()
    record, _, _ = gaussian_data(program, 8)
    with pytest.raises(pv.UserError, match=r"NaN or infinite values \(first in row 1"):
        Record({"a": torch.tensor([[1.0], [math.nan]])})
    assert Record({"a": torch.tensor([[1.0], [math.nan]])}, nan_is_missing=True).present["a"].tolist() == [True, False]
    with pytest.raises(pv.UserError, match="did you mean"):
        pv.log_likelihood(program, record, of="aa", given="b")
    with pytest.raises(pv.UserError, match="takes no records"):
        pv.traversals(program, record)  # type: ignore[arg-type]
    with pytest.raises(pv.UserError, match="no column 'c'"):
        pv.log_likelihood(program, {"a": record["a"], "b": record["b"]})
    assert SIZES


class Reading(nn.Module):
    """x ~ N(z, 1), of which entries are missing the more probably the larger they are: a model of what is missing."""

    def model(self, x: Record) -> None:
        """p(z) p(x | z) p(seen | x)."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            value = pyro.sample("value", dist.Normal(z, 1.0), obs=x["value"])
            pyro.sample("seen", dist.Bernoulli(logits=-value), obs=x["seen"])

    def guide(self, x: Record) -> None:
        """q(z | x)."""
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x["value"], 1.1))


def test_missing_entries_that_a_later_site_reads() -> None:
    """They are drawn from the site itself: log p(value, seen = 1) and log p(seen = 0) by quadrature."""
    value = torch.tensor([0.3, -1.0, 2.0, 0.0, 0.0, 0.5, 1.0, -2.0], dtype=torch.float64)
    seen = torch.tensor([1.0, 1, 1, 0, 0, 1, 0, 1], dtype=torch.float64)
    record = Record({"value": value, "seen": seen}, {"value": seen == 1})
    found = pv.log_likelihood(Reading(), record, num_samples=4000)
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    law = dist.Normal(0.0, math.sqrt(2.0))
    unseen = torch.log((law.log_prob(grid).exp() * torch.sigmoid(grid)).sum() * (grid[1] - grid[0]))
    there = law.log_prob(value) + nn.functional.logsigmoid(-value)
    truth = torch.where(seen == 1, there, unseen)
    assert float(((found.log_likelihood - found.bias - truth) / found.mc_se).abs().max()) < 4.5


def test_missing_entries_are_imputed_by_their_posterior() -> None:
    """Means of what is missing of 200 rows within their errors of the closed form; intervals of 90 % hold 90 % of the truth."""
    program = JointGaussian(draws=True)
    record, values, known = gaussian_data(program, 200)
    found = pv.impute(program, record, num_samples=500, num_draws=200, seed=1)
    mean, _ = program.posterior(values, known)
    truth = (mean @ program.weight.T + program.shift).detach().split([2, 3, 1], 1)
    z, inside = [], []
    for name, expected, actual in zip("abc", truth, values.split([2, 3, 1], 1), strict=True):
        missing = found.mc_se[name] > 0
        z.append(((found.mean[name] - expected) / found.mc_se[name])[missing])
        ends = found.interval(name, 0.9)
        inside.append(((ends[..., 0] <= actual) & (actual <= ends[..., 1]))[missing])
        assert torch.equal(found.mean[name][~missing], actual[~missing])
        assert torch.equal(found.draws[name][:, ~missing], actual[~missing].expand(200, -1))
    z, hits = torch.cat(z), torch.cat(inside).double()
    assert len(z) == int((~known).sum())
    assert float(z.square().mean()) < 1.5  # entries of a row share their draws
    assert abs(float(hits.mean()) - 0.9) < 3.9 * math.sqrt(0.9 * 0.1 / len(hits)) + 0.01


def test_missing_labels_are_imputed_by_bayes() -> None:
    """p(label | image) of M2 equals p(image, label) / p(image), and is 1 for a label that is present."""
    program, record = M2(), m2_data(6)
    found = pv.impute(program, record, num_samples=4000)
    joint = []
    for label in range(3):
        some = Record({"image": record["image"], "label": torch.full((6,), label)})
        joint.append(pv.log_likelihood(program, some, num_samples=4000).log_likelihood)
    truth = torch.stack(joint, 1).softmax(1)
    missing = ~record.present["label"]
    assert float((found.probability["label"] - truth)[missing].abs().max()) < 0.03
    assert torch.equal(found.probability["label"][~missing].argmax(1), record["label"][~missing])
    assert float(found.probability["label"][~missing].amax(1).min()) > 1 - 1e-9
    z = pv.encode(program, record)
    assert isinstance(z, dict)
    assert torch.equal(z["label"][~missing], record["label"][~missing])
