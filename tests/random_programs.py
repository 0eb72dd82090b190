"""Small Pyro programs of every kind, with one thing unusual or wrong about each.

A :class:`Declared` says what a program is made of; :class:`Drawn` is the program, which remembers what it was called with and
what its guide drew. :mod:`plain_reference` computes what is right for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.functional import softplus

SUPPORTS = {
    "real": ("normal", "student"),
    "positive": ("gamma", "lognormal", "half"),
    "unit": ("beta",),
    "bits": ("bernoulli",),
    "classes": ("categorical",),
    "counts": ("poisson",),
}
SUPPORT_OF = {family: support for support, families in SUPPORTS.items() for family in families}
DISCRETE = ("bernoulli", "categorical", "poisson")
PATHWISE = ("normal", "lognormal", "half", "student")  # whose noise is found again from a draw


@dataclass(frozen=True)
class Site:
    """A latent: the families of prior and guide, its number of elements (None: a number), how the prior's batch is written."""

    prior: str
    guide: str
    width: int | None
    batch: str  # exact, none or one: (rows,), () or (1,)

    @property
    def shape(self) -> tuple[int, ...]:
        return () if self.width is None else (self.width,)

    @property
    def size(self) -> int:
        return self.width or 1


@dataclass(frozen=True)
class Declared:
    """What a program is made of; ``twist`` is one thing that is unusual about it, or wrong."""

    rows: int
    event: tuple[int, ...]
    flat: bool
    likelihood: str
    sites: tuple[Site, ...]
    chained: bool
    dtype: torch.dtype
    data_dtype: torch.dtype
    tensors: str  # trained, frozen (in part) or buffers
    y: str  # none, optional or required
    y_given: bool
    twist: str
    seed: int

    @property
    def size(self) -> int:
        return math.prod(self.event)

    def data(self) -> tuple[Tensor, Tensor | None]:
        """x and y."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = (self.rows, *self.event)
        if self.likelihood in DISCRETE:
            x = torch.randint(2, shape, generator=generator).to(self.data_dtype)
        else:
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            x = (x * (3 if self.data_dtype == torch.int64 else 1)).to(self.data_dtype)
        if self.twist == "missing value" and x.is_floating_point():
            x[-1] = math.nan
        if self.twist == "outside the support" and x.is_floating_point():
            x[-1] = -1.5
        y = torch.randint(3, (self.rows,), generator=generator)
        return x, y if self.y != "none" and (self.y_given or self.y == "required") else None


def law(family: str, a: Tensor, library: Any) -> Any:
    """The distribution of a family with the real numbers ``a`` as its parameters, of Pyro's or of torch's."""
    if family == "normal":
        return library.Normal(a, torch.full_like(a, 0.8))
    if family == "student":
        return library.StudentT(torch.full_like(a, 7.0), a, torch.full_like(a, 0.9))
    if family == "gamma":
        return library.Gamma(softplus(a) + 1, torch.full_like(a, 1.5))
    if family == "lognormal":
        return library.LogNormal(a, torch.full_like(a, 0.6))
    if family == "half":
        return library.HalfNormal(softplus(a) + 0.5)
    if family == "beta":
        return library.Beta(softplus(a) + 1, torch.full_like(a, 2.0))
    if family == "bernoulli":
        return library.Bernoulli(logits=a)
    if family == "categorical":
        return library.Categorical(logits=torch.stack([a, torch.zeros_like(a), -a], -1))
    return library.Poisson(softplus(a) + 0.3)


class Drawn(nn.Module):
    """The program, as its user would write it, with its twist."""

    def __init__(self, declared: Declared) -> None:
        super().__init__()
        self.declared = d = declared
        self.calls: list[tuple[Tensor, Tensor | None, dict[str, Tensor]]] = []  # of the guide: x, y and what it drew
        self.generated: list[Tensor] = []  # the latents of the model's last call
        generator = torch.Generator().manual_seed(d.seed)
        names = {"bias": (d.size,)}
        for j, site in enumerate(d.sites):
            names |= {f"prior{j}": site.shape, f"encoder{j}": (d.size, site.size), f"decoder{j}": (site.size, d.size)}
        for i, (name, shape) in enumerate(names.items()):
            value = 0.4 * torch.randn(shape, generator=generator, dtype=torch.float64).to(d.dtype)
            if d.tensors == "buffers":
                self.register_buffer(name, value)
            else:
                setattr(self, name, nn.Parameter(value, requires_grad=d.tensors == "trained" or i % 2 == 0))
        self.event_shape = d.event

    # what the twists do is said here, where a reader can compare it with the plain program

    def model_(self, x: Tensor, y: Tensor | None) -> None:
        d, twist = self.declared, self.declared.twist
        size = 3 if twist == "subsampled" else None
        if twist == "param store":
            pyro.param("stray", torch.ones(()))
        if twist == "outside the plate":
            pyro.sample("global", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", x.shape[0], dim=-1, subsample_size=None if size is None else min(size, len(x) - 1)):
            values: list[Tensor] = []
            for j, site in enumerate(d.sites):
                a = self._real(getattr(self, f"prior{j}"), values, y, site)
                if not (d.chained and values) and y is None:
                    a = {"exact": a.expand(len(x), *site.shape), "one": a[None], "none": a}[site.batch]
                if twist == "prior reads x":
                    a = a + x.reshape(len(x), -1).mean(1).reshape(-1, *[1] * len(site.shape))
                with poutine.mask(mask=self._rows(y) if twist == "latent mask" else True):
                    values.append(pyro.sample(f"z{j}", law(site.prior, a, dist).to_event(len(site.shape))))
            self.generated = [v.detach() for v in values]
            if twist == "factor":
                pyro.factor("bonus", -0.1 * self._total(values, x) ** 2)
            if twist == "factor of x":
                pyro.factor("bonus", -0.1 * (x.reshape(len(x), -1).sum(1) - self._total(values, x)) ** 2)
            if twist == "deterministic":
                pyro.deterministic("total", self._total(values, x))
            if twist == "second plate":
                with pyro.plate("again", 2, dim=-2):
                    pyro.sample("more", dist.Normal(x.new_zeros(()), 1.0))
            if twist == "second observation":
                pyro.sample("w", dist.Normal(self._total(values, x), 1.0), obs=x.reshape(len(x), -1).sum(1))
            seen = self._rows(y) if twist == "row mask" else True
            with poutine.scale(scale=2.0 if twist == "scale" else 1.0), poutine.mask(mask=seen):
                pyro.sample(
                    "x", self._likelihood(x, y, values), obs=self._observed(x) if twist != "no observation" else None
                )

    def _likelihood(self, x: Tensor, y: Tensor | None, values: list[Tensor]) -> Any:
        d, twist = self.declared, self.declared.twist
        loc = self.bias
        for j, value in enumerate(values):
            z = value.to(d.dtype).flatten(value.dim() - len(d.sites[j].shape)) if d.sites[j].width else value[..., None]
            loc = loc + z.to(d.dtype) @ getattr(self, f"decoder{j}")
        if y is not None:
            loc = loc + 0.2 * y.to(d.dtype)[:, None]
        if loc.dim() == 1 and twist != "constant of one row":
            loc = loc.expand(len(x), d.size)
        if twist == "model reads x":
            loc = loc + 0.5 * x.reshape(len(x), -1)
        if twist == "model reads the mean of x":
            loc = loc + 0.5 * x.mean()
        if twist == "rows coupled" and loc.dim() > 1:
            loc = loc - loc.mean(-2, keepdim=True)
        if twist == "coupled by y" and y is not None:
            loc = loc + y.to(d.dtype).mean()
        if twist == "rows across" and y is not None:  # (rows, 1, 1) where (rows, 1) was meant
            loc = loc + y.to(d.dtype)[:, None, None]
        if twist == "place of a row":
            loc = loc + 0.1 * torch.arange(len(x), dtype=d.dtype)[:, None]
        if twist == "number of rows":
            loc = loc * len(x)
        if twist == "hidden noise":
            loc = loc + torch.randn_like(loc)
        if twist == "one element for all":
            loc = loc[..., :1]
        elif not d.flat or d.event == ():
            loc = loc.reshape(*loc.shape[:-1], *d.event)
        axes = 1 if (d.flat and d.event) or twist == "one element for all" else len(d.event)
        if twist == "axis too many":
            return law(d.likelihood, loc.unsqueeze(-axes - 1), dist).to_event(axes + 1)
        fn = law(d.likelihood, loc, dist)
        if twist == "element mask":
            fn = fn.mask(torch.arange(d.size).reshape(loc.shape[loc.dim() - axes :]) % 2 == 0)
        return fn.to_event(axes - 1 if twist == "axis too few" else axes)

    def _observed(self, x: Tensor) -> Tensor:
        twist, seen = self.declared.twist, x.reshape(len(x), -1) if self.declared.flat and self.declared.event else x
        if twist == "transposed observation":
            return seen.mT
        if twist == "observation of other units":
            return 1 - seen
        if twist == "observation of the first row":
            return seen[:1].expand_as(seen)
        return seen

    def guide_(self, x: Tensor, y: Tensor | None) -> None:
        d, twist = self.declared, self.declared.twist
        drawn: dict[str, Tensor] = {}
        with pyro.plate("data", x.shape[0], dim=-1):
            values: list[Tensor] = []
            for j, site in enumerate(d.sites):
                a = (x.reshape(len(x), -1) @ getattr(self, f"encoder{j}")).reshape(len(x), *site.shape)
                a = self._real(a, values, y, site)
                first = j == 0
                if first and twist == "guide couples rows":
                    a = a - 2 * a.mean(-1 - len(site.shape), keepdim=True)
                if first and twist == "hidden noise in the guide":
                    a = a + torch.randn_like(a)
                if first and twist in ("change of variables", "wrong Jacobian"):
                    own = pyro.sample("a", dist.Normal(a, 1.0).to_event(len(site.shape)), infer={"is_auxiliary": True})
                    det = site.size * math.log(2.0) * (-1 if twist == "change of variables" else 1)
                    drawn["a"] = own
                    fn: Any = dist.Delta(2 * own, log_density=own.new_full(own.shape, det / site.size))
                elif first and twist == "point":
                    fn = dist.Delta(a)
                else:
                    fn = law(site.guide, a, dist)
                if first and twist == "auxiliary noise":
                    pyro.sample("a", dist.Normal(a, 1.0).to_event(len(site.shape)), infer={"is_auxiliary": True})
                if first and twist == "guide of one element":
                    fn = law(site.guide, a[..., :1], dist)
                if first and twist == "missing in the guide":
                    values.append(a)
                    continue
                with poutine.mask(mask=self._rows(y) if twist == "latent mask" else True):
                    values.append(pyro.sample(f"z{j}", fn.to_event(len(site.shape))))
                drawn[f"z{j}"] = values[-1]
            if twist == "factor in the guide":
                pyro.factor("bonus", -0.1 * self._total(values, x) ** 2)
        self.calls.append((x, y, {n: v.detach() for n, v in drawn.items()}))

    def _real(self, a: Tensor, values: list[Tensor], y: Tensor | None, site: Site) -> Tensor:
        more: Any = 0.0
        if self.declared.chained and values:
            last = values[-1].to(self.declared.dtype)
            more = 0.3 * (last.sum(-1) if self.declared.sites[len(values) - 1].width else last)
        if y is not None:
            more = more + 0.2 * y.to(self.declared.dtype)
        return a + (more[..., None] if site.width and isinstance(more, Tensor) else more)

    def _total(self, values: list[Tensor], x: Tensor) -> Tensor:
        total = x.new_zeros(len(x))
        for value, site in zip(values, self.declared.sites, strict=True):
            total = total + (value.sum(-1) if site.width else value)
        return total

    def _rows(self, y: Tensor | None) -> Tensor | bool:
        return True if y is None else y > 0


class Unconditional(Drawn):
    def model(self, x: Tensor) -> None:
        self.model_(x, None)

    def guide(self, x: Tensor) -> None:
        self.guide_(x, None)


class Optional(Drawn):
    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        self.model_(x, y)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        self.guide_(x, y)


class Required(Drawn):
    def model(self, x: Tensor, y: Tensor) -> None:
        self.model_(x, y)

    def guide(self, x: Tensor, y: Tensor) -> None:
        self.guide_(x, y)


def program_of(declared: Declared) -> Drawn:
    return {"none": Unconditional, "optional": Optional, "required": Required}[declared.y](declared)
