"""Programs as people write them for Pyro, made of small pieces: plates, names, networks, masks, latents, observations.

A :class:`Written` says which pieces, :class:`Pieces` has the tensors, the model and the guide that are made of them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from random import Random
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vae.seeding import seeded

LATENTS = {
    "scalar": 1,
    "vector": 2,
    "positive": 2,
    "gamma": 2,
    "bits": 2,
    "class": 3,
    "one-hot": 3,
}  # numbers of parameters
NETWORKS: dict[str, Callable[..., Tensor]] = {
    "matmul": lambda z, w, rows: z @ w,
    "tanh": lambda z, w, rows: torch.tanh(z) @ w,
    "view": lambda z, w, rows: z.view(rows, -1) @ w,
    "cat": lambda z, w, rows: torch.cat([z, z.new_ones(rows, 1)], 1)[:, :-1] @ w,
    "einsum": lambda z, w, rows: torch.einsum("ni,ij->nj", z, w),
    "columns": lambda z, w, rows: sum(z[:, i : i + 1] * w[i] for i in range(len(w))),  # type: ignore[return-value]
    "loop": lambda z, w, rows: torch.stack([z[i] @ w for i in range(rows)]),
    "bmm": lambda z, w, rows: torch.bmm(z[:, None], w.expand(rows, *w.shape))[:, 0],
    "convolution": lambda z, w, rows: nn.functional.conv_transpose1d(z.unsqueeze(-1), w.unsqueeze(1)).squeeze(1),
    "BatchNorm": lambda z, w, rows: nn.functional.batch_norm(z @ w, w.new_full(w.shape[1:], 0.1), w.new_full(w.shape[1:], 2.0)),
    "GRU": lambda z, w, rows: z @ w,  # and the output of one
}  # fmt: skip
ARGUMENTS = {  # their names in order, and which of them is the data
    "x": ("x", None),
    "data alone": ("minibatch", None),
    "x, y": ("x, y", None),
    "x, ys=None": ("x, ys=None", None),
    "labels, x": ("labels, x", "x"),
    "context, x": ("context, x", "x"),
    "x, *, context": ("x, *, context", None),
    "x, context, y": ("x, context, y", None),
    "x=None, context": ("context, x=None", "x"),
    "x, shift=0.0": ("x, shift=0.0", None),
    "**anything": ("**anything", "docs"),
    "*anything": ("*anything", None),
}
PLATES = ("data", "named", "sized at -1", "unsized", "none", "subsample", "subsample_size")
OWNERS = ("module", "module adopted", "param", "param", "pyro.module", "PyroParam")
LEGAL = (
    "none", "weighted", "factor", "deterministic", "row mask", "element mask", "mask of ones", "reshaped", "conditioned",
)  # fmt: skip
ILLEGAL = (
    "rows coupled", "number of rows", "place of a row", "hidden noise", "guide couples rows", "a global latent",
    "factor in the guide", "model reads x", "a column observed", "observed twice", "another observed", "conditioned on latents",
    "missing in the guide", "a penalty for all",
)  # fmt: skip
UNSCALED = 1000  # rows that a subsampled plate speaks of


@dataclass(frozen=True)
class Written:
    """What a program is made of; ``twist`` is one thing that is unusual about it, or wrong."""

    rows: int
    width: int
    plate: str
    inner: str  # none, pixels at -1 (rows at -2), or pixels at -2
    site: str
    latents: tuple[tuple[str, str], ...]  # names and families
    chained: bool
    decoder: str
    encoder: str
    owner: str
    arguments: str
    likelihood: str
    dtype: torch.dtype
    twist: str
    seed: int

    def called(self, name: str) -> str:
        """What ``pyro.param`` calls a tensor: in every other program as torch calls what it has itself."""
        hard = {"scale": "type", "decoder": "a.b", "encoder": "a/b"}
        return hard.get(name, name) if self.seed % 2 else f"{self.seed}.{name}"

    def data(self, rows: int | None = None, seed: int = 1) -> dict[str, Tensor]:
        """x, y and the context, by these names."""
        random, n = torch.Generator().manual_seed(self.seed + seed), rows or self.rows
        x = torch.randn(n, self.width, generator=random, dtype=torch.float64)
        y, context = torch.rand(n, generator=random) < 0.6, torch.randn(n, self.width, generator=random)
        x[:, 0] = torch.linspace(-1.0, 1.0, n)  # rows that are all the same hide that they are coupled
        x = (x > 0).to(self.dtype) if self.likelihood == "bernoulli" else x.to(self.dtype)
        return {"x": x, "y": y.long(), "context": context.to(self.dtype)}


def draw(random: Random) -> Written:
    """Any program whose pieces go together."""
    twist = random.choice([*["none"] * 8, *LEGAL, *ILLEGAL])
    inner = random.choice(["none", "none", "none", "pixels at -1", "pixels at -2"])
    plate = random.choice(PLATES if inner == "none" else ("data", "named", "subsample_size"))
    families = list(LATENTS) if inner != "pixels at -1" else ["vector", "positive", "bits"]
    labelled = [n for n, (names, _) in ARGUMENTS.items() if "y" in names.replace("anything", "") or "labels" in names]
    arguments = random.choice(
        labelled
        if twist in ("row mask", "conditioned on latents", "conditioned", "another observed")
        else list(ARGUMENTS)
    )
    names = random.sample(["z", "latent", "u", "code"], 2)
    return Written(
        rows=random.randint(2, 4),
        width=random.randint(2, 4),
        plate=plate,
        inner=inner,
        site=random.choice(["x", "obs", "image", "ys", "documents"]),
        latents=tuple((name, random.choice(families)) for name in names[: random.randint(1, 2)]),
        chained=random.random() < 0.5,
        decoder=random.choice([n for n in NETWORKS if inner == "none" or n != "loop"]),
        encoder=random.choice(["matmul", "tanh", "view", "BatchNorm", "GRU"]),
        owner=random.choice(OWNERS),
        arguments=arguments,
        likelihood=random.choice(["normal", "normal", "laplace", "bernoulli"]),
        dtype=random.choice([torch.float32, torch.float64, torch.float64]),
        twist=twist,
        seed=random.randrange(10**6),
    )  # fmt: skip


def law(family: str, a: Tensor) -> Any:
    """A latent's distribution with parameters ``a`` ``(..., numbers)``, of batch shape ``(...)``."""
    if family == "scalar":
        return dist.Normal(a[..., 0], 0.8)
    if family == "vector":
        return dist.Normal(a, 0.8).to_event(1)
    if family == "positive":
        return dist.LogNormal(a, 0.6).to_event(1)
    if family == "gamma":
        return dist.Gamma(nn.functional.softplus(a) + 1, 1.5).to_event(1)
    if family == "bits":
        return dist.Bernoulli(logits=a).to_event(1)
    return dist.Categorical(logits=a) if family == "class" else dist.OneHotCategorical(logits=a)


