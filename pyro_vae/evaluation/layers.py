"""What each layer of latents carries, and which layers carry nothing.

    KL_l = E_x E_q [log q(z_l | ...) - log p(z_l | ...)],      each given what is drawn before it; they add up to the rate

A layer has collapsed where its KL is none, or none of its units is active: the ELBO is then that of a model without its latents
(Sonderby et al. 2016, https://arxiv.org/abs/1602.02282, section 3). Of a guide from the top down the KL alone can tell: units of
a lower layer move with the layers above them, and are active by what these know.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae.evaluation.activity import Activity
from pyro_vae.precision import wide
from pyro_vae.programs.trace import Program, isolated, latent_sites, site_log_prob, trace
from pyro_vae.programs.walk import Walk, at_once
from pyro_vae.seeding import derive_seed, seeded

DRAWS = 8  # per datum
LEAST = 0.01  # nats per datum that a layer carries


def kl_of_layers(program: Program, x: Tensor, y: Tensor | None = None, *, seed: int = 0) -> dict[str, float]:
    """E_x KL_l in nats per datum, by latent site in the order of the guide; sites of the guide alone count whole.

    Args:
        program: any Program.
        x: data ``(N, *event)``.
        y: what a conditional program is conditioned on, ``(N, ...)``.
        seed: of the draws; torch's generators are put back.

    Example:
        >>> import pyro_vae as pv
        >>> list(kl_of_layers(pv.build("two-layer", "diagonal", (1, 4, 4)), torch.zeros(3, 1, 4, 4)))
        ['z1', 'z2']
    """
    walk = Walk(program, x, y, rows=at_once("information"))
    for block in walk:
        with block, isolated(), seeded(derive_seed("KL of layers", seed, block.first), block.x.device):
            traces = trace(program, block.x, block.y, num_samples=DRAWS)
            found = {}
            for name, site in latent_sites(traces.guide).items():
                ratio = wide(site_log_prob(site))
                if name in traces.model.nodes:
                    ratio = ratio - wide(site_log_prob(traces.model.nodes[name]))
                found[name] = ratio.expand(DRAWS, len(block)).mean(0).cpu()
            walk.keep(found)
    parts = walk.gathered()
    return {name: float(torch.cat([part[name] for part in parts]).mean()) for name in parts[0]}


def collapsed_layers(activity: Activity, kl: dict[str, float]) -> list[str]:
    """A line for each layer that carries nothing or has no active unit, where others do and have."""
    if not any(activity.counts):
        return []  # of which evaluation.degenerate speaks
    return [
        f"the layer {name!r} has collapsed: its KL is {kl[name]:.2g} nats, and {count or 'none'} of its {activity.sites[name]} "
        "units are active; use KL warm-up, free bits per layer (free-bits:per=layer) or a guide from the top down, or leave the "
        "layer out"
        for name, count in zip(activity.sites, activity.counts, strict=True)
        if count == 0 or (len(kl) > 1 and abs(kl[name]) < LEAST)
    ]
