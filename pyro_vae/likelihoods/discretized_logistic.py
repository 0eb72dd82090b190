"""p(x | z) = prod_d a logistic distribution summed over the bin of each level."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import pyro.distributions as dist
import torch
from pydantic import Field
from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_vae.likelihoods.base import Distribution, Likelihood, Shape
from pyro_vae.likelihoods.lattice import Lattice, lattice
from pyro_vae.networks.heads import Head, positive, positive_inverse
from pyro_vae.registry import register

START_SCALE = 0.1  # in the units of x
MIN_SCALE = 1e-4


@register("likelihoods", "discretized-logistic")
class DiscretizedLogistic(Likelihood):
    """P(level) = sigma((x + h - m) / s) - sigma((x - h - m) / s), h half a level, the outermost bins open.

    Kingma et al. 2016, https://arxiv.org/abs/1606.04934; bits/dim with nothing to correct.

    Args:
        levels: what the data declare: 256 for 8-bit images, 17 for the digits.
        scale: ``"shared"`` (one learned s), ``"per-pixel"`` (one per pixel) or ``"decoder"`` (a function of z).
        mean: of the logistic: ``"identity"`` or ``"sigmoid"``.
    """

    formula = "p(x | z) = prod_d Logistic(bin of x_d; f_d(z), s_d)"
    data = "lattice"
    support = lattice(256)

    def __init__(
        self,
        feature_shape: Shape,
        event_shape: Shape,
        *,
        levels: Annotated[int, Field(ge=2, le=65_536)] = 256,
        scale: Literal["shared", "per-pixel", "decoder"] = "per-pixel",
        mean: Literal["identity", "sigmoid"] = "sigmoid",
    ) -> None:
        super().__init__(feature_shape, event_shape)
        self.levels, self.support, self.mean = levels, lattice(levels), mean  # type: ignore[misc]
        self.head = Head(feature_shape, event_shape, num_params=2 if scale == "decoder" else 1)
        raw = positive_inverse(START_SCALE, MIN_SCALE)
        if scale == "decoder":
            self.head.set_bias(raw, param=1)
        else:
            self.raw_scale = nn.Parameter(
                torch.full((1,) * len(event_shape) if scale == "shared" else event_shape, raw)
            )

    def forward(self, features: Tensor) -> Distribution:
        """The product, event shape ``event_shape``."""
        loc, *raw = self.head(features)
        loc = loc.sigmoid() if self.mean == "sigmoid" else loc
        level = LogisticLevel(loc, positive(raw[0] if raw else self.raw_scale, MIN_SCALE), self.levels)
        return Lattice(level, self.levels).to_event(len(self.event_shape))

    def start_at(self, mean: Tensor, spread: float | None = None) -> None:
        """Output bias = the mean image, through the inverse of the mean's transformation."""
        self.head.set_bias(mean.clamp(1e-3, 1 - 1e-3).logit() if self.mean == "sigmoid" else mean)


class LogisticLevel(dist.TorchDistribution):
    """k = the level nearest to a logistic number, the outermost levels taking all that lies beyond them.

    Args:
        loc, scale: of the logistic, in the units of level / (levels - 1).
        levels: their number.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, loc: Tensor, scale: Tensor, levels: int) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> LogisticLevel:
        """The same for every element of a batch."""
        shape = torch.Size(batch_shape)
        return LogisticLevel(self.loc.expand(shape), self.scale.expand(shape), self.levels)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        """0, ..., levels - 1."""
        return constraints.integer_interval(0, self.levels - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """log P(k) = log[sigma(b) - sigma(a)] = log sigma(b) + log sigma(-a) + log(1 - e^(a - b)): nothing cancels."""
        width = 1 / ((self.levels - 1) * self.scale)
        a = ((value - 0.5) / (self.levels - 1) - self.loc) / self.scale
        below = nn.functional.logsigmoid(a + width)
        above = nn.functional.logsigmoid(-a)
        # 1 - e^-w is w where w is tiny; a scale so large that w underflows has log w from the scale itself
        between = torch.where(width > 1e-6, (-torch.expm1(-width.clamp(min=1e-6))).log(), width.log())
        inner = below + above + between
        return torch.where(value <= 0, below, torch.where(value >= self.levels - 1, above, inner))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws of k, as floats."""
        with torch.no_grad():
            u = torch.rand(self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device)
            eps = torch.finfo(u.dtype).eps
            x = self.loc + self.scale * u.clamp(eps, 1 - eps).logit()
            return (x.clamp(0, 1) * (self.levels - 1)).round()

    @property
    def mean(self) -> Tensor:
        """sum_k P(level >= k), exactly."""
        total = torch.zeros_like(self.loc)
        for k in range(1, self.levels):
            total = total + ((self.loc - (k - 0.5) / (self.levels - 1)) / self.scale).sigmoid()
        return total
