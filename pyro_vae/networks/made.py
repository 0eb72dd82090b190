"""MADE: a dense autoencoder whose outputs see only the entries before theirs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from pyro_vae.networks.base import linear
from pyro_vae.networks.causal import Causal
from pyro_vae.seeding import generator


class MADE(Causal):
    """Masked dense layers: unit u of degree m_u sees the entries among the first m_u of the order.

    Degrees of hidden units are drawn, by a generator of their own; ``number`` says which draw, so that several nets can share
    their weights and differ in masks and order. Germain et al. 2015, https://arxiv.org/abs/1502.03509.

    Args:
        dim: entries of x.
        features: numbers for every entry.
        hidden: widths of the hidden layers.
        direct: whether entries reach the outputs directly too, which helped most in the paper.
        shuffle: whether the order is a drawn one, or that of x.
        number: of the draw of masks and order.
        like: the net whose weights this one has.
    """

    layers: nn.ModuleList
    direct: nn.Linear | None

    def __init__(
        self,
        dim: int,
        features: int,
        hidden: Sequence[int],
        *,
        direct: bool = True,
        shuffle: bool = False,
        number: int = 0,
        like: MADE | None = None,
    ) -> None:
        super().__init__()
        self.depth = len(hidden) + 1
        self.features, random = features, generator("masks of MADE", number)
        order = torch.randperm(dim, generator=random, device="cpu") if shuffle else torch.arange(dim, device="cpu")
        self.order = order.tolist()
        # of an entry its place in the order, from 1: hidden units of that degree see it, and outputs of a higher one
        degrees = [order.argsort() + 1]
        for width in hidden:
            low = int(degrees[-1].min()) if len(degrees) > 1 else min(1, dim - 1)
            degrees.append(torch.randint(low, max(dim, low + 1), (width,), generator=random, device="cpu"))
        self._like = (like,)  # in a tuple, so that a state holds the weights once
        if like is None:
            self.layers = nn.ModuleList(linear(i, o) for i, o in pairwise([dim, *hidden, dim * features]))
            self.direct = nn.Linear(dim, dim * features, bias=False) if direct else None
            if self.direct is not None:
                nn.init.zeros_(self.direct.weight)
        for n, degree in enumerate([*degrees, degrees[0].repeat_interleave(features) - 1]):
            self.register_buffer(f"degrees_{n}", degree.to(torch.get_default_device()), persistent=False)

    @property
    def maps(self) -> list[nn.Linear]:
        """The layers, and the direct map behind them where there is one."""
        net = self._like[0] or self
        return [*cast(list[nn.Linear], list(net.layers)), *([] if net.direct is None else [net.direct])]

    def masked(self) -> list[Tensor]:
        """The weights of :attr:`maps`, zeros where the masks are."""
        degrees = [cast(Tensor, d) for d in self.buffers()]
        pairs = [*pairwise(degrees), (degrees[0], degrees[-1])]
        return [m.weight * (above[:, None] >= below) for m, (below, above) in zip(self.maps, pairs, strict=False)]

    def forward(self, values: Tensor) -> Tensor:
        """``(n, dim, features)`` of ``(n, dim, 1)``."""
        x = values.squeeze(-1)
        h, weights = x, self.masked()
        for n in range(self.depth):
            h = nn.functional.linear(h.relu() if n else h, weights[n], self.maps[n].bias)
        if len(weights) > self.depth:
            h = h + nn.functional.linear(x, weights[-1])
        return h.unflatten(-1, (-1, self.features))

    def begin(self, values: Tensor) -> tuple[list[Tensor], list[list[Tensor]], list[Tensor]]:
        """Sums before each layer's units, filled as inputs become known; hidden units by degree; masked weights, by input."""
        sums = [m.bias.expand(len(values), -1).clone() for m in self.maps[: self.depth]]
        units = [
            [(degree == d).nonzero().squeeze(1) for d in range(values.shape[1] + 1)]
            for degree in list(self.buffers())[1:-1]
        ]
        return sums, units, [w.T.contiguous() for w in self.masked()]

    def at(self, values: Tensor, kept: tuple[list[Tensor], list[list[Tensor]], list[Tensor]], step: int) -> Tensor:
        """Every weight is used once per draw in all: a unit goes into the layer above when its own inputs are complete."""
        sums, units, weights = kept
        if step:
            newest = self.order[step - 1]
            x = values[:, newest]
            sums[0] += x * weights[0][newest]
            if len(weights) > len(sums):
                sums[-1] += x * weights[-1][newest]
        for k, by_degree in enumerate(units):
            if len(done := by_degree[step]):
                sums[k + 1] += sums[k][:, done].relu() @ weights[k + 1][done]
        return sums[-1].unflatten(1, (-1, self.features))[:, self.order[step]]
