"""p(z) = N(m, L L^T)."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.networks.heads import positive, positive_inverse
from pyro_vae.priors.base import Distribution, GuideDensity, Prior, Shape
from pyro_vae.registry import register

MIN_SCALE = 1e-3  # of the diagonal of L


@register("priors", "full-normal")
class FullNormal(Prior):
    """p(z) = N(z; m, L L^T), the mean and the lower-triangular L learned; starts at N(0, I).

    Where the decoder begins with a linear map this adds no new model, only another road to it; where the guide is
    diagonal, the two differ. Rezende, Mohamed & Wierstra 2014, https://arxiv.org/abs/1401.4082.
    """

    formula = "p(z) = N(m, L L^T)"

    def __init__(self, latent_shape: Shape) -> None:
        super().__init__(latent_shape)
        dim = torch.Size(latent_shape).numel()
        self.loc = nn.Parameter(torch.zeros(dim))
        self.raw_diagonal = nn.Parameter(torch.full((dim,), positive_inverse(1.0, MIN_SCALE)))
        self.below = nn.Parameter(torch.zeros(dim, dim))  # what lies on and above the diagonal is never read

    def forward(self, like: Tensor, guide: GuideDensity | None = None) -> Distribution:
        """The normal, with batch shape ``()``."""
        scale_tril = self.below.tril(-1) + positive(self.raw_diagonal, MIN_SCALE).diag_embed()
        return dist.MultivariateNormal(self.loc, scale_tril=scale_tril, validate_args=False)
