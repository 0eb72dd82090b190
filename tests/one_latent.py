"""z ~ N(0, 1), x | z ~ N(z, 1) with a guide of one's own: log p(x) = log N(x; 0, 2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

X = torch.linspace(-1.5, 1.5, 6, dtype=torch.float64)[:, None]


def truth(x: Tensor = X) -> Tensor:
    return dist.Normal(0.0, math.sqrt(2.0)).log_prob(x[:, 0].double())


class OneLatent(nn.Module):
    """z ~ N(0, 1), x | z ~ N(z, 1), the guide's density of z given by a function of x."""

    event_shape = (1,)

    def __init__(self, q: Callable[[Tensor], Any], prior: Any = None) -> None:
        super().__init__()
        self.q, self.prior = q, prior or (lambda x: dist.Normal(x.new_zeros(()), 1.0))
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior(x))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1) + self.shift, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.q(x))


def exact(x: Tensor) -> Any:
    return dist.Normal(x[:, 0] / 2, math.sqrt(0.5))
