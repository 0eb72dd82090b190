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

import torch
from torch import Tensor

from pyro_vae.errors import UserError
from pyro_vae.evaluation import consistency
from pyro_vae.evaluation.activity import ACTIVE_VARIANCE, Activity, unit_activity
from pyro_vae.evaluation.degenerate import SURE, inactive
from pyro_vae.evaluation.layers import collapsed_layers, kl_of_layers
from pyro_vae.precision import wide
from pyro_vae.programs.coordinates import coordinate_log_prob
from pyro_vae.programs.door import door
from pyro_vae.programs.masks import counted
from pyro_vae.programs.scoring import scores_any
from pyro_vae.programs.trace import (
    Program,
    Traces,
    evaluating,
    isolated,
    latent_sites,
    latent_values,
    run,
    sum_log_prob,
    to_program,
    trace,
)
from pyro_vae.programs.walk import Block, Walk, at_once, spans
from pyro_vae.seeding import derive_seed, seeded

CEILING = 0.1  # nats below log N from which on the lower bound says no more than that it is at its largest


@dataclass(frozen=True, eq=False)
class LatentInformation:
    """Rate, distortion and mutual information in nats per datum, and the units of the latents; tensors are float64, on the CPU.

    Every standard error is over data drawn anew, and draws. There are two upper bounds of I_q(x; z), the rate and the
    leave-one-out bound; both are reported, since the smaller of two estimates lies below the smaller of what they estimate.

    Attributes:
        activity: the variance over the data of the guide's mean of each of the D units, with its error.
        kl: E_x KL(q(z_d | x) || p(z_d)) ``(D,)``, in a hierarchy given the latents before it; None where either has no
            closed form (flows). They add up to the rate where guide and prior are both products over units.
        rate, rate_se: E KL(q(z | x) || p(z)), an upper bound of I_q(x; z), and its standard error.
        distortion, distortion_se: -E_q log p(x | z), likewise.
        information_lower, information_lower_se: lower bound of I_q(x; z), at most log N; None where the guide cannot score a z
            that it did not draw, has auxiliary sites, is conditional on labels, or masks latents in some rows and not in others.
        information_upper, information_upper_se: the leave-one-out upper bound of it, None likewise. It is loose, and its error
            large, where the data are told apart well: the rate is the better one then.
        marginal_kl_se: standard errors of the two bounds of ``marginal_kl``.
        kl_per_layer: KL of each latent site, given those before it: they add up to the rate.
        num_data: N.
        num_samples: draws per datum.
        notes: what could not be found, and why.
        forbidden: which bounds cross, though theory forbids it, a line each (:mod:`pyro_vae.evaluation.consistency`).
    """

    activity: Activity
    kl: Tensor | None
    rate: float
    rate_se: float
    distortion: float
    distortion_se: float
    num_data: int
    num_samples: int
    kl_per_layer: dict[str, float]
    information_lower: float | None = None
    information_lower_se: float | None = None
    information_upper: float | None = None
    information_upper_se: float | None = None
    marginal_kl_se: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the D units, all sites side by side: ``z[0]``, ``z[1]``, ..."""
        return self.activity.names

    @property
    def mean_variance(self) -> Tensor:
        """Variance of the guide's mean over the data, ``(D,)``, unbiased (slightly negative by chance); NaN without a mean."""
        return self.activity.variance

    @property
    def information_se(self) -> float | None:
        """The larger of the errors of ``information_lower`` and ``information_upper``."""
        if self.information_lower_se is None or self.information_upper_se is None:
            return None
        return max(self.information_lower_se, self.information_upper_se)

    @property
    def active(self) -> Tensor:
        """Which units are active, ``(D,)``: the variance of the guide's mean over the data is above 0.01."""
        return self.activity.active

    @property
    def num_active(self) -> int:
        """The number of active units."""
        return int(self.active.sum())

    @property
    def collapsed(self) -> tuple[str, ...]:
        """The names of the units that are not active: what the guide says of them is the same for every x."""
        still = (self.mean_variance <= ACTIVE_VARIANCE).tolist()  # false of a unit without a mean, which is neither
        return tuple(name for name, collapsed in zip(self.names, still, strict=True) if collapsed)

    @property
    def marginal_kl(self) -> tuple[float, float] | None:
        """Bounds of KL(q(z) || p(z)), the rate's other part: what a prior that fits the aggregate posterior would save.

        The rate minus each bound of I(x; z), with the errors ``marginal_kl_se``. No KL is negative: a lower bound below 0 says
        nothing, an upper one below 0 by more than its error that an instrument is wrong.
        """
        if self.information_lower is None or self.information_upper is None:
            return None
        return (self.rate - self.information_upper, self.rate - self.information_lower)

    @cached_property
    def warnings(self) -> list[str]:
        """What stands against the figures, each a line with the figure, the cause and the remedy."""
        found = [*self.notes, *self.activity.warnings, *collapsed_layers(self.activity, self.kl_per_layer)]
        lower, se = self.information_lower, self.information_lower_se
        tells = lower is not None and se is not None and lower > SURE * se  # by spreads, or by many units a little each
        if not tells and (idle := inactive(self.activity, self.rate)) is not None:
            found.insert(0, idle)
        ceiling = math.log(self.num_data)
        if self.information_lower is not None and self.information_lower > ceiling - CEILING:
            found.append(
                f"the lower bound of I(x; z), {self.information_lower:.2f} nats, is at its ceiling log N = {ceiling:.2f}: all "
                "that is known is that the data are told apart; use more data"
            )
        return found

    def summary(self) -> dict[str, Any]:
        """Plain numbers for a table or JSON, in nats per datum; what is undefined is None."""
        names = ["rate", "rate_se", "distortion", "distortion_se", "information_lower", "information_lower_se"]
        names += ["information_upper", "information_upper_se", "information_se"]
        numbers = {name: getattr(self, name) for name in names}
        plain: dict[str, Any] = {k: v if v is not None and math.isfinite(v) else None for k, v in numbers.items()}
        return {
            **plain,
            "active_units": self.num_active,
            "num_units": len(self.names),
            "collapsed": list(self.collapsed),
            "kl_per_layer": self.kl_per_layer,
            "kl_per_unit": None if self.kl is None else dict(zip(self.names, self.kl.tolist(), strict=True)),
            "num_data": self.num_data,
            "warnings": [*self.forbidden, *self.warnings],
        }

    def __str__(self) -> str:
        line = (
            f"rate {self.rate:.2f} +- {self.rate_se:.2g}, distortion {self.distortion:.2f} +- {self.distortion_se:.2g} nats; "
            f"{self.num_active} of {len(self.names)} units active"
        )
        if self.information_lower is not None and self.information_upper is not None:
            lower = f"{self.information_lower:.2f} +- {self.information_lower_se:.2g}"
            upper = f"{self.information_upper:.2f} +- {self.information_upper_se:.2g}"
            line += f"; I(x; z) at least {lower}, at most {upper} (leave-one-out) and the rate"
        return "\n".join(
            [f"{line} (N = {self.num_data})", *(f"warning: {w}" for w in (*self.forbidden, *self.warnings))]
        )


