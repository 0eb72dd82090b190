"""Programs as people write them for Pyro, one pattern each, and what is right for them: Pyro's own ELBO, and log p(x).

z ~ N(0, I) in two dimensions, x | z ~ N(W z, I) in four, W with orthogonal columns, so that the posterior is a product of
normals. The guide's scale has a free factor, at 1 of which weights are all p(x).
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

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


class CalledModel(pyro.nn.PyroModule):  # type: ignore[misc]
    """A model that is a PyroModule's call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(W.clone())

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(ZEROS, ONES).expand([len(x), 2]).to_event(1))
            pyro.sample("obs", dist.Normal(z @ self.weight, 1.0).to_event(1), obs=x)


class CalledGuide(pyro.nn.PyroModule):  # type: ignore[misc]
    """A guide that is one, with a constrained parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = pyro.nn.PyroParam(PRECISION.rsqrt(), dist.constraints.positive)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ W.T / PRECISION, self.scale).to_event(1))


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


def our_loss(program: Any, *args: Any, objective: str = "elbo") -> tuple[Tensor, Tensor]:
    with seeded(3):
        return _objective(Settings(objective=objective))(program, *args)  # type: ignore[arg-type, no-any-return]


def same_gradients(program: Any, theirs: Tensor, parameters: list[Tensor], surrogate: Tensor) -> None:
    expected = torch.autograd.grad(theirs, parameters, allow_unused=True)
    found = torch.autograd.grad(surrogate, list(program.parameters()), allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        assert (a is None or not a.any()) if b is None else torch.allclose(a, b, rtol=0, atol=1e-9)
