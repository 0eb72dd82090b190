"""Draws of mixtures stratified over their components, where a function knows what error such draws have.

Elsewhere draws of a mixture are independent, as those of every other distribution are.
"""

from __future__ import annotations

import math
from typing import Any

from pyro.poutine.messenger import Messenger

from pyro_vae.programs.trace import Traced, is_random, latent_sites


class InStrata(Messenger):
    """While entered around a guide's run, sites that are mixtures of equal weights draw from their components by turns.

    Each of K draws is one of the guide all the same, so that the mean of weights p(x, z) / q(z | x), q the mixture, is unbiased
    for any K; see :class:`~pyro_vae.posteriors.equal_mixture.EqualMixture`.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if is_random(msg) and not msg["is_observed"] and hasattr(msg["fn"], "in_strata"):
            msg["fn"] = msg["fn"].in_strata()


def strata_of(guide: Traced) -> int:
    """Of how many draws in a row all mixtures of a guide's run can hold each component equally often; 1 of other guides."""
    mixtures = [s["fn"] for s in latent_sites(guide).values() if hasattr(s["fn"], "in_strata")]
    return math.lcm(*(len(fn.components) for fn in mixtures))
