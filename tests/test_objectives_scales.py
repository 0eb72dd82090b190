"""What masks and scales do in every objective: the law of Pyro's own ELBO, or a refusal by name."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vae import registry
from pyro_vae.errors import UserError
from pyro_vae.objectives.elbo import ELBO
from pyro_vae.seeding import generator, seeded

SEVERAL_DRAWS = ("iwae", "dreg", "renyi", "wake-sleep")
CONTINUOUS = [n for n in registry.names("objectives") if n != "enumerated-elbo"]


def objective(name: str, **options: Any) -> Any:
    return registry.get("objectives", name)(**registry.validate("objectives", name, options))


def rows() -> Tensor:
    return torch.randn(24, 2, dtype=torch.float64, generator=generator(8))


class Weighed(nn.Module):
    """z, then x, every part of model and guide under handlers of one's own."""

    def __init__(self, model: Any = None, guide: Any = None, shape: tuple[int, ...] = (2,), latent: Any = None) -> None:
        super().__init__()
        nothing = lambda x: poutine.scale(scale=1.0)  # noqa: E731
        self.of_model, self.of_guide, self.shape = model or nothing, guide or model or nothing, shape
        self.latent = latent or (lambda x: poutine.scale(scale=1.0))
        self.w, self.v = nn.Parameter(torch.tensor(0.7).double()), nn.Parameter(torch.tensor(0.4).double())

    def model(self, x: Tensor) -> None:
        with self.of_model(x), pyro.plate("data", len(x), dim=-1):
            with self.latent(x):
                z = pyro.sample("z", dist.Normal(x.new_zeros(self.shape), 1.0).to_event(len(self.shape)))
            loc = self.w * z if self.shape else self.w * z.unsqueeze(-1) * x.new_ones(2)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with self.of_guide(x), pyro.plate("data", len(x), dim=-1), self.latent(x):
            loc = self.v * (x if self.shape else x[:, 0])
            pyro.sample("z", dist.Normal(loc, 0.8 + 0 * self.v).to_event(len(self.shape)))


def evaluated(name: Any, program: Any, x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of the surrogate, with the same noise whatever the program's weights."""
    with seeded(3):
        loss, surrogate = (objective(name, **options) if isinstance(name, str) else name)(program, x)
    return loss, torch.stack(torch.autograd.grad(surrogate, [program.w, program.v]))


@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_scale_of_everything_scales_loss_and_gradient(name: str) -> None:
    """To rounding, so that a scale that was lost (2.93 of elbo beside 1.47 of iwae, once) cannot be missed."""
    options = {"free": 0.0} if name == "free-bits" else {}
    plain = evaluated(name, Weighed(), rows(), **options)
    scaled = evaluated(name, Weighed(lambda x: poutine.scale(scale=2.5)), rows(), **options)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(b, 2.5 * a, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [n for n in CONTINUOUS if n not in ("tc", "mmd")])
def test_a_scale_of_rows_weighs_them(name: str) -> None:
    """Rows of weight zero are as good as absent: what is left is the mean over the others, times their share."""
    options = {"free": 0.0} if name == "free-bits" else {}
    x = rows()
    weight = (torch.arange(24) < 12).double()
    program = Weighed(lambda x: poutine.scale(scale=weight))
    loss, gradient = evaluated(name, program, x, **options)
    other = torch.cat([x[:12], 100 * x[12:]])
    again, gradient_again = evaluated(name, program, other, **options)
    torch.testing.assert_close(loss, again)
    torch.testing.assert_close(gradient, gradient_again)
    assert float(loss) != 0


@pytest.mark.parametrize("name", CONTINUOUS)
def test_scales_that_differ_are_the_elbos_or_refused_by_name(name: str) -> None:
    program = Weighed(lambda x: poutine.scale(scale=2.0), lambda x: poutine.scale(scale=1.0))
    if name in SEVERAL_DRAWS:
        with pytest.raises(UserError, match=f"{name}.*'x' and 'z' have different scales|{name}.*different scales"):
            evaluated(name, program, rows())
        return
    loss, _ = evaluated(name, program, rows())
    torch.testing.assert_close(loss, evaluated(ELBO(), program, rows())[0])


MASKS: dict[str, Any] = {
    "by row": lambda x: poutine.mask(mask=x[:, 0] > 0),
    "everywhere": lambda x: poutine.mask(mask=False),
}


@pytest.mark.parametrize("shape", [(2,), ()])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["elbo", "analytic-elbo", "stl", "free-bits", "iwae", "mmd"])
def test_a_masked_latent_counts_nowhere(name: str, mask: str, shape: tuple[int, ...]) -> None:
    program, x = Weighed(latent=MASKS[mask], shape=shape), rows()
    options = {"iwae": {"num_particles": 1}, "free-bits": {"free": 0.0}}.get(name, {})
    if name == "mmd":
        with pytest.raises(UserError, match=r"'mmd' compares the draws.*'z' is masked"):
            evaluated(name, program, x)
        return
    with seeded(3):
        loss, surrogate = objective(name, **options)(program, x)
    with seeded(3):
        expected = ELBO()(program, x)[0]
    if name == "analytic-elbo":  # the KL of what is masked is none
        count = 0 if mask == "everywhere" else int((x[:, 0] > 0).sum())
        assert abs(float(loss - expected)) <= 4 * 0.8 * count / len(x)
        if count == 0:
            torch.testing.assert_close(loss, expected)
        return
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(surrogate.detach(), expected)  # to the draw


