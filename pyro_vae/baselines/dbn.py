"""The deep belief network with two hidden layers, and it as a Pyro program.

    p(x, g) = p(x | g) p*(g) / Z        x | g ~ Bernoulli(sigmoid(W g + b)),  p* of the upper machine, its hidden units summed out

Hinton, Osindero & Teh 2006, https://doi.org/10.1162/neco.2006.18.7.1527; the bound of Salakhutdinov & Murray 2008,
https://doi.org/10.1145/1390156.1390266; the estimate of Murray & Salakhutdinov 2009 in :mod:`pyro_vae.baselines.chib`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import pyro
import pyro.distributions as dist
import torch
from pydantic import Field
from torch import Tensor, nn

from pyro_vae.baselines.base import Baseline, How, Progress, of_images
from pyro_vae.baselines.boltzmann import LogZ, RestrictedBoltzmann, annealed_log_z, bernoulli
from pyro_vae.baselines.chib import chib
from pyro_vae.baselines.rbm import (
    BACKWARDS,
    CHAINS,
    DISTRIBUTIONS,
    DREAM,
    RBM,
    Count,
    Decay,
    Rate,
    climb,
    falling,
    told,
)
from pyro_vae.data import Data
from pyro_vae.errors import UserError, unsaid
from pyro_vae.evaluation.evaluate import chosen_rows
from pyro_vae.evaluation.importance import log_likelihood
from pyro_vae.evaluation.result import UnreliableEstimateWarning
from pyro_vae.registry import register
from pyro_vae.seeding import generator

LOOKED_AT = 10_000  # images, for the means of the first hidden layer
SWEEPS, BOTH_WAYS = 50, 100  # of the second estimate, and how many images it is made of


@register("baselines", "dbn")
class DBN(Baseline):
    """Two machines, trained greedily: the upper one on the hidden units of the lower, given data.

    Args:
        event_shape: of one image.
        first, second: hidden units of the two layers.
        epochs, top_epochs: passes for each; 0 of the first where the lower machine is one trained before (--from).
        batch_size, lr, gibbs, weight_decay: as of an rbm.
        top_lr, top_gibbs: of the upper machine.
    """

    formula = "p(x, g, h) = p(x | g) exp(c.g + d.h + g V h) / Z"
    data = "binary"

    def __init__(
        self,
        event_shape: tuple[int, ...],
        *,
        first: Count = 500,
        second: Count = 2000,
        epochs: Annotated[int, Field(ge=0, le=100_000)] = 100,
        top_epochs: Count = 50,
        batch_size: Count = 100,
        lr: Rate = 0.2,
        gibbs: Count = 1,
        top_lr: Rate = 0.05,
        top_gibbs: Count = 1,
        weight_decay: Decay = 0.0,
    ) -> None:
        super().__init__(event_shape)
        self.epochs, self.top_epochs, self.batch_size = epochs, top_epochs, batch_size
        self.lr, self.gibbs, self.top_lr, self.top_gibbs, self.weight_decay = lr, gibbs, top_lr, top_gibbs, weight_decay
        self.lower = RestrictedBoltzmann(math.prod(event_shape), first, batch_size)
        self.upper = RestrictedBoltzmann(first, second, batch_size)

    @property
    def passes(self) -> int:
        """Epochs of both machines."""
        return self.epochs + self.top_epochs

    def start(self, data: Data, generator: torch.Generator) -> None:
        """The lower machine, unless it was trained before."""
        if self.epochs:
            self.lower.start(data.mean_image().flatten(), generator)

    def begin_with(self, other: Baseline) -> None:
        """Take an RBM as the lower machine."""
        if not isinstance(other, RBM) or self.epochs:
            raise UserError(
                "a dbn begins with an rbm, --from RBM, and then has epochs=0 of its own for the first layer"
            )
        ours, theirs = self.lower.state_dict(), other.machine.state_dict()
        for name, tensor in theirs.items():
            if name != "chains" and tensor.shape != ours[name].shape:
                raise UserError(f"the rbm has {len(other.machine.hidden_bias)} hidden units: give --set first=so many")
        self.lower.load_state_dict({**theirs, "chains": ours["chains"]})

    def train_pass(self, number: int, data: Data, generator: torch.Generator) -> dict[str, float]:
        """An epoch of the machine whose turn it is."""
        batches, steps = (x.flatten(1) for x in self.batches(data, generator)), self.num_batches(data)
        if number < self.epochs:
            rate = falling(self.lr, number, self.epochs, steps)
            return climb(self.lower, batches, rate, self.gibbs, self.weight_decay, generator)
        if number == self.epochs:
            x = data.prepare(data.train[chosen_rows(len(data.train), LOOKED_AT)], generator).flatten(1)
            self.begin_upper(x, generator)
        rate = falling(self.top_lr, number - self.epochs, self.top_epochs, steps)
        hidden = (bernoulli(self.lower.hidden_mean(x), generator) for x in batches)
        return climb(self.upper, hidden, rate, self.top_gibbs, self.weight_decay, generator)

    @torch.no_grad()
    def begin_upper(self, x: Tensor, source: torch.Generator) -> None:
        """Start the upper machine where p(g) is the lower machine's, if it has as many hidden units as there are pixels.

        Summed over pixels, the lower machine is one of g with a hidden unit for each pixel: so the network begins with the
        likelihood of the lower machine, and its bound rises from there (Hinton et al. 2006). Units beyond have small weights.
        """
        upper, lower, pixels = self.upper, self.lower, len(self.lower.visible_bias)
        upper.start(lower.hidden_mean(x).mean(0), source)
        if len(upper.hidden_bias) < pixels:
            return
        upper.weight[:, :pixels] = lower.weight.T
        upper.hidden_bias[:pixels] = lower.visible_bias
        upper.visible_bias.copy_(lower.hidden_bias)
        upper.hidden_offset[:pixels] = x.mean(0)
        upper.chains[:, :pixels] = lower.gibbs(len(upper.chains), 1, source)[0]

    def log_z(self, how: How, progress: Progress) -> LogZ:
        """Of the upper machine."""
        return annealed_log_z(
            self.upper, num_chains=how.chains or CHAINS, num_distributions=how.distributions or DISTRIBUTIONS,
            seed=how.seed, backwards=BACKWARDS, progress=progress,
        )  # fmt: skip

    def figures(self, data: Data, how: How, progress: Progress) -> dict[str, Any]:
        """log p(x) by importance weighting from the factorial guide, whose ELBO is the bound; and by chains on some images."""
        rows = how.rows(data)
        log_z = self.log_z(how, lambda share: progress(share / 2))
        x = data.observed(how.split, rows=rows)
        with unsaid(UnreliableEstimateWarning):
            result = log_likelihood(
                AsProgram(self, log_z.value), x, num_samples=how.samples, seed=how.seed,
                progress=lambda n: progress(n / len(x) / 2),
            )  # fmt: skip
        found = of_images(
            result.log_likelihood, log_z.se, self.event_shape
        )  # the spread has the error of weights in it
        found["nll_mc_se"] = math.hypot(result.nll_mc_se, log_z.se)
        some = chosen_rows(len(x), BOTH_WAYS)
        few = x[some].flatten(1)
        other = chib(self.lower, self.upper, few, SWEEPS, how.seed) - log_z.value
        difference = (other - result.log_likelihood[some]).double()
        known = told(log_z, how)
        return {
            **found, **known,
            "computed": f"IW at K = {how.samples:,}; {known['computed']}",
            "bound": -float(result.elbo.mean()),
            "khat_median": float(result.khat.nanmedian()), "khat_bad_fraction": result.khat_bad_fraction,
            "chib_minus_iw": float(difference.mean()), "chib_num_data": len(few),
            "chib_minus_iw_se": float(difference.std()) / math.sqrt(len(few)) if len(few) > 1 else None,
            "warnings": [*known["warnings"], *result.warnings],
        }  # fmt: skip

    def sample(self, num: int, seed: int, *, mean: bool = True) -> Tensor:
        """Pixels given the first hidden layer of chains that go on from those of training."""
        source = generator("dreams of a dbn", seed)
        means = self.lower.visible_mean(self.upper.gibbs(num, DREAM, source)[0])
        return (means if mean else bernoulli(means, source)).reshape(num, *self.event_shape)


class AsProgram(nn.Module):
    """The network as a pair of Pyro programs: the upper machine is a factor over fair coins, the guide is the lower machine's.

    Args:
        network: a trained one.
        log_z: of its upper machine.
    """

    def __init__(self, network: DBN, log_z: float) -> None:
        super().__init__()
        self.lower, self.upper, self.log_z = network.lower, network.upper, log_z
        self.event_shape = network.event_shape

    def model(self, x: Tensor, *y: Tensor) -> None:
        """p(x | g) p*(g) / Z."""
        fair = x.new_full((len(self.upper.visible_bias),), 0.5)
        with pyro.plate("data", len(x), dim=-1):
            g = pyro.sample("g", dist.Bernoulli(fair, validate_args=False).to_event(1))
            log_prior = self.upper.log_unnormalised(g) - self.log_z + math.log(2) * len(fair)
            pyro.factor("upper machine", log_prior.to(x.dtype))
            logits = (g @ self.lower.weight.T + self.lower.visible_bias).reshape(*g.shape[:-1], *self.event_shape)
            pyro.sample("x", dist.Bernoulli(logits=logits, validate_args=False).to_event(len(self.event_shape)), obs=x)

    def guide(self, x: Tensor, *y: Tensor) -> None:
        """q(g | x) = prod_j Bernoulli(sigmoid(c_j + (x W)_j))."""
        logits = x.flatten(1) @ self.lower.weight + self.lower.hidden_bias
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("g", dist.Bernoulli(logits=logits, validate_args=False).to_event(1))
