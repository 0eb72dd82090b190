"""What a program's guide can score, by what the posteriors in it declare."""

from __future__ import annotations

from torch import nn

from pyro_vae.errors import UserError
from pyro_vae.posteriors.base import Posterior
from pyro_vae.programs.trace import Program


def require_scored_anew(program: Program) -> None:
    """:class:`UserError` where a posterior in the program says that it can score no z but those that it has just drawn."""
    modules = program.modules() if isinstance(program, nn.Module) else ()
    if any(module.scoring == "impossible" for module in modules if isinstance(module, Posterior)):
        raise UserError(
            "the objective scores the guide's draws anew, and this posterior can score none but those that it has just drawn: "
            "use elbo or iwae, or another posterior"
        )


def scores_any(program: Program) -> bool:
    """Whether no posterior in the program says that a z which it did not draw is dear to score, or cannot be.

    Of a guide that uses none of the library's posteriors nothing is known before it is tried: True.

    >>> import pyro_vae as pv
    >>> [scores_any(pv.build("ppca", guide, (3,), latent_dim=2)) for guide in ("linear", "planar")]
    [True, False]
    """
    modules = program.modules() if isinstance(program, nn.Module) else ()
    return all(module.scoring == "cheap" for module in modules if isinstance(module, Posterior))
