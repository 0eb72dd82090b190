"""The evidence lower bound: E_q[log p(x, z) - log q(z | x)] = reconstruction - KL.

Both objectives are Pyro's ``Trace_ELBO`` with its sums kept as tensors: Pyro's own reads every site's log-density to the
host, which neither a CUDA stream nor a captured graph can wait for. The terms are the same.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import Trace_ELBO
from pyro.infer.trace_elbo import _compute_log_r
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae.errors import UserError
from pyro_vae.objectives.base import Objective
from pyro_vae.programs.contract import Program, Traced, arguments, is_random, isolated, latent_sites
from pyro_vae.registry import register


class TensorTraceELBO(Trace_ELBO):
    """``Trace_ELBO`` whose particle losses are two tensors: the loss, and the surrogate to differentiate."""

    def particles(self, program: Program, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Loss and surrogate in nats, summed over the minibatch and averaged over particles."""
        loss, surrogate = x.new_zeros(()), x.new_zeros(())
        for model_trace, guide_trace in self._get_traces(program.model, program.guide, arguments(x, y), {}):
            a, b = self._differentiable_loss_particle(model_trace, guide_trace)
            loss, surrogate = loss + a / self.num_particles, surrogate + b / self.num_particles
        return loss, surrogate

    def _differentiable_loss_particle(self, model_trace: Traced, guide_trace: Traced) -> tuple[Any, Any]:
        elbo: Any = 0.0
        surrogate: Any = 0.0
        log_r = None
        for site in model_trace.nodes.values():
            if site["type"] == "sample":
                elbo = elbo + site["log_prob_sum"]
        surrogate = surrogate + elbo
        for site in guide_trace.nodes.values():
            if site["type"] == "sample":
                _, score_function, entropy = site["score_parts"]
                elbo = elbo - site["log_prob_sum"]
                if not is_identically_zero(entropy):
                    surrogate = surrogate - entropy.sum()
                if not is_identically_zero(score_function):
                    if log_r is None:
                        log_r = _compute_log_r(model_trace, guide_trace)
                    surrogate = surrogate + (log_r.sum_to(site["cond_indep_stack"]) * score_function).sum()
        return -elbo.detach(), -surrogate


class MeanFieldELBO(TensorTraceELBO):
    """The same with log q - log p of a latent site replaced by KL(q || p) wherever torch has it in closed form.

    Kingma & Welling 2014, https://arxiv.org/abs/1312.6114, equation 10 and appendix B: less variance, same mean. Every
    latent needs a reparameterized guide, and the guide must draw the latents in the order of the model. Where guide and model
    mask or scale a latent differently, its terms are estimated.
    """

    def _differentiable_loss_particle(self, model_trace: Traced, guide_trace: Traced) -> tuple[Any, Any]:
        names, guide_names = list(latent_sites(model_trace)), list(latent_sites(guide_trace))
        if names != guide_names:
            raise UserError(
                f"the analytic KL needs the guide's sites in the order of the model's: {names}, got {guide_names}; use the "
                "objective elbo"
            )
        elbo: Any = 0.0
        for name, site in model_trace.nodes.items():
            if not is_random(site):
                continue
            if site["is_observed"]:
                elbo = elbo + site["log_prob_sum"]
                continue
            guide_site = guide_trace.nodes[name]
            if not guide_site["fn"].has_rsample:
                raise UserError(
                    f"the analytic KL needs a reparameterized guide, and {name!r} is not; use the objective elbo"
                )
            try:
                kl = kl_divergence(guide_site["fn"], site["fn"])
            except NotImplementedError:
                elbo = elbo + site["log_prob_sum"] - guide_site["log_prob_sum"]
                continue
            kl = kl.expand(torch.broadcast_shapes(kl.shape, guide_site["fn"].batch_shape))
            kl = scale_and_mask(kl, site["scale"], site["mask"])
            same = _same_weights(site, guide_site)
            if same is not None:
                kl = torch.where(same, kl, guide_site["log_prob"] - site["log_prob"])
            elbo = elbo - kl.sum()
        for site in guide_trace.nodes.values():
            if is_random(site) and site["is_observed"]:
                elbo = elbo - site["log_prob_sum"]
        return -elbo.detach(), -elbo


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

    estimator: type[TensorTraceELBO]

    def __init__(self, num_particles: int, beta: float, warmup_steps: int) -> None:
        self.num_particles, self.beta, self.warmup_steps = num_particles, beta, warmup_steps
        self.is_elbo = beta == 1 and num_particles == 1

    def __call__(
        self, program: Program, x: Tensor, y: Tensor | None = None, step: Tensor | int = 0
    ) -> tuple[Tensor, Tensor]:
        """Minus the (weighted) ELBO of a minibatch, and its surrogate."""
        elbo = self.estimator(
            num_particles=self.num_particles, vectorize_particles=self.num_particles > 1, max_plate_nesting=1
        )
        with isolated():
            if self.beta == 1.0 and self.warmup_steps == 0:
                loss, surrogate = elbo.particles(program, x, y)
            else:
                with _ScaleLatents(self.weight(x, step)):
                    loss, surrogate = elbo.particles(program, x, y)
        return loss / x.shape[0], surrogate / x.shape[0]

    def weight(self, like: Tensor, step: Tensor | int) -> Tensor:
        """The weight of the KL at a step, a scalar on the device of ``like``: beta * min(1, (step + 1) / warmup_steps)."""
        step = torch.as_tensor(step, dtype=like.dtype, device=like.device)
        return self.beta * ((step + 1) / max(1, self.warmup_steps)).clamp(max=1.0)


Particles = Annotated[int, Field(ge=1, le=100_000)]
Beta = Annotated[float, Field(gt=0)]
Steps = Annotated[int, Field(ge=0)]


@register("objectives", "elbo")
class ELBO(_ELBO):
    """loss = -E_q[log p(x | z) + beta * (log p(z) - log q(z | x))], by Pyro's ``Trace_ELBO``.

    Kingma & Welling 2014, https://arxiv.org/abs/1312.6114; beta: Higgins et al. 2017,
    https://openreview.net/forum?id=Sy2fzU9gl; KL warm-up: Bowman et al. 2016, https://arxiv.org/abs/1511.06349.

    Args:
        num_particles: draws of z per image.
        beta: the weight of the KL.
        warmup_steps: the number of optimizer steps over which the weight rises from 0 to beta.
    """

    formula = "-E_q[log p(x | z) + beta (log p(z) - log q(z | x))]"
    estimator = TensorTraceELBO

    def __init__(self, *, num_particles: Particles = 1, beta: Beta = 1.0, warmup_steps: Steps = 0) -> None:
        super().__init__(num_particles, beta, warmup_steps)


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
    estimator = MeanFieldELBO

    def __init__(self, *, num_particles: Particles = 1, beta: Beta = 1.0, warmup_steps: Steps = 0) -> None:
        super().__init__(num_particles, beta, warmup_steps)
