"""The geometric path from a density that can be drawn from to the posterior.

    log f_b(u) = base(u) + b * tilt(u),     b from 0 to 1

    from the prior:  base = log p(z) + log |dz/du|,      tilt = log p(x | z)
    from the guide:  base = log q(z | x) + log |dz/du|,  tilt = log p(x, z) - log q(z | x)

so that f_0 integrates to 1 over u, and f_1 = p(x, u) to p(x).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyro_vae.errors import UserError
from pyro_vae.evaluation.graph import captured
from pyro_vae.evaluation.unconstrained import Unconstrained
from pyro_vae.precision import wide
from pyro_vae.seeding import seeded

Start = Literal["prior", "guide"]


@dataclass(frozen=True)
class Point:
    """Where the chains stand, with all that any temperature needs to know of it.

    ``u`` and the gradients ``base_grad``, ``tilt_grad`` are ``(chains, batch, D)``; ``base`` and ``tilt`` ``(chains, batch)``.
    """

    u: Tensor
    base: Tensor
    tilt: Tensor
    base_grad: Tensor
    tilt_grad: Tensor

    def log_density(self, beta: Tensor) -> Tensor:
        """log f_b(u), ``(chains, batch)``."""
        return self.base + beta * self.tilt

    def gradient(self, beta: Tensor) -> Tensor:
        """Its gradient in u, ``(chains, batch, D)``."""
        return self.base_grad + beta * self.tilt_grad

    def where(self, accept: Tensor, other: Point) -> Point:
        """This point where ``accept`` ``(chains, batch)``, the other elsewhere."""
        wide = accept.unsqueeze(-1)
        return Point(
            torch.where(wide, self.u, other.u),
            torch.where(accept, self.base, other.base),
            torch.where(accept, self.tilt, other.tilt),
            torch.where(wide, self.base_grad, other.base_grad),
            torch.where(wide, self.tilt_grad, other.tilt_grad),
        )


class Path:
    """The path for one block of images; call it with u for a :class:`Point`.

    Args:
        density: the program's log-densities on the block.
        num_chains: chains per image.
        start: ``"prior"`` or ``"guide"``.

    Attributes:
        edge: per image the share of draws of f_0 that numbers cannot tell from the edge of a support, ``(batch,)``.
    """

    def __init__(self, density: Unconstrained, num_chains: int, start: Start = "prior") -> None:
        if start not in ("prior", "guide"):
            raise UserError(f"expected start to be 'prior' or 'guide', got {start!r}")
        if start == "guide":
            density.require_guide_density()
        self.density, self.num_chains, self.guide = density, num_chains, start == "guide"
        try:
            u = self.draw(seed=0)
        except NotImplementedError:
            raise UserError(
                "a prior that cannot be drawn from (ImproperUniform) is no start of an annealing: anneal from the guide "
                "(start='guide')"
            ) from None
        self.edge = wide(density.at_edge(u)).mean(0) if density.has_edge else u.new_zeros(u.shape[1])
        beta = torch.full((), 0.5, dtype=u.dtype, device=u.device)
        self._point = captured(lambda u: self._evaluate(u), (u,), (0.9 * u,))
        self._slope = captured(lambda u, beta: self._gradient(u, beta), (u, beta), (0.9 * u, 0.5 * beta))

    def draw(self, seed: int) -> Tensor:
        """``u`` ``(chains, batch, D)`` from f_0."""
        with seeded(seed, self.density.x.device):
            return self.density.draw(self.num_chains, guide=self.guide)

    def __call__(self, u: Tensor) -> Point:
        """The point at ``u`` ``(chains, batch, D)``."""
        with torch.no_grad():
            return Point(u, *self._point(u))

    def gradient(self, u: Tensor, beta: Tensor) -> Tensor:
        """The gradient of log f_b at ``u``, ``(chains, batch, D)``."""
        with torch.no_grad():
            return self._slope(u, beta)[0]

    def _terms(self, u: Tensor) -> tuple[Tensor, Tensor]:
        at = self.density.densities(u, guide=self.guide)
        if at.log_guide is None:
            return at.log_prior + at.log_jacobian, at.log_likelihood
        return at.log_guide + at.log_jacobian, at.log_prior + at.log_likelihood - at.log_guide

    def _evaluate(self, u: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            u = u.detach().requires_grad_(True)
            base, tilt = self._terms(u)
            # Told what to multiply each term with, autograd has no use for its value: a graph of the gradient alone leaves
            # the log-densities out.
            ones = torch.ones(u.shape[:2], dtype=u.dtype, device=u.device)
            grads = [
                torch.autograd.grad(term, u, ones, retain_graph=True, allow_unused=True)[0]
                if term.requires_grad
                else None
                for term in (base, tilt)
            ]
        return (base.detach(), tilt.detach(), *(torch.zeros_like(u) if g is None else g for g in grads))

    def _gradient(self, u: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        _, _, base_grad, tilt_grad = self._evaluate(u)
        return (base_grad + beta * tilt_grad,)
