"""What the latents say of the data: rate, distortion, mutual information, and the same unit by unit.

    rate        R = E_x KL(q(z | x) || p(z)),     distortion  D = -E_x E_q log p(x | z),     -ELBO = R + D
    rate        R = I_q(x; z) + KL(q(z) || p(z)), q(z) = E_x q(z | x) the aggregate posterior
    bounds      E log q(z_n | x_n) / (1/N sum_m q(z_n | x_m))  <=  I_q(x; z)  <=  the same without m = n, and R

Alemi et al. 2018, Fixing a broken ELBO, https://arxiv.org/abs/1711.00464 (rate and distortion); Hoffman & Johnson 2016, ELBO
surgery, http://approximateinference.org/accepted/HoffmanJohnson2016.pdf (the rate in two parts); Poole et al. 2019, On
variational bounds of mutual information, https://arxiv.org/abs/1905.06922 (the bounds with a known conditional density);
Burda, Grosse & Salakhutdinov 2016, https://arxiv.org/abs/1509.00519, section 5.2 (active units).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.errors import UserError
from pyro_vae.evaluation.coordinates import coordinate_log_prob
from pyro_vae.evaluation.evaluate import ACTIVE_VARIANCE
from pyro_vae.evaluation.means import guide_means
from pyro_vae.programs.contract import (
    SAMPLE_PLATE,
    Program,
    Traces,
    check,
    check_observed,
    device_of,
    evaluating,
    is_random,
    isolated,
    latent_sites,
    require_rows,
    trace,
)
from pyro_vae.programs.latents import AtValues, to_program
from pyro_vae.seeding import derive_seed, seeded

BLOCK_IMAGES = 250
PAIR_ELEMENTS = 2**22  # numbers in the latents of one block of pairs (draw, image)
CEILING = 0.1  # nats below log N from which on the lower bound says no more than that it is at its largest


@dataclass(frozen=True, eq=False)
class LatentInformation:
    """Rate, distortion and mutual information in nats per datum, and the units of the latents; tensors are float64, on the CPU.

    Attributes:
        names: of the D units, all sites side by side: ``z[0]``, ``z[1]``, ...
        mean_variance: variance of the guide's mean over the data, ``(D,)``.
        kl: E_x KL(q(z_d | x) || p(z_d)) of each unit's own marginals ``(D,)``; None where either has no closed form (flows).
            They add up to the rate where guide and prior are both products over units.
        rate, rate_se: E KL(q(z | x) || p(z)), and its standard error over data and draws.
        distortion, distortion_se: -E_q log p(x | z), likewise.
        information_lower: lower bound of I_q(x; z), at most log N; None where the guide cannot score a z that it did not draw,
            has auxiliary sites, or is conditional on labels.
        information_upper: upper bound of it, the smaller of the leave-one-out bound and the rate.
        information_se: standard error of either over data and draws (one per datum: of few data the two may change places).
        num_data: N.
        num_samples: draws per datum.
    """

    names: tuple[str, ...]
    mean_variance: Tensor
    kl: Tensor | None
    rate: float
    rate_se: float
    distortion: float
    distortion_se: float
    information_lower: float | None
    information_upper: float | None
    information_se: float | None
    num_data: int
    num_samples: int

    @property
    def active(self) -> Tensor:
        """Which units are active, ``(D,)``: the variance of the guide's mean over the data is above 0.01."""
        return self.mean_variance > ACTIVE_VARIANCE

    @property
    def num_active(self) -> int:
        """The number of active units."""
        return int(self.active.sum())

    @property
    def collapsed(self) -> tuple[str, ...]:
        """The names of the units that are not active: the guide leaves them at the prior, whatever x is."""
        return tuple(name for name, active in zip(self.names, self.active.tolist(), strict=True) if not active)

    @property
    def marginal_kl(self) -> tuple[float, float] | None:
        """Bounds of KL(q(z) || p(z)), the rate's other part: what a prior that fits the aggregate posterior would save."""
        if self.information_lower is None or self.information_upper is None:
            return None
        return (max(0.0, self.rate - self.information_upper), max(0.0, self.rate - self.information_lower))

    @cached_property
    def warnings(self) -> list[str]:
        """What stands against the figures, each a line with the figure, the cause and the remedy."""
        found = []
        if self.num_active == 0:
            found.append(
                f"none of {len(self.names)} units is active: the posterior has collapsed to the prior, and x does not depend on "
                "z; use KL warm-up or free bits, or a weaker decoder"
            )
        ceiling = math.log(self.num_data)
        if self.information_lower is not None and self.information_lower > ceiling - CEILING:
            found.append(
                f"the lower bound of I(x; z), {self.information_lower:.2f} nats, is at its ceiling log N = {ceiling:.2f}: all "
                "that is known is that the data are told apart; use more data"
            )
        return found

    def summary(self) -> dict[str, Any]:
        """Plain numbers for a table or JSON, in nats per datum; what is undefined is None."""
        numbers = {
            "rate": self.rate,
            "rate_se": self.rate_se,
            "distortion": self.distortion,
            "distortion_se": self.distortion_se,
            "information_lower": self.information_lower,
            "information_upper": self.information_upper,
            "information_se": self.information_se,
        }
        plain: dict[str, Any] = {k: v if v is not None and math.isfinite(v) else None for k, v in numbers.items()}
        return {
            **plain,
            "active_units": self.num_active,
            "num_units": len(self.names),
            "collapsed": list(self.collapsed),
            "kl_per_unit": None if self.kl is None else dict(zip(self.names, self.kl.tolist(), strict=True)),
            "num_data": self.num_data,
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        line = (
            f"rate {self.rate:.2f} +- {self.rate_se:.2g}, distortion {self.distortion:.2f} +- {self.distortion_se:.2g} nats; "
            f"{self.num_active} of {len(self.names)} units active"
        )
        if self.information_lower is not None and self.information_upper is not None:
            bounds = f"{self.information_lower:.2f} and {self.information_upper:.2f}"
            line += f"; I(x; z) between {bounds} +- {self.information_se:.2g} nats"
        return "\n".join([f"{line} (N = {self.num_data})", *(f"warning: {w}" for w in self.warnings)])


def latent_information(
    program: Program, x: Tensor, y: Tensor | None = None, *, num_samples: int = 8, seed: int = 0
) -> LatentInformation:
    """Rate, distortion, bounds of the mutual information of x and z, and KL and activity of each unit of the latents.

    The bounds score every datum's draw under every datum's q(z | x): N^2 densities.

    Args:
        program: any Program.
        x: data ``(N, *event)``; active units are counted on 500 training images in the reference.
        y: what a conditional program is conditioned on, ``(N, ...)``.
        num_samples: draws per datum for the rate, the distortion and the units' KL.
        seed: of the draws; torch's generators are put back.

    Raises:
        UserError: fewer than two data, or data outside the likelihood's support.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.build("ppca", "linear", (3,), latent_dim=2)
        >>> found = pv.latent_information(vae, torch.randn(50, 3))
        >>> found.names, found.kl.shape
        (('z[0]', 'z[1]'), torch.Size([2]))
    """
    require_rows(x, program)
    if len(x) < 2:
        raise UserError(f"expected data (N, *event) with at least two rows, got {tuple(getattr(x, 'shape', ()))}")
    if num_samples < 1:
        raise UserError(f"expected num_samples of at least 1, got {num_samples}")
    parts = [_block(program, x, y, first, num_samples, seed) for first in range(0, len(x), BLOCK_IMAGES)]
    rate, distortion = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    units = [part[2] for part in parts if part[2] is not None]
    names, means = guide_means(program, x, y)
    lower, upper, error = _information(program, x, seed) if y is None and _scores_any(program) else (None, None, None)
    return LatentInformation(
        names=names,
        mean_variance=means.var(0),
        # one-hot sites have one KL for all classes of a unit
        kl=torch.cat(units).mean(0) if units and units[0].shape[1] == len(names) else None,
        rate=float(rate.mean()),
        rate_se=_se(rate),
        distortion=float(distortion.mean()),
        distortion_se=_se(distortion),
        information_lower=lower,
        information_upper=None if upper is None else min(upper, float(rate.mean())),
        information_se=error,
        num_data=len(x),
        num_samples=num_samples,
    )


def _block(
    program: Program, x: Tensor, y: Tensor | None, first: int, num_samples: int, seed: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rate and distortion ``(batch,)`` and the units' KL ``(batch, D)`` of one block of data, over the draws."""
    rows = slice(first, first + BLOCK_IMAGES)
    block, block_y = to_program(program, x[rows]), None if y is None else y[rows].to(device_of(program))
    check_observed(check(program, block, block_y), block)
    with evaluating(program), isolated(), seeded(derive_seed("rate and distortion", seed, first), block.device):
        traces = trace(program, block, block_y, num_samples=num_samples)
        terms = traces.terms(num_samples, len(block))
        units = _units(traces, num_samples, len(block))
    rate = (terms.log_guide - terms.log_prior).double().mean(0).cpu()
    return rate, -terms.log_likelihood.double().mean(0).cpu(), units


def _units(traces: Traces, num_samples: int, batch: int) -> Tensor | None:
    """KL(q(z_d | x) || p(z_d)) ``(batch, D)`` by the draws; None where a site's marginals are not known."""
    found = []
    for name, site in latent_sites(traces.model).items():
        value = traces.guide.nodes[name]["value"]
        terms = [coordinate_log_prob(fn, value) for fn in (traces.guide.nodes[name]["fn"], site["fn"])]
        if terms[0] is None or terms[1] is None:
            return None
        ratio = (terms[0].double() - terms[1].double()).mean(0)
        found.append(ratio.expand(batch, *ratio.shape[1:]).reshape(batch, -1).cpu())
    return torch.cat(found, 1)


def _scores_any(program: Any) -> bool:
    """Whether the guide's density at a z that it did not draw is at hand, and cheap."""
    return getattr(getattr(program, "posterior", None), "scoring", "cheap") == "cheap"


def _information(program: Program, x: Tensor, seed: int) -> tuple[float | None, float | None, float | None]:
    """The lower and the leave-one-out bound of I_q(x; z), and their standard error."""
    x = to_program(program, x)
    with evaluating(program), isolated():
        with seeded(derive_seed("information", seed, len(x)), x.device), pyro.plate(SAMPLE_PLATE, 1, dim=-2):
            drawn = latent_sites(poutine.trace(program.guide).get_trace(x))
        if any(site["infer"].get("is_auxiliary") for site in drawn.values()):
            return None, None, None
        values = {n: s["value"].expand(1, len(x), *s["fn"].event_shape)[0] for n, s in drawn.items()}
        size = max(1, PAIR_ELEMENTS // (len(x) * max(1, sum(v[0].numel() for v in values.values()))))
        try:
            rows = [_pairs(program, x, values, first, size) for first in range(0, len(x), size)]
        except NotImplementedError:  # a guide of the user's that has no inverse
            return None, None, None
    log_q = torch.cat(rows)
    own, count = log_q.diagonal(), len(x)
    lower = own - (log_q.logsumexp(1) - math.log(count))
    others = log_q.masked_fill(torch.eye(count, dtype=torch.bool), -math.inf).logsumexp(1) - math.log(count - 1)
    return float(lower.mean()), float((own - others).mean()), max(_se(lower), _se(own - others))


def _pairs(program: Program, x: Tensor, values: dict[str, Tensor], first: int, size: int) -> Tensor:
    """Log q(z_n | x_m) ``(size, N)`` of the draws from ``first`` on, under every datum's guide."""
    chosen = {n: v[first : first + size].unsqueeze(1).expand(-1, len(x), *v.shape[1:]) for n, v in values.items()}
    num = len(next(iter(chosen.values())))
    with seeded(derive_seed("information: scores"), x.device), pyro.plate(SAMPLE_PLATE, num, dim=-2), AtValues(chosen):
        traced: Any = poutine.trace(program.guide).get_trace(x)
    total = sum(s["fn"].log_prob(s["value"]) for s in traced.nodes.values() if is_random(s))
    return torch.as_tensor(total).expand(num, len(x)).double().cpu()


def _se(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values))
