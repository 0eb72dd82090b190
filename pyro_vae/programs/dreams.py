"""Rows that a model makes, with the latents that they were made from: (z, x) ~ p(z) p(x | z)."""

from __future__ import annotations

from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.programs.masks import counted
from pyro_vae.programs.trace import Program, Traced, is_random, latent_sites, run


class Unobserved(Messenger):
    """Draw what the model observes; its site says so in ``infer``."""

    def _pyro_sample(self, msg: Any) -> None:
        if is_random(msg) and msg["is_observed"]:
            msg["is_observed"], msg["value"], msg["done"] = False, None, False
            if not callable(msg["fn"]):  # of torch's own, which Pyro scores, and cannot draw from
                msg["value"], msg["done"] = msg["fn"].sample(), True
            msg["infer"] = {**msg["infer"], "was_observed": True}


def dream(program: Program, x: Tensor, y: Tensor | None) -> tuple[Traced, str, dict[str, Tensor], Tensor]:
    """The model's run, its observation's name, latents by site and rows drawn; inside of ``isolated``, with torch's generators.

    What x lacks (a mask, NaN) the drawn rows ``(rows, *event)`` lack as well; latents are ``(rows, *latent)``.
    """
    traced = run(program.model, x, y, at=Unobserved())
    name = next(n for n, s in traced.nodes.items() if is_random(s) and s["infer"].get("was_observed"))
    rows, site = len(x), traced.nodes[name]
    value = site["value"].expand(rows, *site["fn"].event_shape).reshape(x.shape)
    if (mask := counted(site)) is not None:
        value = value.where(mask.to(x.device).expand(rows, *site["fn"].event_shape).reshape(x.shape), x)
    drawn = x.where(x.isnan(), value.to(x.dtype))
    sites = {n: s for n, s in latent_sites(traced).items() if n != name}
    return traced, name, {n: s["value"].expand(rows, *s["fn"].event_shape) for n, s in sites.items()}, drawn