@door(latents="latent_information", records=True)
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
    if len(x) < 2:
        raise UserError(f"expected data (N, *event) with at least two rows, got {tuple(getattr(x, 'shape', ()))}")
    if num_samples < 1:
        raise UserError(f"expected num_samples of at least 1, got {num_samples}")
    walk = Walk(program, x, y, rows=at_once("information"))
    for block in walk:
        with block:
            walk.keep(_rate(block, num_samples, seed))
    parts = walk.gathered()
    rate, distortion = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    units = [part[2] for part in parts if part[2] is not None]
    activity = unit_activity(program, x, y, seed=seed)
    bounds, notes = _information(program, x, y, seed)
    of_bounds: dict[str, Any] = {}
    if bounds is not None:
        lower, upper = bounds
        of_bounds = {
            "information_lower": float(lower.mean()),
            "information_lower_se": _se(lower),
            "information_upper": float(upper.mean()),
            "information_upper_se": _se(upper),
            "marginal_kl_se": (_se(rate - upper), _se(rate - lower)),
            "forbidden": _forbidden(lower, upper, rate),
        }
    found = LatentInformation(
        activity=activity,
        # one-hot sites have one KL for all classes of a unit
        kl=torch.cat(units).mean(0) if units and units[0].shape[1] == len(activity.names) else None,
        rate=float(rate.mean()),
        rate_se=_se(rate),
        distortion=float(distortion.mean()),
        distortion_se=_se(distortion),
        num_data=len(x),
        num_samples=num_samples,
        kl_per_layer=kl_of_layers(program, x, y, seed=seed),
        notes=notes,
        **of_bounds,
    )
    consistency.tell(found.forbidden)
    return found


