"""Each row stands for itself, observes itself, and lies where the model can be: what does not is refused, what does is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from contract_programs import DOORS, made, rows
from one_latent import OneLatent, X, exact
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.errors import ProgramError, UserError
from pyro_vae.seeding import seeded

noise = lambda t: t + 0.5 * torch.randn_like(t)  # noqa: E731


def decoded(change: Callable[[Tensor], Tensor]) -> Any:
    """A program whose decoder's output ``(*leading, rows, 4)`` is changed."""
    return made("Changed", likelihood=lambda s, loc: dist.Normal(change(loc), 1.0).to_event(1))


def encoded(change: Callable[[Tensor], Tensor]) -> Any:
    """A program whose guide sees changed data ``(rows, 4)``."""

    def guide(self: Any, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.posterior(change(x)))

    return made("Changed", guide=guide)


COUPLED: list[tuple[Any, str]] = [
    (decoded(lambda loc: loc - loc.mean(-2, keepdim=True)), "model: .*depends on the other rows"),
    (decoded(lambda loc: loc.softmax(-2)), "model: .*depends on the other rows"),
    (decoded(lambda loc: loc / loc.shape[-2]), "model: .*order or number"),
    (decoded(lambda loc: loc + torch.arange(loc.shape[-2], dtype=loc.dtype)[:, None]), "model: .*order or number"),
    (decoded(lambda loc: loc.cumsum(-2)), "model: .*depends on the other rows"),
    (decoded(noise), "model: .*another at every run: random numbers are drawn outside of pyro.sample"),
    (encoded(lambda x: (x - x.mean(0)) / x.std(0)), "guide: .*depends on the other rows"),
    (encoded(lambda x: x.flip(0)), "guide: .*depends on the other rows"),
    (encoded(noise), "guide: .*another at every run"),
]


# The examination behind every door is one (test_examination.py): every case at one of them, one case at each.
REFUSED = [
    pytest.param(case, door, marks=[] if door == "encode" or case == 0 else pytest.mark.slow)
    for case in range(len(COUPLED))
    for door in ("fit", "log_likelihood", "encode", "annealing")
]


@pytest.mark.parametrize(("case", "door"), REFUSED)
def test_rows_that_depend_on_others_are_refused(case: int, door: str) -> None:
    program, words = COUPLED[case]
    with pytest.raises(ProgramError, match=words):
        DOORS[door](program, rows(4))


def test_statistics_that_are_kept_are_no_other_rows() -> None:
    """BatchNorm reads the batch while it trains; elsewhere it has numbers of its own, and a row is its own."""
    with seeded(0):
        encoder = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        program = pv.build("ppca", "linear", (4,), latent_dim=2, encoder=encoder)
    x = rows(4, n=40).float()
    pv.fit(program, x, steps=3, batch_size=20)
    whole, part = pv.encode(program, x), pv.encode(program, x[:3])
    torch.testing.assert_close(part, whole[:3])  # type: ignore[index]


@pytest.mark.parametrize(
    ("observed", "refused"),
    [
        (lambda s, x: 2 * x, True),
        (lambda s, x: x - x.mean(), True),
        (lambda s, x: (x > 0).to(x), True),
        (lambda s, x: x[:1].expand_as(x), True),
        (lambda s, x: x.flip(-1), True),
        (lambda s, x: x.clamp(-50, 50), False),
        (lambda s, x: x + 1e-6, False),
        (lambda s, x: x.clone().flatten(1), False),
    ],
)
def test_what_is_observed_is_x(observed: Any, refused: bool) -> None:
    program = made("Observing", observed=observed)
    for door in ("fit", "log_likelihood", "encode"):
        if refused:
            with pytest.raises(ProgramError, match=r"where the data hold .*write obs=x"):
                DOORS[door](program, rows(4))
        else:
            DOORS[door](program, rows(4))


def test_a_mean_of_zero_does_not_hide_a_model_that_reads_it() -> None:
    x = torch.tensor([[1.0, -1.0, 2.0, -2.0]], dtype=torch.float64)

    def model(self: Any, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.decoder + x.mean(), 1.0).to_event(1), obs=x)

    with pytest.raises(ProgramError, match="reads x"):
        pv.log_likelihood(made("Reader", model=model), x, num_samples=30)


def test_samples_and_decoded_data_are_of_a_model_that_keeps_to_the_contract() -> None:
    def leaking(self: Any, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.decoder + x, 1.0).to_event(1), obs=x)

    for program, words in (
        (made("Reader", model=leaking), "reads x"),
        (COUPLED[0][0], "depends on the other rows"),
        (made("Scaled", observed=lambda s, x: 2 * x), "write obs=x"),
        (made("Broken", likelihood=lambda s, loc: loc @ loc), "does not run on data"),
    ):
        for call in (
            lambda p=program: pv.sample(p, 5, event_shape=(4,)),
            lambda p=program: pv.decode(p, torch.zeros(3, 2), event_shape=(4,)),
        ):
            with pytest.raises(UserError, match=words) as caught:
                call()
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("guide", "prior", "words"),
    [
        (exact, lambda x: dist.Exponential(x.new_ones(())), "Exponential does not look"),
        (lambda x: dist.Gamma(x[:, 0].abs() + 1, 1.0), lambda x: dist.Poisson(x.new_ones(())), "continuous"),
        (exact, lambda x: dist.Categorical(logits=x.new_zeros(3)), "continuous|no log_prob at what was drawn"),
    ],
)
def test_latents_are_not_trained_where_the_model_cannot_be(guide: Any, prior: Any, words: str) -> None:
    with pytest.raises(ProgramError, match=words):
        pv.fit(OneLatent(guide, prior=prior), X, steps=1)


def test_bits_of_a_guide_are_summed_under_class_numbers() -> None:
    """log p(x) = log of the mean of N(x; z, 1) over z = 0, 1, 2, though the guide draws 0 and 1, as floats, alone."""
    program = OneLatent(lambda x: dist.Bernoulli(0.5 + 0 * x[:, 0]), prior=lambda x: dist.Categorical(x.new_ones(3)))
    found = pv.log_likelihood(program, X, num_samples=30)
    each = torch.stack([dist.Normal(float(z), 1.0).log_prob(X[:, 0]) for z in range(3)])
    torch.testing.assert_close(found.log_likelihood, each.logsumexp(0) - torch.tensor(3.0).double().log())
