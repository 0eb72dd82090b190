"""What the count likelihoods share: a mean for every feature, and a dispersion."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_vae.likelihoods.base import Likelihood, Shape
from pyro_vae.networks.heads import Head, positive, positive_inverse

Library = Annotated[float, Field(gt=0)] | None
Dispersion = Literal["shared", "per-feature", "decoder"]
MAX_DISPERSION = 1e4  # beyond, a negative binomial is a Poisson, and its log-gammas cancel in float32


class Counts(Likelihood):
    """Independent counts with log-mean log(library) + log_softmax f(z), or log softplus f(z) without a library.

    A likelihood sees no x, so the library size is one number, the median total of the data: totals that vary from row
    to row are for the latents to explain, or for counts scaled beforehand.

    Args:
        num_params: outputs per entry, the first of which is f.
        library: the mean of the total count of an event, shared out by a softmax; None for means of their own.
    """

    data = "count"
    support = constraints.nonnegative_integer

    def __init__(self, feature_shape: Shape, event_shape: Shape, num_params: int, library: float | None) -> None:
        super().__init__(feature_shape, event_shape)
        self.size_factor = library
        self.head = Head(feature_shape, event_shape, num_params=num_params)

    def log_mean(self, f: Tensor) -> Tensor:
        """Log-means ``(*leading, *event_shape)``."""
        if self.size_factor is None:
            return positive(f).log()
        flat = f.flatten(-len(self.event_shape)).log_softmax(-1)
        return flat.reshape(f.shape) + math.log(self.size_factor)

    def start_at(self, mean: Tensor, spread: float | None = None) -> None:
        """Output bias = the mean counts, through the inverse of the mean's transformation."""
        mean = mean.clamp(min=1e-3)
        # softplus^-1; of counts in the thousands, the counts
        self.head.set_bias(mean.log() if self.size_factor is not None else mean + (-(-mean).expm1()).log())


class Dispersed(Counts):
    """Counts with an inverse dispersion theta: variance mu + mu^2 / theta.

    Args:
        num_params: outputs per entry besides a dispersion that the decoder gives; the dispersion is the last.
        library: as in :class:`Counts`.
        dispersion: ``"shared"`` (one learned theta), ``"per-feature"`` or ``"decoder"`` (a function of z).
    """

    def __init__(
        self, feature_shape: Shape, event_shape: Shape, num_params: int, library: float | None, dispersion: Dispersion
    ) -> None:
        super().__init__(feature_shape, event_shape, num_params + (dispersion == "decoder"), library)
        raw = positive_inverse(1.0)
        if dispersion == "decoder":
            self.head.set_bias(raw, param=num_params)
        else:
            shape = (1,) * len(event_shape) if dispersion == "shared" else event_shape
            self.raw_dispersion = nn.Parameter(torch.full(shape, raw))

    def theta(self, raw: list[Tensor]) -> Tensor:
        """The inverse dispersion, of a shape that broadcasts to ``(*leading, *event_shape)``."""
        return positive(raw[0] if raw else self.raw_dispersion).clamp(max=MAX_DISPERSION)
