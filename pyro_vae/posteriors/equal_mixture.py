"""(1/S) sum_s q_s(z): a mixture of equal weights whose draws are differentiable, and stratified where that is asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_vae.posteriors.base import Distribution


class EqualMixture(dist.TorchDistribution):
    """q(z) = (1/S) sum_s q_s(z), the component of a draw chosen at random, or (``stratified``) by turns.

    Weights that are equal have no gradient, and a draw is differentiable in its component's parameters: E_q[f] has the gradient
    (1/S) sum_s E[d f(z_s)], without a score of the choice. Stratified, every S draws in a row of one element of the batch hold
    one of each component, in an order of their own: each alone is a draw of q, of one row or of several latents, and
    their mean has the variance within components alone (Veach & Guibas 1995, https://doi.org/10.1145/218380.218498). S in a row
    are then what is independent of each other.

    Draws are scored under the component that made them by what that remembers of them.

    Args:
        components: S distributions of one batch shape and event shape; what they cost to score, their mixture costs S times.
        batch_shape: theirs, or with axes of draws in front of it.
        stratified: whether draws along these axes are.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(
        self, components: Sequence[Distribution], batch_shape: torch.Size | None = None, stratified: bool = False
    ) -> None:
        first: Any = components[0]
        self.components, self.stratified = tuple(components), stratified
        super().__init__(first.batch_shape if batch_shape is None else batch_shape, first.event_shape, False)
        self._drawn: tuple[Tensor, list[Tensor], Tensor] | None = None

    @property
    def strata(self) -> int:
        """Draws in a row that depend on each other."""
        return len(self.components) if self.stratified else 1

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether every component's draws are differentiable."""
        return all(q.has_rsample for q in self.components)

    @property
    def support(self) -> Any:
        """That of the components."""
        return self.components[0].support

    @property
    def mean(self) -> Tensor:
        """The components' mean, which need not be near any of them."""
        means = torch.stack([q.mean for q in self.components])
        return means.mean(0).expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """Within components, and between their means."""
        within = torch.stack([q.variance for q in self.components]).mean(0)
        between = torch.stack([q.mean for q in self.components]).var(0, correction=0)
        return (within + between).expand(self.batch_shape + self.event_shape)

    def in_strata(self) -> EqualMixture:
        """The same density, whose draws are stratified."""
        return EqualMixture(self.components, self.batch_shape, stratified=True)

    def expand(self, batch_shape: Any, _instance: Any = None) -> EqualMixture:
        """The same density for every element of a batch."""
        batch_shape = torch.Size(batch_shape)
        inner = self.components[0].batch_shape
        own = batch_shape[len(batch_shape) - len(inner) :]
        components = self.components if own == inner else [q.expand(own) for q in self.components]
        return EqualMixture(components, batch_shape, self.stratified)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws ``(*sample_shape, *batch_shape, *event_shape)``, differentiable in the components' parameters."""
        shape, size = torch.Size(sample_shape) + self.batch_shape, len(self.components)
        inner = self.components[0].batch_shape
        number = shape[: len(shape) - len(inner)].numel()
        rounds = -(-number // size) if self.stratified else number
        drawn = [q.rsample((rounds,)) if q.has_rsample else q.sample((rounds,)) for q in self.components]
        noise = torch.rand(rounds, *inner, *[size] * self.stratified, device=drawn[0].device)
        order = noise.argsort(-1) if self.stratified else (noise * size).long().clamp(max=size - 1).unsqueeze(-1)
        order = order.movedim(-1, 1)  # (rounds, S or 1, *inner)
        z = self._chosen(torch.stack(drawn, 1), order)[:number].reshape(shape + self.event_shape)
        self._drawn = (z, drawn, order)
        return z

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """The same without a gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log q(z) ``(*leading,)`` of ``value`` ``(*leading, *event_shape)``."""
        own = None
        if self._drawn is not None and value is self._drawn[0]:
            _, drawn, order = self._drawn
            scored = torch.stack([q.log_prob(z) for q, z in zip(self.components, drawn, strict=True)], 1)
            leading = value.shape[: value.dim() - len(self.event_shape)]
            number = leading[: len(leading) - order.dim() + 2].numel()
            own = self._chosen(scored, order)[:number].reshape(leading)
            made_by = order.flatten(0, 1)[:number].reshape(leading)
        terms = [q.log_prob(value) for q in self.components]
        if own is not None:
            terms = [torch.where(made_by == s, own, term) for s, term in enumerate(terms)]
        found: Tensor = torch.stack(terms).logsumexp(0) - math.log(len(terms))
        return found.expand(torch.broadcast_shapes(found.shape, self.batch_shape))

    @staticmethod
    def _chosen(values: Tensor, order: Tensor) -> Tensor:
        """Of ``values`` ``(rounds, S, *inner, ...)`` those of the components ``order``, one after the other."""
        index = order.reshape(*order.shape, *[1] * (values.dim() - order.dim()))
        index = index.expand(*order.shape, *values.shape[order.dim() :])
        return values.gather(1, index).flatten(0, 1)
