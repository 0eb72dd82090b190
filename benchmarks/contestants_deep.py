"""Two layers of latents, and a convolutional model: who trains them in benchmarks/training.py, in PyTorch.

    z_L ~ N(0, I),   z_l | z_{l+1} and z_l | z_{l-1} normal by networks,   z_0 = x binary;   the ELBO of one draw, Adam

The networks are those of the declared model ``two-layer`` (Burda, Grosse & Salakhutdinov 2016, section 5.1, L = 2) and of the
blocks ``conv``. Those in JAX are in contestants_jax.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from contestants import COMPILED, LR, MIN_SCALE, PIXELS, PLAIN, SHAPE, binary_images
from turns import LeftOut, Turn


@dataclass(frozen=True)
class Deep:
    """A model of several networks: of the guide from x upwards, of the model from the top downwards.

    ``layers`` are the units of z1, z2, ...; ``hidden`` the widths of tanh layers between x and z1, z1 and z2, ...; where there
    are none, convolutions stand between x and z1.
    """

    batch: int
    layers: tuple[int, ...]
    hidden: tuple[tuple[int, ...], ...]
    only_on: str | None = None

    @property
    def label(self) -> str:
        """How a table names it."""
        if not self.hidden:
            return f"batch {self.batch}, 3x3 convolutions 32-64-64-64 and back, {self.layers[0]} latents, ReLU, ELBO"
        nets = "-".join(
            map(str, [PIXELS, *(n for h, z in zip(self.hidden, self.layers, strict=True) for n in (*h, z))])
        )
        return f"batch {self.batch}, {nets} and back, {len(self.layers)} layers, tanh, ELBO"


DEEP = {
    "two-layer": Deep(20, (100, 50), ((200, 200), (100, 100))),
    "convolutional": Deep(128, (32,), ()),
}


def networks(size: Deep) -> tuple[list[Any], list[Any]]:
    """What makes parameters of z1, z2, ... of x, z1, ...; and what makes logits, and parameters of z1, ..., of z1, z2, ..."""
    import torch
    from torch import nn

    def linear(fan_in: int, fan_out: int, normal: bool = False) -> nn.Linear:
        layer = nn.Linear(fan_in, fan_out)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
        if normal:
            with torch.no_grad():
                layer.bias[fan_out // 2 :] = math.log(math.expm1(1.0))
        return layer

    def dense(widths: list[int], normal: bool = True) -> nn.Sequential:
        parts = [part for i, o in pairwise(widths[:-1]) for part in (linear(i, o), nn.Tanh())]
        return nn.Sequential(*parts, linear(widths[-2], widths[-1], normal))

    if size.hidden:
        below = [PIXELS, *size.layers]
        up = [dense([below[i], *h, 2 * size.layers[i]]) for i, h in enumerate(size.hidden)]
        outs = [PIXELS, *(2 * n for n in size.layers)]
        down = [dense([size.layers[i], *h[::-1], outs[i]], i > 0) for i, h in enumerate(size.hidden)]
        return up, down
    (latents,) = size.layers
    head = nn.Conv2d(32, 1, 3, padding=1)
    nn.init.xavier_uniform_(head.weight)
    nn.init.zeros_(head.bias)
    encoder = nn.Sequential(
        *(nn.Unflatten(1, SHAPE), nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), linear(64 * 14 * 14, 32), nn.ReLU()),
        linear(32, 2 * latents, True),
    )
    decoder = nn.Sequential(
        *(linear(latents, 64 * 14 * 14), nn.ReLU(), nn.Unflatten(1, (64, 14, 14))),
        *(nn.ConvTranspose2d(64, 32, 3, stride=2, padding=1, output_padding=1), nn.ReLU(), head, nn.Flatten()),
    )
    return [encoder], [decoder]


def ours(size: Deep, device: str, rows: int, compile: str) -> Callable[[Turn], Any]:
    """``pv.fit`` itself, of declared models."""
    import warnings

    import torch

    import pyro_vae as pv
    from pyro_vae.capture import CaptureWarning

    warnings.simplefilter("error", CaptureWarning)
    if size.hidden:
        vae = pv.build("two-layer", "diagonal", SHAPE, encoder="mlp:hidden=[200,200],activation=tanh")
    else:
        vae = pv.build("mlp", "diagonal", SHAPE, latent_dim=size.layers[0], encoder="conv", decoder="conv")
    x = torch.from_numpy(binary_images(rows)).reshape(-1, *SHAPE)
    settings: dict[str, Any] = {"lr": LR, "schedule": "constant", "average": None}

    def train(turn: Turn) -> None:
        try:
            pv.fit(
                vae, x, epochs=1_000_000, batch_size=size.batch, device=device, compile=compile, seed=0,
                callback=lambda metrics: turn(metrics["train_loss"]), **settings,
            )  # fmt: skip
        except CaptureWarning as warning:
            raise LeftOut(str(warning)) from warning

    return train


def by_hand(size: Deep, device: str, rows: int, compile: bool) -> Callable[[Turn], Any]:
    """The loop that one writes, with fused Adam; the loss under ``torch.compile`` or not."""
    import torch
    import torch.nn.functional as F

    up, down = ([net.to(device) for net in nets] for nets in networks(size))
    optimizer = torch.optim.Adam([p for net in (*up, *down) for p in net.parameters()], lr=LR, fused=True)
    data = torch.from_numpy(binary_images(rows)).to(device)

    def normal(parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loc, raw = parameters.chunk(2, -1)
        return loc, F.softplus(raw) + MIN_SCALE

    def objective(x: torch.Tensor) -> torch.Tensor:
        below, elbo = x, torch.zeros(len(x), device=x.device)
        drawn = []
        for net in up:
            loc, scale = normal(net(below))
            noise = torch.randn_like(loc)
            below = loc + scale * noise
            drawn.append(below)
            elbo = elbo + (0.5 * noise.square() + scale.log()).sum(-1)  # less log q, without constants that cancel
        elbo = elbo - 0.5 * drawn[-1].square().sum(-1)
        for i in range(len(down) - 1, 0, -1):
            loc, scale = normal(down[i](drawn[i]))
            elbo = elbo - (0.5 * ((drawn[i - 1] - loc) / scale).square() + scale.log()).sum(-1)
        elbo = elbo - F.softplus((1 - 2 * x) * down[0](drawn[0])).sum(-1)
        return -elbo.mean()

    loss_of = objective
    if compile:
        loss_of = torch.compile(objective, mode="reduce-overhead" if device == "cuda" else "default")

    def train(turn: Turn) -> None:
        while True:
            total = torch.zeros((), device=device)
            order = torch.randperm(rows, device=device).split(size.batch)
            for batch in order:
                loss = loss_of(data[batch])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total += loss.detach()
            if turn(float(total) / len(order)):
                return

    return train


def pyro_svi(size: Deep, device: str, rows: int) -> Callable[[Turn], Any]:
    """Pyro's own ``SVI.step``, its validation off."""
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import SVI, Trace_ELBO

    pyro.enable_validation(False)
    up, down = ([net.to(device) for net in nets] for nets in networks(size))

    def normal(parameters: torch.Tensor) -> Any:
        loc, raw = parameters.chunk(2, -1)
        return dist.Normal(loc, torch.nn.functional.softplus(raw) + MIN_SCALE).to_event(1)

    def model(x: torch.Tensor) -> None:
        for i, net in enumerate(down):
            pyro.module(f"down{i}", net)
        with pyro.plate("data", x.shape[0]):
            zeros = x.new_zeros(size.layers[-1])
            z = pyro.sample(f"z{len(down)}", dist.Normal(zeros, zeros + 1).to_event(1))
            for i in range(len(down) - 1, 0, -1):
                z = pyro.sample(f"z{i}", normal(down[i](z)))
            pyro.sample("x", dist.Bernoulli(logits=down[0](z)).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        for i, net in enumerate(up):
            pyro.module(f"up{i}", net)
        with pyro.plate("data", x.shape[0]):
            below = x
            for i, net in enumerate(up):
                below = pyro.sample(f"z{i + 1}", normal(net(below)))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": LR}), Trace_ELBO())
    data = torch.from_numpy(binary_images(rows)).to(device)

    def train(turn: Turn) -> None:
        while True:
            order = torch.randperm(rows, device=device).split(size.batch)
            total = sum(svi.step(data[batch]) for batch in order)
            if turn(float(total) / rows):
                return

    return train


CONTESTANTS: dict[str, Callable[..., Callable[[Turn], Any]]] = {
    COMPILED: lambda *a: ours(*a, compile="on"),
    PLAIN: lambda *a: ours(*a, compile="off"),
    "Pyro SVI": pyro_svi,
    "PyTorch by hand": lambda *a: by_hand(*a, compile=False),
    "PyTorch by hand, torch.compile": lambda *a: by_hand(*a, compile=True),
}
