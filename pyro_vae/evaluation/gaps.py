"""Where the ELBO loses: in the family of the guide, or in the network that finds its member.

    log p(x) - ELBO(q)  =  [log p(x) - ELBO(q*)]  +  [ELBO(q*) - ELBO(q)]
    inference gap       =   approximation gap     +   amortization gap

with q* the best member of a family for this one image, found by gradient ascent.
Cremer, Li & Duvenaud 2018, Inference suboptimality in variational autoencoders, https://arxiv.org/abs/1801.03558.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.errors import UserError
from pyro_vae.evaluation.importance import log_likelihood as importance_weighted
from pyro_vae.evaluation.result import LogLikelihood
from pyro_vae.evaluation.unconstrained import Unconstrained
from pyro_vae.programs.contract import SAMPLE_PLATE, Program, admit, device_of, evaluating, isolated
from pyro_vae.programs.latents import AtValues, to_program
from pyro_vae.programs.vae import VAE
from pyro_vae.seeding import derive_seed, seeded

BLOCK_IMAGES = 100
SAME_FAMILY = "the guide's own family, its features free per image"
DIAGONAL_NORMAL = "diagonal normals on the unconstrained latents"

# ELBO terms (num_draws, batch) in nats of so many reparameterized draws
Draws = Callable[[int], Tensor]


@dataclass(frozen=True, eq=False)
class InferenceGaps:
    """The gap between log p(x) and the ELBO in two parts; ``(N,)`` tensors in nats, float64, on the CPU.

    Attributes:
        log_likelihood: log p(x), and its standard error ``log_likelihood_se``.
        elbo_optimal: the ELBO of the best member of ``family`` per image, and its standard error ``elbo_optimal_se``.
        elbo: the guide's ELBO, and its standard error ``elbo_se``.
        family: over what the guide was optimised.
    """

    log_likelihood: Tensor
    log_likelihood_se: Tensor
    elbo_optimal: Tensor
    elbo_optimal_se: Tensor
    elbo: Tensor
    elbo_se: Tensor
    family: str

    @property
    def approximation(self) -> Tensor:
        """log p(x) - ELBO(q*), ``(N,)``: what the family cannot express."""
        return self.log_likelihood - self.elbo_optimal

    @property
    def amortization(self) -> Tensor:
        """ELBO(q*) - ELBO(q), ``(N,)``: what the encoder misses; negative where the guide's family is the richer one."""
        return self.elbo_optimal - self.elbo

    @property
    def approximation_se(self) -> float:
        """Monte Carlo error of the mean approximation gap."""
        return _mean_se(self.log_likelihood_se, self.elbo_optimal_se)

    @property
    def amortization_se(self) -> float:
        """Monte Carlo error of the mean amortization gap."""
        return _mean_se(self.elbo_optimal_se, self.elbo_se)

    def summary(self) -> dict[str, Any]:
        """Plain numbers for a table or JSON, in nats per image; what is undefined is None."""
        numbers = {
            "approximation_gap": float(self.approximation.mean()),
            "approximation_gap_se": self.approximation_se,
            "amortization_gap": float(self.amortization.mean()),
            "amortization_gap_se": self.amortization_se,
            "log_likelihood": float(self.log_likelihood.mean()),
            "elbo_optimal": float(self.elbo_optimal.mean()),
            "elbo": float(self.elbo.mean()),
        }
        plain: dict[str, Any] = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        return {**plain, "family": self.family, "num_data": len(self.elbo)}

    def __str__(self) -> str:
        return (
            f"inference gap {float((self.log_likelihood - self.elbo).mean()):.2f} nats = approximation "
            f"{float(self.approximation.mean()):.2f} +- {self.approximation_se:.1g} + amortization "
            f"{float(self.amortization.mean()):.2f} +- {self.amortization_se:.1g} (over {self.family})"
        )


