"""Latents of the model drawn nearer to the middle of their priors.

    z = mu + t (z' - mu),   z' ~ p(z | what is above it),   t the temperature

which is a draw of the same family with scale t s. Vahdat & Kautz 2020, https://arxiv.org/abs/2007.03898, section 4; Child 2021.
"""

from __future__ import annotations

import math
from typing import Any

import torch.distributions as families
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.errors import UserError
from pyro_vae.programs.folding import ByRow, innermost
from pyro_vae.programs.trace import is_random

# of a location and a scale, where the location stands in the space of the draws
LOCATED = (
    families.Normal,
    families.Laplace,
    families.StudentT,
    families.MultivariateNormal,
    families.LowRankMultivariateNormal,
)


class Tempered(Messenger):
    """While entered, every latent of the model is drawn at a temperature.

    Args:
        temperature: above 0; 1 changes nothing, less gives typical draws and fewer kinds of them.

    Raises:
        UserError: where it is out of range, or a latent's distribution has no scale of its own.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise UserError(f"expected a temperature above 0, as a finite number, got {temperature}")
        self.temperature = temperature

    def _pyro_sample(self, msg: Any) -> None:
        if not is_random(msg) or msg["is_observed"] or msg["done"]:
            return
        msg["value"], msg["done"] = self.draw(msg["fn"]), True

    def draw(self, fn: Any) -> Tensor:
        """A draw of a distribution at the temperature."""
        inner, drawn = innermost(fn), fn()
        if not isinstance(inner, LOCATED):
            raise UserError(
                f"a latent's prior is a {type(inner).__name__}, which has no scale that a temperature could multiply: leave "
                "temperature out, or train with a normal prior at the top"
            )
        loc: Tensor = inner.loc
        if isinstance(fn, ByRow):  # of the program's own axes, where the draw has those of samples and rows first
            loc = fn.outer(loc.expand(fn.base_dist.batch_shape + fn.base_dist.event_shape))
        return loc + self.temperature * (drawn - loc)
