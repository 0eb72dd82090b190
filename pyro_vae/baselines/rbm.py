"""The restricted Boltzmann machine alone: log p(x) = log p*(x) - log Z."""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from pyro_vae.baselines.base import Baseline, How, Progress, of_images
from pyro_vae.baselines.boltzmann import LogZ, RestrictedBoltzmann, annealed_log_z
from pyro_vae.data import Data
from pyro_vae.registry import register
from pyro_vae.seeding import generator

Count = Annotated[int, Field(ge=1, le=100_000)]
Rate = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0)]
CHAINS, DISTRIBUTIONS, BACKWARDS, DREAM = 256, 10_000, 1_000, 1_000


@register("baselines", "rbm")
class RBM(Baseline):
    """Trained by persistent contrastive divergence with a rate that falls to zero; log Z by annealed importance sampling.

    Tieleman 2008, https://doi.org/10.1145/1390156.1390290; Salakhutdinov & Murray 2008, https://doi.org/10.1145/1390156.1390266.

    Args:
        event_shape: of one image.
        hidden: hidden units.
        epochs: passes over the data.
        batch_size: images, and persistent chains, per step.
        lr: of the first step; it falls linearly to zero.
        gibbs: Gibbs steps of the chains between two steps.
        weight_decay: of the weights.
    """

    formula = "p(x, h) = exp(b.x + c.h + x W h) / Z"
    data = "binary"

    def __init__(
        self,
        event_shape: tuple[int, ...],
        *,
        hidden: Count = 500,
        epochs: Count = 100,
        batch_size: Count = 100,
        lr: Rate = 0.2,
        gibbs: Count = 1,
        weight_decay: Decay = 0.0,
    ) -> None:
        super().__init__(event_shape)
        self.epochs, self.batch_size, self.lr, self.gibbs, self.weight_decay = (
            epochs,
            batch_size,
            lr,
            gibbs,
            weight_decay,
        )
        self.machine = RestrictedBoltzmann(math.prod(event_shape), hidden, batch_size)

    @property
    def passes(self) -> int:
        """Epochs."""
        return self.epochs

    def start(self, data: Data, generator: torch.Generator) -> None:
        """Biases at the data's mean, small weights."""
        self.machine.start(data.mean_image().flatten(), generator)

    def train_pass(self, number: int, data: Data, generator: torch.Generator) -> dict[str, float]:
        """An epoch."""
        batches = (x.flatten(1) for x in self.batches(data, generator))
        rate = falling(self.lr, number, self.epochs, self.num_batches(data))
        return climb(self.machine, batches, rate, self.gibbs, self.weight_decay, generator)

    def log_z(self, how: How, progress: Progress) -> LogZ:
        """By annealing, from both sides."""
        return annealed_log_z(
            self.machine, num_chains=how.chains or CHAINS, num_distributions=how.distributions or DISTRIBUTIONS,
            seed=how.seed, backwards=BACKWARDS, progress=progress,
        )  # fmt: skip

    def figures(self, data: Data, how: How, progress: Progress) -> dict[str, Any]:
        """log p(x) to the error of log Z."""
        x = data.observed(how.split, rows=how.rows(data)).flatten(1)
        log_z = self.log_z(how, progress)
        log_p = self.machine.log_unnormalised(x) - log_z.value
        return {**of_images(log_p, log_z.se, self.event_shape), **told(log_z, how)}

    def sample(self, num: int, seed: int, *, mean: bool = True) -> Tensor:
        """Pixels in chains that go on from those of training."""
        drawn, means = self.machine.gibbs(num, DREAM, generator("dreams of an rbm", seed))
        return (means if mean else drawn).reshape(num, *self.event_shape)


def falling(lr: float, number: int, epochs: int, steps: int) -> Any:
    """The rate of step i of epoch ``number``: linear from ``lr`` to zero over all epochs."""
    return lambda i: lr * (1 - (number * steps + i) / (epochs * steps))


def climb(
    machine: RestrictedBoltzmann, batches: Any, rate: Any, gibbs: int, decay: float, source: torch.Generator
) -> Any:
    """One pass of steps; the mean reconstruction error."""
    errors = [machine.step(v, rate(i), gibbs, decay, source) for i, v in enumerate(batches)]
    return {"reconstruction_mse": float(torch.stack(errors).mean())}


def told(log_z: LogZ, how: How) -> dict[str, Any]:
    """What annealing found, and what stands against it."""
    chains, steps = how.chains or CHAINS, how.distributions or DISTRIBUTIONS
    warnings = []
    if not log_z.se < 0.5:
        warnings.append(f"the standard error of log Z is {log_z.se:.2g} nats: give more distributions or chains")
    gap = ""
    if log_z.gap is not None and log_z.upper_se is not None:
        error = math.hypot(log_z.se, log_z.upper_se)
        gap = f", gap {log_z.gap:.2f} +- {error:.2f}"
        if log_z.gap > 1:
            warnings.append(
                f"annealing backwards ends {log_z.gap:.2g} nats above annealing forwards: the distributions or the chains are "
                "too few; log Z is likely too low, and log p(x) too high"
            )
        elif log_z.gap < -3 * error:
            warnings.append(
                f"annealing backwards, a bound from above, ends {-log_z.gap:.2g} nats below annealing forwards: the chains that "
                "it begins with have not mixed, and are no draws of the model"
            )
    return {
        "computed": f"log Z by AIS ({chains} chains, {steps:,} distributions{gap})",
        "log_z": log_z.value, "log_z_se": log_z.se, "log_z_upper": log_z.upper,
        "log_z_upper_se": log_z.upper_se, "warnings": warnings,
    }  # fmt: skip