def _forbidden(lower: Tensor, leave_one_out: Tensor, rate: Tensor) -> tuple[str, ...]:
    uppers = {"its leave-one-out upper bound": leave_one_out, "the rate": rate}
    return consistency.forbidden(consistency.of_information(lower, uppers))


def _rate(block: Block, num_samples: int, seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rate and distortion ``(batch,)`` and the units' KL ``(batch, D)`` of one block of data, over the draws."""
    with isolated(), seeded(derive_seed("rate and distortion", seed, block.first), block.x.device):
        traces = trace(block.walk.program, block.x, block.y, num_samples=num_samples)
        terms = traces.terms(num_samples, len(block))
        units = _units(traces, num_samples, len(block))
    rate = wide(terms.log_guide - terms.log_prior).mean(0).cpu()
    return rate, -wide(terms.log_likelihood).mean(0).cpu(), units


def _units(traces: Traces, num_samples: int, batch: int) -> Tensor | None:
    """KL(q(z_d | x) || p(z_d)) ``(batch, D)`` by the draws; None where a site's marginals are not known."""
    found = []
    for name, site in latent_sites(traces.model).items():
        value = traces.guide.nodes[name]["value"]
        terms = [coordinate_log_prob(part, value) for part in (traces.guide.nodes[name], site)]
        if terms[0] is None or terms[1] is None:
            return None
        ratio = (wide(terms[0]) - wide(terms[1])).mean(0)
        found.append(ratio.expand(batch, *ratio.shape[1:]).reshape(batch, -1).cpu())
    return torch.cat(found, 1)


def _information(
    program: Program, x: Tensor, y: Tensor | None, seed: int
) -> tuple[tuple[Tensor, Tensor] | None, tuple[str, ...]]:
    """Terms ``(N,)`` whose means are the lower and the leave-one-out bound of I_q(x; z); None, and why, where there are none.

    The terms are those of the estimate to first order in each datum (its influence): they spread as what stands behind the
    estimate does, where a datum counts with its own draw, and as one of the densities that every other draw is held against.
    """
    if y is not None or not scores_any(program):
        return None, ()
    x = to_program(program, x)
    with evaluating(program), isolated():
        with seeded(derive_seed("information", seed, len(x)), x.device):
            traced = run(program.guide, x, num_samples=1)
        drawn = latent_sites(traced)
        if any(site["infer"].get("is_auxiliary") for site in drawn.values()):
            return None, ()
        for name, site in drawn.items():
            mask = counted(site)
            if mask is not None and not _same_rows(mask, len(site["fn"].event_shape)):
                return None, (
                    f"the guide masks {name!r} in some rows and not in others: no two of them have densities of the same "
                    "latents, and I(x; z) has no bounds; give rows of one kind",
                )
        values = {n: v[0] for n, v in latent_values(traced, 1, len(x)).items()}
        size = at_once("information: pairs", len(x) * max(1, sum(v[0].numel() for v in values.values())))
        try:
            rows = [_pairs(program, x, {n: v[span] for n, v in values.items()}) for span in spans(len(x), size)]
        except NotImplementedError:  # a guide of the user's that has no inverse
            return None, ()
    log_q = torch.cat(rows)
    own, count = log_q.diagonal(), len(x)
    all_of_them = log_q.logsumexp(1, keepdim=True) - math.log(count)
    rest = log_q.masked_fill(torch.eye(count, dtype=torch.bool), -math.inf)
    others = rest.logsumexp(1, keepdim=True) - math.log(count - 1)
    lower = own - all_of_them[:, 0] + 1 - (log_q - all_of_them).exp().mean(0)
    upper = own - others[:, 0] + 1 - (rest - others).exp().sum(0) / (count - 1)
    return (lower, upper), ()


def _same_rows(mask: Tensor, events: int) -> bool:
    """Whether a mask over ``(*batch, *event)`` is one for all rows."""
    by_row = mask.reshape(-1, *mask.shape[mask.dim() - events :])
    return bool((by_row == by_row[0]).all())


def _pairs(program: Program, x: Tensor, values: dict[str, Tensor]) -> Tensor:
    """Log q(z_n | x_m) ``(size, N)`` of some draws under every datum's guide."""
    chosen = {n: v.unsqueeze(1).expand(-1, len(x), *v.shape[1:]) for n, v in values.items()}
    num = len(next(iter(chosen.values())))
    with seeded(derive_seed("information: scores"), x.device):
        traced = run(program.guide, x, num_samples=num, at=chosen)
    return sum_log_prob(traced, num, len(x)).cpu().double()


def _se(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values))
