"""The estimate of log p(x) of Murray & Salakhutdinov 2009, for the deep belief network.

For any state g of the latents, p(x) = p(x, g) / p(g | x), and p(g | x) is the mean probability with which a chain that leaves the
posterior invariant moves to g from where the posterior puts it. Chains begin at g itself, at a place of theirs that is drawn:
one side of it is run forwards, the other backwards, and the mean of 1 / (mean probability) is 1 / p(g | x) exactly. So p(x) is
estimated without bias for any number of sweeps, and log p(x) from below on average.

Murray & Salakhutdinov, Evaluating probabilities under high-dimensional latent variable models, NIPS 21, 2009.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_vae.baselines.boltzmann import RestrictedBoltzmann, bernoulli
from pyro_vae.seeding import generator

ASCENTS = 5  # sweeps that take every unit to its likelier state, to begin with a g of high probability


@torch.no_grad()
def chib(lower: RestrictedBoltzmann, upper: RestrictedBoltzmann, x: Tensor, num_sweeps: int, seed: int = 0) -> Tensor:
    """log p*(x) ``(N,)``, float64: log p(x) + log Z of the upper machine.

    A sweep draws the upper machine's hidden units given g, and then the units of g one by one given these and x.

    Args:
        lower, upper: the machines of the belief network.
        x: ``(N, V)``, zeros and ones.
        num_sweeps: of the chain of every image; each costs two softplus of ``(N, V)`` for every unit of g, twice.
        seed: of the draws.
    """
    chain = _Chain(lower, upper, x, generator("chains to one state", seed))
    g = (chain.lower.hidden_mean(x) > 0.5).to(x.dtype)
    for _ in range(ASCENTS):
        g = chain.ascend(g)
    given = (x * (logits := g @ chain.lower.weight.T + chain.lower.visible_bias) - softplus(logits)).sum(-1)
    log_joint = chain.upper.log_unnormalised(g) + given.double()
    place = int(torch.randint(num_sweeps, (), generator=chain.source))
    start = chain.backwards(g)
    log_moves, state = [chain.log_move(g, start)], start
    for _ in range(num_sweeps - 1 - place):
        state = chain.forwards(state)
        log_moves.append(chain.log_move(g, state))
    state = start
    for _ in range(place):
        state = chain.backwards(state[0])
        log_moves.append(chain.log_move(g, state))
    return log_joint - (torch.stack(log_moves).logsumexp(0) - math.log(num_sweeps))


class _Chain:
    """Sweeps over states (g, h) of the latents of ``x``, and their probabilities."""

    def __init__(
        self, lower: RestrictedBoltzmann, upper: RestrictedBoltzmann, x: Tensor, source: torch.Generator
    ) -> None:
        self.lower, self.upper, self.x, self.source = lower, upper, x, source
        self.evidence = x @ self.lower.weight  # (N, H)

    def ascend(self, g: Tensor) -> Tensor:
        """Every unit of g to its likelier state, in turn."""
        return self._sweep(g, self.upper.hidden_mean(g), lambda j, log_odds: (log_odds > 0).to(g.dtype))

    def forwards(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The units of g in order given h, then h."""
        g = self._sweep(state[0], state[1], self._draw)
        return g, self._hidden(g)

    def backwards(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """The same in reverse: h, then the units of g from the last to the first."""
        h = self._hidden(g)
        return self._sweep(g, h, self._draw, reverse=True), h

    def log_move(self, to: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        """Log-probability ``(N,)`` that the units of g go to ``to`` in one sweep from ``state``; float64."""
        total = torch.zeros(len(to), dtype=torch.float64)

        def note(j: int, log_odds: Tensor) -> Tensor:
            total.sub_(softplus(torch.where(to[:, j] > 0, -log_odds, log_odds)).double())
            return to[:, j]

        self._sweep(*state, note)
        return total

    def _hidden(self, g: Tensor) -> Tensor:
        return bernoulli(self.upper.hidden_mean(g), self.source)

    def _draw(self, j: int, log_odds: Tensor) -> Tensor:
        return bernoulli(log_odds.sigmoid(), self.source)

    def _sweep(self, g: Tensor, h: Tensor, choose, reverse: bool = False) -> Tensor:  # type: ignore[no-untyped-def]
        """``choose(j, log-odds of unit j)`` for each unit in turn."""
        weight, g = self.lower.weight, g.clone()
        logits = g @ weight.T + self.lower.visible_bias
        log_odds = self.upper.visible_bias + h @ self.upper.weight.T + self.evidence
        units = range(g.shape[1])
        for j in reversed(units) if reverse else units:
            off = logits - g[:, j, None] * weight[:, j]
            on = off + weight[:, j]
            g[:, j] = choose(j, log_odds[:, j] - (softplus(on) - softplus(off)).sum(-1))
            logits = off + g[:, j, None] * weight[:, j]
        return g
