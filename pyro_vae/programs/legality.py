"""Which blocks go together, by what they declare of themselves.

Nothing here knows a block by name: supports are compared, and what a prior asks of the guide with what the guide can do.
"""

from __future__ import annotations

from typing import Any, cast

from pyro_vae import registry
from pyro_vae.errors import UserError
from pyro_vae.posteriors.base import Posterior
from pyro_vae.priors.base import Prior

# Passes of the guide's networks per draw of z that a prior made of the guide may cost. Scoring a z that it did not draw costs a
# sequential guide one pass per latent dimension, for every component of the prior.
MOST_PASSES = 1_000


def require_fit(prior: Prior, posterior: Posterior) -> None:
    """:class:`UserError`, with the nearest legal choices, where a prior and a posterior cannot stand in one program."""
    p, q = _name("priors", prior), _name("posteriors", posterior)
    if prior.support is not None and not same_support(prior.support, posterior.support):
        posteriors = registry.names("posteriors")
        fitting = [n for n in posteriors if same_support(_posterior(n).support, prior.support)]
        others = [n for n in registry.names("priors") if _accepts(registry.get("priors", n), posterior)]
        raise UserError(
            f"the prior {p!r} lives on {_on(prior.support)}, the posterior {q!r} on {_on(posterior.support)}: with this prior "
            f"choose from {', '.join(fitting) or 'no posterior'}; with this posterior from {', '.join(others) or 'no prior'}"
        )
    if not (prior.scores_guide or posterior.components > 1) or posterior.scoring == "cheap":
        return
    cheap = [
        n
        for n in registry.names("posteriors")
        if _posterior(n).scoring == "cheap" and same_support(_posterior(n).support, posterior.support)
    ]
    if posterior.scoring == "impossible":
        raise UserError(
            f"the prior {p!r} is made of the guide's density at z that the guide did not draw, and the posterior {q!r} can score "
            f"its own draws only: choose from {', '.join(cheap)}"
        )
    own = getattr(prior, "components", 1) if prior.scores_guide else 1
    components, dims = own * posterior.components, posterior.latent_shape[0]
    passes = components * dims
    if passes > MOST_PASSES:
        by = f"the prior {p!r}" if prior.scores_guide else f"the posterior {q!r}"
        which = "each" if posterior.components == 1 else "each of its components"
        raise UserError(
            f"{by} scores every z under {components} densities of the guide, and the posterior {q!r} takes {dims} "
            f"passes for {which}: {passes:,} passes per draw, above {MOST_PASSES:,}: choose from {', '.join(cheap)}, or fewer "
            "components"
        )


def same_support(a: Any, b: Any) -> bool:
    """Whether two constraints are the same set, as far as their description tells."""
    return a is not None and b is not None and repr(a) == repr(b)


def _posterior(name: str) -> type[Posterior]:
    return cast(type[Posterior], registry.get("posteriors", name))


def _accepts(family: Any, posterior: Posterior) -> bool:
    if family.support is not None:
        return same_support(family.support, posterior.support)
    return not family.scores_guide or posterior.scoring == "cheap"


def _name(kind: str, block: Any) -> str:
    """The registered name of a block's class, or its class name."""
    return next((n for n in registry.names(kind) if registry.get(kind, n) is type(block)), type(block).__name__)


def _on(support: Any) -> str:
    inner, axes = support, 0
    while hasattr(inner, "base_constraint"):
        axes += inner.reinterpreted_batch_ndims
        inner = inner.base_constraint
    kind = str(inner).removesuffix("()").lower()
    return f"vectors of {kind}" if axes == 1 else f"arrays of {kind}" if axes else kind
