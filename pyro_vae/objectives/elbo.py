"""The evidence lower bound: E_q[log p(x, z) - log q(z | x)] = reconstruction - KL.

The terms, scales and masks are those of Pyro's ``Trace_ELBO``, kept as tensors: Pyro's own reads every site's log-density to the
host, which neither a CUDA stream nor a captured graph can wait for.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Annotated, Any

import torch
from pydantic import Field
from pyro.distributions import Rejector
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae.errors import UserError
from pyro_vae.objectives.base import LAST_STEP, Objective
from pyro_vae.programs.columns import Layout, by_element, layout_of
from pyro_vae.programs.strata import InStrata
from pyro_vae.programs.summing import Summed, summed
from pyro_vae.programs.trace import (
    Program,
    Traced,
    innermost,
    is_random,
    isolated,
    latent_sites,
    log_probs,
    run,
    site_log_prob,
)
from pyro_vae.registry import register


def sampled(model: Traced, guide: Traced) -> tuple[Tensor, Tensor]:
    """The ELBO of the guide's draws, summed over them, and what to differentiate in its place.

    That is the ELBO itself where a site is reparameterized, and elsewhere the score of its draws times the log-weight (Ranganath,
    Gerrish & Blei 2014, https://arxiv.org/abs/1401.0118).
    """
    ours, theirs = log_probs(model, scale=True), log_probs(guide, scale=True)
    elbo: Any = sum(term.sum() for term in ours.values())
    surrogate = elbo
    for name, term in theirs.items():
        elbo, site = elbo - term.sum(), guide.nodes[name]
        if isinstance(innermost(site["fn"]), Rejector):
            raise UserError(
                f"the guide's site {name!r} draws by rejection, whose gradient has a part of its own: use another distribution"
            )
        if site["fn"].has_rsample:
            surrogate = surrogate - term.sum()
            continue
        log_weight: Any = sum((t - theirs[n] if n in theirs else t).detach() for n, t in ours.items())
        # of draws that are masked, or scaled, the score is that of the others
        surrogate = surrogate + (log_weight * site_log_prob(site, mask=False)).sum()
    return elbo, surrogate


def analytic(model: Traced, guide: Traced) -> tuple[Tensor, Tensor]:
    """The same with log q - log p of a latent site replaced by KL(q || p) wherever torch has it in closed form.

    Kingma & Welling 2014, https://arxiv.org/abs/1312.6114, equation 10 and appendix B: less variance, same mean. Every
    latent needs a reparameterized guide, and the guide must draw the latents in the order of the model. Where guide and model
    mask or scale a latent differently, its terms are estimated.
    """
    names, guide_names = list(latent_sites(model)), list(latent_sites(guide))
    if names != guide_names:
        raise UserError(
            f"the analytic KL needs the guide's sites in the order of the model's: {names}, got {guide_names}; use the "
            "objective elbo"
        )
    elbo: Any = 0.0
    for name, site in model.nodes.items():
        if not is_random(site):
            continue
        if site["is_observed"]:
            elbo = elbo + site_log_prob(site, scale=True).sum()
            continue
        guide_site = guide.nodes[name]
        if not guide_site["fn"].has_rsample:
            raise UserError(
                f"the analytic KL needs a reparameterized guide, and {name!r} is not; use the objective elbo"
            )
        try:
            kl = kl_divergence(*_of_one_batch(guide_site["fn"], site["fn"]))
        except NotImplementedError:
            elbo = elbo + site_log_prob(site, scale=True).sum() - site_log_prob(guide_site, scale=True).sum()
            continue
        kl = kl.expand(torch.broadcast_shapes(kl.shape, guide_site["fn"].batch_shape))
        kl = scale_and_mask(kl, site["scale"], site["mask"])
        same = _same_weights(site, guide_site)
        if same is not None:
            kl = torch.where(same, kl, site_log_prob(guide_site, scale=True) - site_log_prob(site, scale=True))
        elbo = elbo - kl.sum()
    for site in guide.nodes.values():
        if is_random(site) and site["is_observed"]:
            elbo = elbo - site_log_prob(site, scale=True).sum()
    return elbo, elbo


def _of_one_batch(q: Any, p: Any) -> tuple[Any, Any]:
    """Both of one batch shape: not every KL of torch's broadcasts (that of two Bernoullis does not)."""
    batch = torch.broadcast_shapes(q.batch_shape, p.batch_shape)
    return tuple(fn if fn.batch_shape == batch else fn.expand(batch) for fn in (q, p))


def _same_weights(a: Any, b: Any) -> Tensor | None:
    """Where scale and mask of two sites are the same, so that the KL between them can stand in; None where nothing weighs them.

    They are compared on the device, for no step may wait for the host.
    """
    if (
        a["mask"] is b["mask"] is None
        and not any(isinstance(s["scale"], Tensor) for s in (a, b))
        and a["scale"] == b["scale"]
    ):
        return None
    device = b["value"].device
    scales = [torch.as_tensor(s["scale"], device=device) for s in (a, b)]
    masks = [torch.as_tensor(True if s["mask"] is None else s["mask"], device=device) for s in (a, b)]
    return (scales[0] == scales[1]) & (masks[0] == masks[1])


def summed_elbo(found: Summed, names: Iterable[str]) -> Tensor:
    """The ELBO of records whose discrete latents ``names`` are summed over, summed over the other draws: its own surrogate."""
    for name, site in latent_sites(found.guide).items():
        if name not in names and not site["fn"].has_rsample:
            raise UserError(
                f"the discrete latents of records are summed over, and the guide's site {name!r} beside them is drawn and not "
                "reparameterized: use wake-sleep, or a reparameterized distribution"
            )
    ours, theirs = (log_probs(traced, scale=True).values() for traced in (found.model, found.guide))
    return found.mean((sum(ours) - sum(theirs)).expand(found.log_chance.flatten(0, 1).shape)).sum()  # type: ignore[union-attr]


def labelled(guide: Traced, layout: Layout, x: Tensor) -> Tensor:
    """log q of what is present of the columns that the guide draws elsewhere, mean over draws, summed over rows."""
    record, found = layout.unpacked(x), x.new_zeros(())
    for name in layout.guided:
        site, known = guide.nodes[name], record.present[name]
        if known.dim() > 1:
            log_prob = by_element(site["whole"], known.reshape(len(x), *site["fn"].event_shape)).log_prob(site["value"])
        else:
            log_prob = site.get("whole", site["fn"]).log_prob(site["value"])
            log_prob = torch.where(known, log_prob, torch.zeros_like(log_prob))
        found = found + log_prob.reshape(-1, len(x)).mean(0).sum()
    return found


class _ScaleLatents(Messenger):
    """Multiply the log-densities of latent sites by ``beta``, and leave the observation alone."""

    def __init__(self, beta: Tensor | float) -> None:
        super().__init__()
        self.beta = beta

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.beta


class _ELBO(Objective):
    """Reconstruction minus beta times KL; subclasses choose the estimator of the KL."""

    estimator: Any

    records = True

    def __init__(self, num_particles: int, beta: float, warmup_steps: int, label_weight: float = 0.0) -> None:
        self.num_particles, self.beta, self.warmup_steps = num_particles, beta, warmup_steps
        self.label_weight = label_weight
        self.is_elbo = beta == 1 and num_particles == 1 and label_weight == 0

    def __call__(
        self, program: Program, x: Tensor, y: Tensor | None = None, step: Tensor | int = 0
    ) -> tuple[Tensor, Tensor]:
        """Minus the (weighted) ELBO of a minibatch, and its surrogate."""
        loss, surrogate, of_labels = self._losses(program, x, y, step)
        return loss, surrogate if self.label_weight == 0 else surrogate + of_labels

    def value(self, program: Program, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Minus the ELBO, and minus what labels weigh."""
        loss, _, of_labels = self._losses(program, x, y, LAST_STEP)
        return loss if self.label_weight == 0 else loss + of_labels.detach()

    def _losses(
        self, program: Program, x: Tensor, y: Tensor | None, step: Tensor | int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Minus the ELBO, its surrogate, and minus the weighted log q of labels, 0 where they have no weight."""
        num = self.num_particles if self.num_particles > 1 else None
        plain = self.beta == 1.0 and self.warmup_steps == 0
        layout = layout_of(program, x)
        with isolated(), nullcontext() if plain else _ScaleLatents(self.weight(x, step)):
            if layout is not None and layout.states is not None:
                guide, elbo, surrogate = self._summed(program, x, y, layout.states)
            else:
                with InStrata():
                    guide = run(program.guide, x, y, num_samples=num, once=self.estimator is not analytic)
                elbo, surrogate = self.estimator(run(program.model, x, y, num_samples=num, at=guide), guide)
        loss, surrogate = (-t / self.num_particles / x.shape[0] for t in (elbo.detach(), surrogate))
        if self.label_weight == 0:
            return loss, surrogate, loss
        if layout is None:
            raise UserError(
                "label_weight weighs labels of a record, and the data are none: fit(program, {'x': x, 'label': y})"
            )
        return loss, surrogate, -self.label_weight * labelled(guide, layout, x) / x.shape[0]

    def _summed(
        self, program: Program, x: Tensor, y: Tensor | None, states: dict[str, Tensor]
    ) -> tuple[Traced, Tensor, Tensor]:
        if self.estimator is analytic:
            raise UserError("the objective analytic-elbo does not sum over the discrete latents of a record: use elbo")
        found = summed(program, x, y, states, self.num_particles)
        elbo = summed_elbo(found, states)
        return found.guide, elbo, elbo

    def weight(self, like: Tensor, step: Tensor | int) -> Tensor:
        """The weight of the KL at a step, a scalar on the device of ``like``: beta * min(1, (step + 1) / warmup_steps)."""
        step = torch.as_tensor(step, dtype=like.dtype, device=like.device)
        return self.beta * ((step + 1) / max(1, self.warmup_steps)).clamp(max=1.0)


Particles = Annotated[int, Field(ge=1, le=100_000)]
Beta = Annotated[float, Field(gt=0)]
Steps = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]


@register("objectives", "elbo")
class ELBO(_ELBO):
    """loss = -E_q[log p(x | z) + beta * (log p(z) - log q(z | x))], as Pyro's ``Trace_ELBO``.

    Kingma & Welling 2014, https://arxiv.org/abs/1312.6114; beta: Higgins et al. 2017,
    https://openreview.net/forum?id=Sy2fzU9gl; KL warm-up: Bowman et al. 2016, https://arxiv.org/abs/1511.06349.

    Args:
        num_particles: draws of z per image.
        beta: the weight of the KL.
        warmup_steps: the number of optimizer steps over which the weight rises from 0 to beta.
        label_weight: of a record, alpha of what is added to the loss of rows in which columns that the guide draws elsewhere are
            present: -alpha log q(label | x), so that the guide learns from labels (Kingma et al. 2014,
            https://arxiv.org/abs/1406.5298, equation 9). It has no part in the reported loss, or in log p.
    """

    formula = "-E_q[log p(x | z) + beta (log p(z) - log q(z | x))]"
    estimator = staticmethod(sampled)

    def __init__(
        self, *, num_particles: Particles = 1, beta: Beta = 1.0, warmup_steps: Steps = 0, label_weight: Weight = 0.0
    ) -> None:
        super().__init__(num_particles, beta, warmup_steps, label_weight)


@register("objectives", "analytic-elbo")
class AnalyticELBO(_ELBO):
    """loss = -E_q[log p(x | z)] + beta * KL(q(z | x) || p(z)), with the KL in closed form where torch has one.

    Kingma & Welling 2014, https://arxiv.org/abs/1312.6114, equation 10. A pair without a closed form (a mixture prior)
    is estimated as in ``elbo``.

    Args:
        num_particles: draws of z per image.
        beta: the weight of the KL.
        warmup_steps: the number of optimizer steps over which the weight rises from 0 to beta.
    """

    formula = "-E_q[log p(x | z)] + beta KL(q(z | x) || p(z))"
    estimator = staticmethod(analytic)

    def __init__(self, *, num_particles: Particles = 1, beta: Beta = 1.0, warmup_steps: Steps = 0) -> None:
        super().__init__(num_particles, beta, warmup_steps)