def flat(family: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """What a network sees of a latent's value, ``(..., numbers)``."""
    if family == "class":
        value = torch.nn.functional.one_hot(value, 3)
    return (value[..., None] if family == "scalar" else value).to(dtype)


class Pieces:
    """A program's tensors, and its model and guide of named arguments; ``drawn`` is what the guide drew, call by call."""

    def __init__(self, made: Written) -> None:
        self.made, self.drawn = made, list[dict[str, Tensor]]()
        random = torch.Generator().manual_seed(made.seed)
        size = sum(LATENTS[f] for _, f in made.latents)
        shapes = {"decoder": (size, made.width), "encoder": (made.width, size), "scale": ()}
        shapes |= {f"prior.{name}": (LATENTS[f],) for name, f in made.latents}
        self.values = {
            n: 0.5 * torch.randn(s, generator=random, dtype=torch.float64).to(made.dtype) for n, s in shapes.items()
        }
        self.values["scale"] = self.values["scale"].exp()
        with seeded(made.seed):
            self.up = nn.GRU(made.width, size, batch_first=True, dtype=made.dtype)
            self.down = nn.GRU(size, made.width, batch_first=True, dtype=made.dtype)

    def tensor(self, name: str) -> Tensor:
        positive = {"constraint": dist.constraints.positive} if name == "scale" else {}
        found: Tensor = pyro.param(self.made.called(name), lambda: self.values[name].clone(), **positive)
        return found

    def start(self, part: str) -> None:
        """What published programs begin with."""

    def rows(self, x: Tensor) -> AbstractContextManager[Any]:
        dim = {"pixels at -1": -2, "pixels at -2": -1, "none": None}[self.made.inner]
        size, name = len(x), {"named": "a minibatch"}.get(self.made.plate, "data")
        if self.made.plate == "none":
            return nullcontext()
        if self.made.plate == "unsized":
            return pyro.plate("rows")  # type: ignore[no-any-return]
        if self.made.plate.startswith("subsample"):
            how = {"subsample": x} if self.made.plate == "subsample" else {"subsample_size": size}
            return pyro.plate(name, UNSCALED, dim=dim, **how)  # type: ignore[no-any-return]
        return pyro.plate(name, size, dim=-1 if self.made.plate == "sized at -1" and dim is None else dim)  # type: ignore[no-any-return]

    def network(self, kind: str, value: Tensor, weight: Tensor, gru: nn.GRU) -> Tensor:
        found = NETWORKS[kind](value, weight, len(value))
        if kind == "GRU":
            found = found + gru(value[:, None].expand(len(value), 2, value.shape[-1]))[0].mean(1)
        return found

    def latent(self, name: str, family: str, a: Tensor) -> Tensor:
        fn = law(family, a)
        inside = self.made.inner == "pixels at -1"  # the latent's numbers are a plate, too
        with pyro.plate(f"numbers of {name}", LATENTS[family], dim=-1) if inside else nullcontext():
            found: Tensor = pyro.sample(name, fn.base_dist if inside else fn)
        return found

    def model(self, x: Tensor, y: Tensor | None = None, context: Tensor | None = None, shift: float = 0.0) -> None:
        made, twist, values = self.made, self.made.twist, list[Tensor]()
        self.start("model")
        if twist == "a global latent":
            pyro.sample("everyone", dist.Normal(x.new_zeros(()), 1.0))
        if twist == "a penalty for all":
            pyro.factor("penalty", -self.tensor("decoder").square().sum())
        with self.rows(x):
            for name, family in made.latents:
                a = self.tensor(f"prior.{name}").expand(len(x), LATENTS[family])
                if made.chained and values:
                    a = a + 0.3 * values[-1].sum(-1, keepdim=True)
                with poutine.scale(scale=0.5 if twist == "weighted" else 1.0):
                    values.append(flat(family, self.latent(name, family, a), made.dtype))
            loc = self.network(made.decoder, torch.cat(values, -1), self.tensor("decoder"), self.down) + shift
            loc = loc if y is None else loc + 0.2 * y.to(loc.dtype)[:, None]
            loc = loc if context is None else loc + context
            if twist == "factor":
                pyro.factor("bonus", -0.1 * loc.square().sum(-1, keepdim=made.inner == "pixels at -1"))
            if twist == "deterministic":
                pyro.deterministic("loc", loc, event_dim=1)
            self.observe(self.twisted(loc, x), x, y, values)

    def twisted(self, loc: Tensor, x: Tensor) -> Tensor:
        twist = self.made.twist
        if twist == "rows coupled":
            return loc - loc.mean(0)
        if twist == "number of rows":
            return loc * len(x)
        if twist == "place of a row":
            return loc + 0.1 * torch.arange(len(x), dtype=loc.dtype)[:, None]
        if twist == "hidden noise":
            return loc + torch.randn_like(loc)
        return loc + 0.5 * x if twist == "model reads x" else loc

    def likelihood(self, loc: Tensor) -> Any:
        if self.made.likelihood == "bernoulli":
            return dist.Bernoulli(logits=loc)
        return (dist.Normal if self.made.likelihood == "normal" else dist.Laplace)(loc, self.tensor("scale"))

    def observe(self, loc: Tensor, x: Tensor, y: Tensor | None, values: list[Tensor]) -> None:
        made, twist = self.made, self.made.twist
        if twist == "a column observed":
            loc, x = loc[:, :-1], x[:, :-1]
        if twist in ("another observed", "conditioned on latents", "conditioned"):
            seen = x.sum(-1) if y is None else y.to(x.dtype)
            fn = dist.Normal(values[0].sum(-1) if twist != "conditioned" else torch.zeros_like(seen), 1.0)
            pyro.sample("label", fn if made.inner != "pixels at -1" else dist.Normal(fn.loc[:, None], 1.0),
                        obs=seen if made.inner != "pixels at -1" else seen[:, None])  # fmt: skip
        fn = self.likelihood(loc)
        if twist == "element mask":
            fn = fn.mask(torch.arange(loc.shape[-1]) % 2 == 0)
        mask = True
        if twist == "row mask" and y is not None:
            mask = y > 0 if made.inner != "pixels at -1" else (y > 0)[:, None]
        elif twist == "mask of ones":
            mask = torch.ones(len(x), *([1] if made.inner == "pixels at -1" else []), dtype=torch.bool)
        with poutine.mask(mask=mask):
            if made.inner == "pixels at -1":
                with pyro.plate("pixels", loc.shape[-1], dim=-1):
                    pyro.sample(made.site, fn, obs=x)
            elif made.inner == "pixels at -2":
                turned = self.likelihood(loc.mT)
                if twist == "element mask":
                    turned = turned.mask((torch.arange(loc.shape[-1]) % 2 == 0)[:, None])
                with pyro.plate("pixels", loc.shape[-1], dim=-2):
                    pyro.sample(made.site, turned, obs=x.mT)
            else:
                pyro.sample(made.site, fn.to_event(1), obs=x.reshape(-1, x.shape[-1]) if twist == "reshaped" else x)
            if twist == "observed twice":
                more = {"pixels at -1": x.sum(-1, keepdim=True)}.get(made.inner, x.sum(-1))
                pyro.sample("again", dist.Normal(torch.zeros_like(more), 1.0), obs=more)

    def guide(self, x: Tensor, y: Tensor | None = None, context: Tensor | None = None, shift: float = 0.0) -> None:
        made, values, drawn = self.made, list[Tensor](), dict[str, Tensor]()
        self.start("guide")
        if made.twist == "a global latent":
            pyro.sample("everyone", dist.Normal(x.new_zeros(()), 1.0))
        a = self.network(made.encoder, x if context is None else x - context, self.tensor("encoder"), self.up)
        if made.twist == "guide couples rows":
            a = a - 2 * a.mean(0)
        sizes = [LATENTS[f] for _, f in made.latents]
        with self.rows(x):
            for (name, family), own in zip(made.latents, a.split(sizes, -1), strict=True):
                if made.chained and values:
                    own = torch.cat([own, values[-1].sum(1, keepdim=True)], 1)[:, :-1] + 0.2 * values[-1].sum(
                        -1, keepdim=True
                    )
                if made.twist == "missing in the guide" and name == made.latents[-1][0]:
                    continue
                with poutine.scale(scale=0.5 if made.twist == "weighted" else 1.0):
                    drawn[name] = self.latent(name, family, own)
                values.append(flat(family, drawn[name], made.dtype))
            if made.twist == "factor in the guide":
                pyro.factor("bonus", -0.1 * x.square().sum(-1, keepdim=made.inner == "pixels at -1"))
        self.drawn.append(drawn)
