"""What every posterior is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor, nn

from pyro_vae.networks.heads import Head
from pyro_vae.networks.masked import MaskedNet

Shape = tuple[int, ...]


class Posterior(nn.Module, ABC):
    """A density q(z | x) over latents of ``latent_shape``, given the features that an encoder made of x.

    A subclass writes :meth:`forward`, owns the linear heads on the features, and says its ``formula``, its
    ``support`` and what it costs to score a z that it did not draw: ``"cheap"`` (about one evaluation),
    ``"sequential"`` (one evaluation per latent dimension) or ``"impossible"``.
    """

    formula: ClassVar[str]
    support: ClassVar[constraints.Constraint] = constraints.real_vector
    scoring: ClassVar[Literal["cheap", "sequential", "impossible"]] = "cheap"
    reparameterized: ClassVar[bool] = True
    components: int = 1  # densities of this cost that scoring one z takes

    def __init__(self, feature_shape: Shape, latent_shape: Shape) -> None:
        super().__init__()
        self.feature_shape, self.latent_shape = tuple(feature_shape), tuple(latent_shape)

    @abstractmethod
    def forward(self, features: Tensor) -> Distribution:
        """q(z | x) with batch shape ``(*leading,)`` for ``features`` ``(*leading, *feature_shape)``."""

    def seams(self) -> list[nn.Module]:
        """The linear maps that features enter, whose outputs ``(*leading, ...)`` are what the density of one datum is made of.

        The heads, and what a flow's conditioners take of their context. Where these outputs are free, so is the density, to be
        any member of its family. A posterior that lets features in by maps of its own names them here.
        """
        contexts = [m.context for m in self.modules() if isinstance(m, MaskedNet) and m.context is not None]
        return [*(m for m in self.modules() if isinstance(m, Head)), *contexts]

    def extra_repr(self) -> str:
        """Formula and shape, for ``repr``."""
        return f"{self.formula}, latent_shape={self.latent_shape}"
