"""The restricted Boltzmann machine, its gradient by persistent chains, and log Z.

    p(v, h) = exp(b.v + c.h + v W h) / Z        v in {0, 1}^V, h in {0, 1}^H
    log p*(v) = b.v + sum_j softplus(c_j + (v W)_j)

Smolensky 1986; Tieleman 2008, https://doi.org/10.1145/1390156.1390290 (persistent contrastive divergence); Salakhutdinov & Murray
2008, https://doi.org/10.1145/1390156.1390266 (log Z by annealed importance sampling from the machine without weights).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vae.errors import UserError
from pyro_vae.seeding import generator

SLIDING = 0.01  # how fast the offsets follow the means of the units
SMOOTHING = 0.01  # keeps the logit of a pixel that is never on finite
MOST_ENUMERATED = 20  # units of the smaller layer
SHARES = (
    (0.5, 0.035),
    (0.9, 0.275),
    (1.0, 0.69),
)  # of the inverse temperatures up to 0.5, to 0.9 and to 1, as Salakhutdinov & Murray


class RestrictedBoltzmann(nn.Module):
    """One machine with the chains that its training keeps.

    Args:
        visible, hidden: numbers of units.
        chains: persistent chains.
    """

    def __init__(self, visible: int, hidden: int, chains: int = 100) -> None:
        super().__init__()
        frozen = lambda *shape: nn.Parameter(torch.zeros(shape), requires_grad=False)  # noqa: E731
        self.weight, self.visible_bias, self.hidden_bias = frozen(visible, hidden), frozen(visible), frozen(hidden)
        self.base: Tensor
        self.chains: Tensor
        self.visible_offset: Tensor
        self.hidden_offset: Tensor
        self.register_buffer("base", torch.zeros(visible))  # visible biases of the machine without weights
        self.register_buffer("chains", torch.zeros(chains, hidden))
        self.register_buffer("visible_offset", torch.zeros(visible))
        self.register_buffer("hidden_offset", torch.full((hidden,), 0.5))

    @torch.no_grad()
    def start(self, mean: Tensor, source: torch.Generator) -> None:
        """Small weights, and biases at which the visible units have the mean ``(V,)`` of the data."""
        self.weight.normal_(0, 0.01, generator=source)
        self.base.copy_((mean * (1 - SMOOTHING) + SMOOTHING / 2).logit())
        self.visible_bias.copy_(self.base)
        self.visible_offset.copy_(mean)
        self.chains.copy_(bernoulli(torch.full_like(self.chains, 0.5), source))

    def log_unnormalised(self, v: Tensor) -> Tensor:
        """log p*(v) ``(*leading,)`` of ``v`` ``(*leading, V)``, added up in float64."""
        rest = softplus(v @ self.weight + self.hidden_bias).sum(-1, dtype=torch.float64)
        return rest + (v @ self.visible_bias).double()

    def hidden_mean(self, v: Tensor) -> Tensor:
        """p(h = 1 | v)."""
        return (v @ self.weight + self.hidden_bias).sigmoid()

    def visible_mean(self, h: Tensor) -> Tensor:
        """p(v = 1 | h)."""
        return (h @ self.weight.T + self.visible_bias).sigmoid()

    @torch.no_grad()
    def step(self, v: Tensor, lr: float, num_gibbs: int, decay: float, source: torch.Generator) -> Tensor:
        """One step up the log-likelihood of ``v`` ``(batch, V)``, the model's side from the persistent chains.

        The gradient is that of the machine whose units are centred at their means, so that it does not follow the biases of its
        own inputs (Montavon & Muller 2012, https://doi.org/10.1007/978-3-642-35289-8_33), in the parameters of the plain one.

        Returns:
            The mean squared error of v given p(h | v), ``()``: no objective, but a sign of life.
        """
        h = self.hidden_mean(v)
        chains = self.chains
        for _ in range(num_gibbs):
            dreamt = bernoulli(self.visible_mean(chains), source)
            mean = self.hidden_mean(dreamt)
            chains = bernoulli(mean, source)
        self.chains.copy_(chains)
        self.visible_offset.lerp_(v.mean(0), SLIDING)
        self.hidden_offset.lerp_(h.mean(0), SLIDING)
        at_v, at_h = self.visible_offset, self.hidden_offset
        gradient = ((v - at_v) / len(v)).T @ (h - at_h)
        gradient.addmm_((dreamt - at_v).T, mean - at_h, alpha=-1 / len(dreamt))
        self.visible_bias.add_(v.mean(0) - dreamt.mean(0) - gradient @ at_h, alpha=lr)
        self.hidden_bias.add_(h.mean(0) - mean.mean(0) - at_v @ gradient, alpha=lr)
        self.weight.mul_(1 - lr * decay).add_(gradient, alpha=lr)
        return (v - self.visible_mean(h)).square().mean()

    @torch.no_grad()
    def gibbs(self, num: int, num_gibbs: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """``num`` chains that go on from the persistent ones: v ``(num, V)`` and its mean given the hidden units."""
        h = self.chains[torch.arange(num) % len(self.chains)]
        for i in range(num_gibbs):
            mean = self.visible_mean(h)
            v = bernoulli(mean, source)
            if i < num_gibbs - 1:
                h = bernoulli(self.hidden_mean(v), source)
        return v, mean

    @torch.no_grad()
    def enumerated_log_z(self) -> float:
        """log Z by summing over all states of the smaller layer, exact to rounding."""
        a, b, w = self.visible_bias.double(), self.hidden_bias.double(), self.weight.double()
        if len(a) > len(b):
            a, b, w = b, a, w.T
        if len(a) > MOST_ENUMERATED:
            raise UserError(f"log Z is enumerated up to {MOST_ENUMERATED} units in the smaller layer, not {len(a)}")
        states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=len(a))), dtype=torch.float64)
        return float((states @ a + softplus(states @ w + b).sum(-1)).logsumexp(0))


def bernoulli(mean: Tensor, source: torch.Generator) -> Tensor:
    """Zeros and ones as floats."""
    return torch.rand(mean.shape, generator=source, dtype=mean.dtype).lt_(mean)


@dataclass(frozen=True)
class LogZ:
    """log Z by annealing.

    Attributes:
        value: log of the mean weight: Z is estimated without bias, log Z from below on average.
        se: its standard error, by the spread of the weights.
        upper: the same by annealing backwards from the model's own chains, from above on average where these have mixed.
        upper_se: its standard error.
    """

    value: float
    se: float
    upper: float | None
    upper_se: float | None

    @property
    def gap(self) -> float | None:
        """How far the two lie apart."""
        return None if self.upper is None else self.upper - self.value


def annealed_log_z(
    machine: RestrictedBoltzmann,
    *,
    num_chains: int = 256,
    num_distributions: int = 10_000,
    seed: int = 0,
    backwards: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> LogZ:
    """log Z by annealed importance sampling from the machine without weights, whose visible units have the data's means.

    Args:
        machine: whose log Z.
        num_chains: independent chains.
        num_distributions: steps in inverse temperature, most of them near 1; a Gibbs step at each.
        seed: of everything drawn.
        backwards: where not 0, also from above: from the persistent chains after so many Gibbs steps.
        progress: called with shares of the work, which add up to 1.
    """
    source = generator("log Z", seed)
    parts = 2 if backwards else 1
    tell = lambda share: progress(share / parts)  # noqa: E731
    start = bernoulli(machine.base.sigmoid().expand(num_chains, -1), source)
    log_weight = _anneal(machine, start, inverse_temperatures(num_distributions), source, tell)
    base = math.log(2) * len(machine.hidden_bias) + float(softplus(machine.base.double()).sum())
    value, se = _log_mean(log_weight)
    upper = upper_se = None
    if backwards:
        start, _ = machine.gibbs(num_chains, backwards, source)
        falling = inverse_temperatures(num_distributions).flip(0)
        inverse, upper_se = _log_mean(_anneal(machine, start, falling, source, tell))
        upper = base - inverse
    return LogZ(base + value, se, upper, upper_se)


def inverse_temperatures(num: int) -> Tensor:
    """``num + 1`` of them from 0 to 1, in float64; :class:`UserError` for fewer than one for each part of the way."""
    if num < len(SHARES):
        raise UserError(f"annealing of log Z needs {len(SHARES)} distributions at least, got {num}")
    ends = [0.0, *(end for end, _ in SHARES)]
    counts = [max(1, round(share * num)) for _, share in SHARES]
    counts[-1] = max(1, num - counts[0] - counts[1])
    parts = [
        torch.linspace(a, b, n + 1, dtype=torch.float64)[:-1] for a, b, n in zip(ends, ends[1:], counts, strict=False)
    ]
    return torch.cat([*parts, torch.ones(1, dtype=torch.float64)])


@torch.no_grad()
def _anneal(
    machine: RestrictedBoltzmann, v: Tensor, betas: Tensor, source: torch.Generator, progress: Callable[[float], None]
) -> Tensor:
    """Log-weights ``(chains,)`` of a path through inverse temperatures, float64; v is drawn at the first of them."""
    log_weight = torch.zeros(len(v), dtype=torch.float64)
    slope = machine.visible_bias - machine.base
    steps = betas.tolist()
    for k in range(len(steps) - 1):
        now, then = steps[k], steps[k + 1]
        field = v @ machine.weight + machine.hidden_bias
        change = (softplus(then * field) - softplus(now * field)).sum(-1, dtype=torch.float64)
        log_weight += change + (then - now) * (v @ slope).double()
        h = bernoulli((then * field).sigmoid_(), source)
        v = bernoulli((machine.base + then * (h @ machine.weight.T + slope)).sigmoid_(), source)
        if k % 100 == 99:
            progress(100 / (len(steps) - 1))
    progress((len(steps) - 1) % 100 / (len(steps) - 1))
    return log_weight


def _log_mean(log_weight: Tensor) -> tuple[float, float]:
    """Log of the mean weight, and its standard error to first order."""
    value = float(log_weight.logsumexp(0)) - math.log(len(log_weight))
    return value, float((log_weight - value).exp().std()) / math.sqrt(len(log_weight))
