"""Programs with columns, whose every density is known or can be added up by hand."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae import Record

SIZES = {"a": 2, "b": 3, "c": 1}  # numbers in the columns of JointGaussian


class JointGaussian(nn.Module):
    """z ~ N(0, I_2); a, b, c = W z + m + noise: the guide is the exact posterior of what is present, ``wide`` times as wide.

    With ``draws`` the guide has a site for the column c, which is then a latent where it is missing.
    """

    def __init__(self, wide: float = 1.2, draws: bool = False, seed: int = 0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        total = sum(SIZES.values())
        self.weight = nn.Parameter(torch.randn(total, 2, generator=random, dtype=torch.float64))
        self.shift = nn.Parameter(torch.randn(total, generator=random, dtype=torch.float64))
        self.scale = 0.7
        self.wide, self.draws = wide, draws

    def model(self, x: Record) -> None:
        """p(z) p(a | z) p(b | z) p(c | z)."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.shift.new_zeros(2), 1.0).to_event(1))
            means = (z @ self.weight.T + self.shift).split(list(SIZES.values()), -1)
            for name, mean in zip(SIZES, means, strict=True):
                pyro.sample(name, dist.Normal(mean, self.scale).to_event(1), obs=None if name == "c" else x[name])

    def guide(self, x: Record) -> None:
        """q(z | what is present), and q(c | z)."""
        values = torch.cat([x[name] for name in SIZES], 1)
        known = torch.cat([x.present[n].reshape(len(x), -1).expand(len(x), size) for n, size in SIZES.items()], 1)
        mean, precision = self.posterior(values, known)
        with pyro.plate("data", len(x)):
            tril = torch.linalg.cholesky(torch.linalg.inv(precision)) * self.wide
            z = pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=tril))
            if self.draws:
                own = (z @ self.weight.T + self.shift)[..., -1:]
                pyro.sample("c", dist.Normal(own, self.scale * self.wide).to_event(1))

    def posterior(self, values: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(N, 2)`` and precision ``(N, 2, 2)`` of z given the numbers ``(N, 6)`` that are known."""
        w = self.weight.detach() * known[..., None].to(self.weight.dtype) / self.scale
        precision = torch.eye(2, dtype=w.dtype) + w.mT @ w
        off = torch.where(known, values - self.shift.detach(), 0.0) / self.scale
        return torch.linalg.solve(precision, (w.mT @ off[..., None]))[..., 0], precision

    def log_prob(self, values: Tensor, known: Tensor) -> Tensor:
        """Log p ``(N,)`` of the numbers ``(N, 6)`` that are known, in closed form."""
        covariance = self.weight @ self.weight.T + self.scale**2 * torch.eye(len(self.weight), dtype=self.weight.dtype)
        there = known[:, :, None] & known[:, None]
        law = dist.MultivariateNormal(
            torch.where(known, self.shift, values), torch.where(there, covariance, torch.eye(6, dtype=values.dtype))
        )
        missing = (~known).sum(1) * 0.5 * math.log(2 * math.pi)  # of unit normals at their means
        return (law.log_prob(values) + missing).detach()


def gaussian_data(program: JointGaussian, rows: int, seed: int = 1) -> tuple[Record, Tensor, Tensor]:
    """A record with holes, by row and by element; its numbers ``(N, 6)`` and which of them are known."""
    random = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, 2, generator=random, dtype=torch.float64)
    noise = torch.randn(rows, 6, generator=random, dtype=torch.float64)
    values = (z @ program.weight.T + program.shift + program.scale * noise).detach()
    known = torch.rand(rows, 6, generator=random) < 0.8
    a_there, c_there = (torch.rand(rows, generator=random) < 0.7 for _ in range(2))
    known[:, :2] = a_there[:, None]
    known[:, 5] = c_there
    a, b, c = values.split(list(SIZES.values()), 1)
    return Record({"a": a, "b": b, "c": c}, {"a": a_there, "b": known[:, 2:5], "c": c_there}), values, known


class M2(nn.Module):
    """p(label) p(z) p(image | label, z) over six bits: M2 of Kingma et al. 2014; with ``style`` a second discrete site."""

    def __init__(self, style: bool = False, seed: int = 0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        draw = lambda *shape: nn.Parameter(torch.randn(*shape, generator=random, dtype=torch.float64))  # noqa: E731
        self.style = style
        self.prior, self.decoder, self.of_label, self.of_style = draw(3), draw(2, 6), draw(3, 6), draw(2, 6)
        self.classifier, self.encoder, self.of_class = draw(6, 3), draw(6, 2), draw(3, 2)
        self.styles, self.from_class = draw(6), draw(3)

    def model(self, x: Record) -> None:
        """p(label) p(style | label) p(z) p(image | ...)."""
        with pyro.plate("data", len(x)):
            label = pyro.sample("label", dist.Categorical(logits=self.prior))
            logits = self.of_label[label]
            if self.style:
                style = pyro.sample("style", dist.Bernoulli(logits=self.from_class[label]))
                logits = logits + style[..., None] * self.of_style[0]
            z = pyro.sample("z", dist.Normal(self.prior.new_zeros(2), 1.0).to_event(1))
            pyro.sample("image", dist.Bernoulli(logits=logits + z @ self.decoder).to_event(1), obs=x["image"])

    def guide(self, x: Record) -> None:
        """q(label | image) q(style | image, label) q(z | image, label)."""
        image = x["image"]
        with pyro.plate("data", len(x)):
            label = pyro.sample("label", dist.Categorical(logits=image @ self.classifier))
            if self.style:
                pyro.sample("style", dist.Bernoulli(logits=image @ self.styles + self.from_class[label]))
            mean = 0.2 * (image @ self.encoder + self.of_class[label])
            pyro.sample("z", dist.Normal(mean, 1.1).to_event(1))


def m2_data(rows: int, style: bool = False, seed: int = 2) -> Record:
    """Images of six bits; labels, and styles, of some rows."""
    random = torch.Generator().manual_seed(seed)
    image = torch.bernoulli(torch.full((rows, 6), 0.5, dtype=torch.float64), generator=random)
    columns: dict[str, Any] = {"image": image, "label": torch.randint(3, (rows,), generator=random)}
    present = {"label": torch.arange(rows) % 2 == 0}
    if style:
        columns["style"] = torch.bernoulli(torch.full((rows,), 0.5, dtype=torch.float64), generator=random)
        present["style"] = torch.arange(rows) % 3 == 0
    return Record(columns, present)