def test_free_bits_floors_masked_elements_by_themselves() -> None:
    """Masks in the distribution, by element; and a factor of the model, which was lost from what is minimised."""

    class Elements(Weighed):
        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                which = torch.tensor([True, False])
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).mask(which).to_event(1))
                pyro.factor("prefer", -z.square().sum(-1))
                pyro.sample("x", dist.Normal(self.w * z, 1.0).to_event(1), obs=x)

        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                which = torch.tensor([True, False])
                pyro.sample("z", dist.Normal(self.v * x, 0.8).mask(which).to_event(1))

    program, x = Elements(), rows()
    with seeded(3):
        loss, surrogate = objective("free-bits", free=0.0)(program, x)
    with seeded(3):
        expected, of_elbo = ELBO()(program, x)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        *(torch.autograd.grad(s, [program.w, program.v]) for s in (surrogate, of_elbo)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_analytic_kl_is_not_used_where_guide_and_model_weigh_a_latent_differently() -> None:
    """E[2 log p - log q] is not 2 KL, nor KL: the estimate is that of the ELBO, to the draw."""
    program = Weighed(lambda x: poutine.scale(scale=2.0), lambda x: poutine.scale(scale=1.0))
    loss, gradient = evaluated("analytic-elbo", program, rows())
    expected, expected_gradient = evaluated(ELBO(), program, rows())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("shape", [(2,), (), (2, 3)])
def test_mmd_takes_latents_of_any_shape(shape: tuple[int, ...]) -> None:
    class Shaped(Weighed):
        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(shape), 1.0).to_event(len(shape)))
                loc = self.w * z.reshape(*z.shape[: z.dim() - len(shape)], -1).sum(-1, keepdim=True)
                pyro.sample("x", dist.Normal(loc, 1.0).expand([*loc.shape[:-1], 2]).to_event(1), obs=x)

        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                loc = self.v * x[:, 0].reshape(-1, *[1] * len(shape)).expand(-1, *shape)
                pyro.sample("z", dist.Normal(loc, 0.8).to_event(len(shape)))

    loss, gradient = evaluated("mmd", Shaped(), rows())
    assert torch.isfinite(loss)
    assert bool(gradient.isfinite().all())
    near = evaluated("mmd", Shaped(), rows(), weight=0.0, alpha=1.0)
    assert not torch.equal(gradient, near[1])


class Bits(nn.Module):
    """A discrete latent that some rows do not have, and a scale of the whole."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.v = how, nn.Parameter(torch.tensor([0.5, -1.0]).double())

    def site(self, x: Tensor, fn: Any) -> Tensor:
        row = x[:, 0] > 0
        if self.how == "distribution":
            return pyro.sample("z", fn.to_event(1).mask(row))
        with poutine.mask(mask=row):
            return pyro.sample("z", fn.to_event(1))

    def model(self, x: Tensor) -> None:
        with poutine.scale(scale=3.0), pyro.plate("data", len(x), dim=-1):
            z = self.site(x, dist.Bernoulli(x.new_full((2,), 0.3)))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with poutine.scale(scale=3.0), pyro.plate("data", len(x), dim=-1):
            self.site(x, dist.Bernoulli(logits=self.v * x))


@pytest.mark.parametrize("how", ["row", "distribution"])
def test_the_enumerated_elbo_weighs_states_by_their_chance_masked_or_not(how: str) -> None:
    program, x = Bits(how), rows()
    with seeded(0):
        loss, _ = objective("enumerated-elbo")(program, x)
    expected = torch.zeros(len(x), dtype=torch.float64)
    q, p = dist.Bernoulli(logits=program.v * x), dist.Bernoulli(x.new_full((2,), 0.3))
    for state in ([0, 0], [0, 1], [1, 0], [1, 1]):
        z = torch.tensor(state).double().expand(len(x), 2)
        kl = torch.where(x[:, 0] > 0, (q.log_prob(z) - p.log_prob(z)).sum(-1), 0.0)
        expected = expected + q.log_prob(z).sum(-1).exp() * (dist.Normal(z, 1.0).log_prob(x).sum(-1) - kl)
    torch.testing.assert_close(loss, -3 * expected.mean().detach())
