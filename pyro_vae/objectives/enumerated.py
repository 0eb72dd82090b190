"""The ELBO of one discrete latent site, its expectation summed over the whole support."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyro_vae.errors import UserError
from pyro_vae.objectives.base import Objective
from pyro_vae.objectives.particles import Particles
from pyro_vae.programs.states import MOST_STATES, for_rows, is_enumerable, number_of_states, states
from pyro_vae.programs.trace import Program, innermost, isolated, latent_sites, run, site_log_prob
from pyro_vae.registry import register

OTHERWISE = "use elbo, whose score-function gradient has the same expectation, or a relaxed posterior"


@register("objectives", "enumerated-elbo")
class EnumeratedELBO(Objective):
    """loss = -sum_z q(z | x) [log p(x, z) - log q(z | x)]: the exact ELBO and its exact gradient, with no draw of z.

    For a guide with one discrete site of at most 1,024 states: one categorical of K classes has K, D of them K^D, D bits 2^D.
    All states of all images are decoded in one pass. Rao-Blackwellised to the end, it has the expectation of the
    score-function gradient of ``elbo`` and none of its variance: Titsias & Lazaro-Gredilla 2015, https://arxiv.org/abs/1503.01494.

    Args:
        marginal: minimise -log p(x) instead, which the same sum gives, and KL(p(z | x) || q(z | x)) beside it, which the guide
            follows: what expectation maximisation does for a mixture (Dempster, Laird & Rubin 1977), by gradients.
    """

    enumerates = True
    formula = "-sum_z q(z | x) [log p(x, z) - log q(z | x)]"

    def __init__(self, *, marginal: bool = False) -> None:
        self.marginal = marginal

    def __call__(
        self, program: Program, x: Tensor, y: Tensor | None = None, step: Tensor | int = 0
    ) -> tuple[Tensor, Tensor]:
        """Minus the ELBO; the loss is its own surrogate."""
        with isolated():
            drawn = run(program.guide, x, y, num_samples=1)
        name, site = _the_site(latent_sites(drawn))
        values = states(site["fn"])
        drawn.nodes[name] = {**site, "value": for_rows(program, values, len(x))}
        particles = Particles(program, x, y, len(values), drawn, lambda: drawn)
        # the chance of a state, whether or not the guide's density is masked or scaled where it is scored
        log_chance = site_log_prob(drawn.nodes[name], mask=False).expand(len(values), len(x))
        log_weight = particles.log_weight()
        if self.marginal:
            log_joint = log_weight + log_chance
            follow = log_joint.detach().softmax(0) * log_chance
            loss = -log_joint.logsumexp(0).mean()
            return loss.detach(), loss - follow.sum(0).mean()
        loss = -(log_chance.exp() * log_weight).sum(0).mean()
        return loss.detach(), loss


def _the_site(sites: dict[str, Any]) -> tuple[str, Any]:
    if len(sites) != 1:
        raise UserError(f"enumerated-elbo sums over one latent site, and the guide has {len(sites)}; {OTHERWISE}")
    ((name, site),) = sites.items()
    if not is_enumerable(site["fn"]):
        raise UserError(
            f"enumerated-elbo sums over the states of a discrete guide, and the site {name!r} is drawn from a continuum "
            f"({type(innermost(site['fn'])).__name__}); use elbo"
        )
    count, elements = number_of_states(site["fn"])
    if count**elements > MOST_STATES:
        raise UserError(
            f"the site {name!r} has {count}^{elements} states, and enumerated-elbo sums over at most {MOST_STATES:,}: "
            f"choose fewer latents, or {OTHERWISE}"
        )
    return name, site