def inference_gaps(
    program: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    log_likelihood: LogLikelihood | None = None,
    num_steps: int = 1000,
    num_draws: int = 16,
    num_final_draws: int = 1000,
    lr: float = 1e-2,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> InferenceGaps:
    """Split log p(x) - ELBO into approximation and amortization gaps.

    For a :class:`~pyro_vae.programs.vae.VAE` the features that the encoder hands to the posterior are freed, per image,
    and start where the encoder puts them. For any other Program a diagonal normal on the unconstrained latents starts at the
    guide's moments. Both climb the ELBO by Adam, the rate falling to zero along a cosine. Weights are not touched.

    Args:
        program: any Program; for one that is no VAE, with continuous latents.
        x: data ``(N, *event)`` as the program sees it.
        y: what a conditional program is conditioned on, ``(N, ...)``.
        log_likelihood: of the same x, by importance weighting or annealing; by default importance weighting with K = 5000.
        num_steps: steps of Adam.
        num_draws: draws per image and step.
        num_final_draws: draws per image of the ELBOs that are reported.
        lr: the rate at the start.
        seed: of the draws; torch's generators are put back.
        progress: called with the number of images after every block.

    Returns:
        The gaps per image, with errors.

    Raises:
        UserError: a posterior that is not reparameterized; discrete latents, by name.
    """
    if min(num_steps, num_draws) < 1 or num_final_draws < 2:
        raise UserError("expected num_steps and num_draws of at least 1, and num_final_draws of at least 2")
    admit(program, x, y)
    own = log_likelihood or importance_weighted(program, x, y, num_samples=5000, seed=seed)
    if len(own) != len(x):
        raise UserError(f"expected the log-likelihood of the same {len(x)} images, got {len(own)}")
    rows: list[tuple[Tensor, ...]] = []
    family = ""
    for first in range(0, len(x), BLOCK_IMAGES):
        part = slice(first, first + BLOCK_IMAGES)
        block = to_program(program, x[part])
        block_y = None if y is None else y[part].to(device_of(program))
        with evaluating(program), seeded(derive_seed("inference gaps", seed, first), block.device):
            amortized, free, parameters, family = _family(program, block, block_y)
            before = _final(amortized, num_final_draws, num_draws)
            _climb(free, parameters, num_steps, num_draws, lr)
            rows.append((*_final(free, num_final_draws, num_draws), *before))
        if progress is not None:
            progress(len(block))
    optimal, optimal_se, elbo, elbo_se = (torch.cat(column) for column in zip(*rows, strict=True))
    return InferenceGaps(own.log_likelihood, own.mc_se, optimal, optimal_se, elbo, elbo_se, family)


def _family(program: Any, x: Tensor, y: Tensor | None) -> tuple[Draws, Draws, list[Tensor], str]:
    """ELBO terms of the guide, those of a free member of the family, its parameters, and the family's name."""
    if isinstance(program, VAE):
        features = program.encoder(x)
        free = features.detach().clone().requires_grad_(True)
        if not program.posterior(features).has_rsample:
            raise UserError("the posterior is not reparameterized: its features cannot be optimised by gradient ascent")
        return _vae_draws(program, x, features), _vae_draws(program, x, free), [free], SAME_FAMILY
    density = Unconstrained(program, x, y)
    u = density.draw(256, guide=True)
    loc = u.mean(0).clone().requires_grad_(True)
    log_scale = u.std(0).clamp(min=1e-4).log().clone().requires_grad_(True)
    return _guide_draws(density), _normal_draws(density, loc, log_scale), [loc, log_scale], DIAGONAL_NORMAL


def _vae_draws(program: VAE, x: Tensor, features: Tensor) -> Draws:
    def draw(count: int) -> Tensor:
        q = program.posterior(features)
        z = q.rsample(torch.Size((count,)))
        return _log_joint(program, x, z) - q.log_prob(z)

    return draw


def _log_joint(program: VAE, x: Tensor, z: Tensor) -> Tensor:
    with isolated(), pyro.plate(SAMPLE_PLATE, len(z), dim=-2), AtValues({"z": z}):
        model = poutine.trace(program.model).get_trace(x)
    total = torch.zeros(len(z), len(x), dtype=z.dtype, device=z.device)
    for name in ("z", "x"):
        site: Any = model.nodes[name]
        total = total + site["fn"].log_prob(site["value"])
    return total


def _guide_draws(density: Unconstrained) -> Draws:
    def draw(count: int) -> Tensor:
        at = density.densities(density.draw(count, guide=True), guide=True)
        if at.log_guide is None:
            raise UserError("the guide has no density")
        return at.log_prior + at.log_likelihood - at.log_guide

    return draw


def _normal_draws(density: Unconstrained, loc: Tensor, log_scale: Tensor) -> Draws:
    def draw(count: int) -> Tensor:
        noise = torch.randn(count, *loc.shape, dtype=loc.dtype, device=loc.device)
        log_q = (-0.5 * noise.square() - log_scale - 0.5 * math.log(2 * math.pi)).sum(-1)
        return density.densities(loc + log_scale.exp() * noise).log_joint - log_q

    return draw


def _climb(free: Draws, parameters: list[Tensor], num_steps: int, num_draws: int, lr: float) -> None:
    """Adam on the summed ELBO of all images; each image's parameters see only their own."""
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        with torch.enable_grad():
            loss = -free(num_draws).mean(0).sum()
            grads = torch.autograd.grad(loss, parameters)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = torch.nan_to_num(grad)
        optimizer.step()
        schedule.step()


def _final(draws: Draws, count: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Mean ELBO and its standard error over ``count`` draws, each ``(batch,)``, float64, on the CPU."""
    with torch.no_grad():
        terms = torch.cat([draws(size).double().cpu() for size in _sizes(count, max(chunk, 64))])
    return terms.mean(0), terms.std(0) / math.sqrt(count)


def _sizes(total: int, chunk: int) -> Iterator[int]:
    for first in range(0, total, chunk):
        yield min(chunk, total - first)


def _mean_se(*errors: Tensor) -> float:
    return float(sum(e.square().sum() for e in errors) ** 0.5) / len(errors[0])
