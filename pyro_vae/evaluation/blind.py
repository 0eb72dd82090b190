"""What importance weights cannot see, told from the program.

log p(x) = log E_q[p(x, z) / q(z | x)] holds where q has a density wherever p has one. Draws of q tell nothing of latents that q
never draws: neither their spread nor Pareto k.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Delta

from pyro_vae.errors import ProgramError
from pyro_vae.programs.auxiliary import is_delta
from pyro_vae.programs.summing import few_states
from pyro_vae.programs.supports import describe, is_discrete, narrower
from pyro_vae.programs.trace import (
    Traces,
    device_of,
    evaluating,
    found_once,
    innermost,
    isolated,
    latent_sites,
)
from pyro_vae.seeding import derive_seed, seeded

OUTSIDE_DRAWS = 256  # of the guide, per row of the check, that are looked for outside of the model's support


@found_once
def require_weights(traces: Traces) -> None:
    """:class:`ProgramError` where draws of the guide have no importance weight: a point mass, or densities of two kinds."""
    points = point_masses(traces)
    if points:
        raise ProgramError(
            f"guide: the site {points[0]!r} is a Delta, a point estimate without a density, whose draws have no weights: "
            "give it a distribution (a normal around the point), or make it of an auxiliary site with its Jacobian as log_density"
        )
    for name, (ours, theirs) in _pairs(traces).items():
        if is_discrete(ours) != is_discrete(theirs):
            raise ProgramError(_of_two_kinds(name, ours, theirs))
    require_scores(traces)


@found_once
def require_scores(traces: Traces) -> None:
    """:class:`ProgramError` where the guide draws latents that cannot be, and the model gives them a density nevertheless.

    An ELBO of such draws is of another model. A relaxation is let pass in training mode: programs are looked at in the other.
    """
    for name, (ours, theirs) in _pairs(traces).items():
        if not is_delta(latent_sites(traces.guide)[name]) and _scores_outside(traces, ours, theirs):
            if is_discrete(ours) != is_discrete(theirs):
                raise ProgramError(_of_two_kinds(name, ours, theirs))
            raise ProgramError(
                f"guide: the site {name!r} draws outside of the model's {describe(theirs)}, where the model's log_prob is not "
                f"-inf ({type(innermost(theirs)).__name__} does not look): give the guide the model's support"
            )


def _pairs(traces: Traces) -> dict[str, tuple[Any, Any]]:
    """The distributions of guide and model by site."""
    guide = latent_sites(traces.guide)
    return {name: (guide[name]["fn"], site["fn"]) for name, site in latent_sites(traces.model).items()}


def _of_two_kinds(name: str, ours: Any, theirs: Any) -> str:
    kinds = ["discrete" if is_discrete(fn) else "continuous" for fn in (ours, theirs)]
    return (
        f"guide: the site {name!r} is {kinds[0]} ({type(innermost(ours)).__name__}), and the model's {kinds[1]}: their ratio is "
        "no weight; draw it as the model does, and relax it in training mode alone"
    )


def point_masses(traces: Traces) -> list[str]:
    """The latents that the guide gives one value and no density; not those that are a change of variables of auxiliary sites."""
    guide, model = latent_sites(traces.guide), latent_sites(traces.model)
    if set(guide) - set(model):  # held to their Jacobian by the contract
        return []
    return [n for n, s in model.items() if is_delta(guide[n]) and not isinstance(innermost(s["fn"]), Delta)]


@found_once
def discrete_sites(traces: Traces) -> list[str]:
    """The names of the model's discrete latents, but for those that are summed over."""
    summed = traces.known.get(few_states) or ()
    return [n for n, s in latent_sites(traces.model).items() if is_discrete(s["fn"]) and n not in summed]


def _scores_outside(traces: Traces, ours: Any, theirs: Any) -> bool:
    """Whether the guide draws where the model cannot be, and the model does not give such draws a density of zero."""
    stream = derive_seed("draws outside of a support")
    with evaluating(traces.program), isolated(), seeded(stream, device_of(traces.program)):
        try:
            known = narrower(theirs, ours)
            if known is not None and not bool(known.any()):
                return False
            drawn = ours.sample(torch.Size((OUTSIDE_DRAWS,)))
            inside = theirs.support.check(drawn)
        except (NotImplementedError, RuntimeError, ValueError):
            return False
        if bool(inside.all()):
            return False
        try:
            log_prob = theirs.log_prob(drawn)
        except ValueError:  # it looks, and refuses
            return False
        except (RuntimeError, IndexError):  # a number of no class
            return True
    return inside.shape == log_prob.shape and bool((~inside & ~torch.isneginf(log_prob)).any())
