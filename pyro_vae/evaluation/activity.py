"""Which units of the latents the guide uses: those whose mean varies with x.

    A_u = Var_x(E_q[u | x]),     a unit is active where A_u > 0.01

Of an angle, u is the point exp(i angle) of the circle, and A_u the variance of its mean, the resultant: a mean direction
says nothing of how sharply it is known. In a hierarchy the mean is that of a unit's own marginal under q(z | x).
Burda, Grosse & Salakhutdinov 2016, https://arxiv.org/abs/1509.00519, section 5.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro.distributions import ProjectedNormal, SineBivariateVonMises, SineSkewed, VonMises
from torch import Tensor

from pyro_vae.errors import warn
from pyro_vae.evaluation.means import unit_names
from pyro_vae.programs.columns import given_columns
from pyro_vae.programs.trace import Program, innermost, isolated, latent_sites, run
from pyro_vae.programs.walk import Block, Walk, at_once, spans
from pyro_vae.seeding import derive_seed, seeded

ACTIVE_VARIANCE = 0.01
FIRST_DRAWS, MOST_DRAWS = 64, 1024  # per datum
DECIDED = 4.0  # standard errors from the threshold: a false alarm in 16,000 units


class ActivityWarning(UserWarning):
    """Some units could not be called active or collapsed."""


@dataclass(frozen=True, eq=False)
class Activity:
    """The variance over the data of the guide's mean of every unit; tensors are ``(D,)``, float64, on the CPU.

    Attributes:
        names: of the D units, all sites side by side: ``z[0]``, ``z[1]``, ...
        sites: how many units each latent site has, in the order of the guide.
        variance: unbiased estimates of A_u over these data; NaN for a unit that has no mean.
        se: their Monte Carlo standard error, over redrawn latents and the same data; 0 where means are known in closed form.
        without_mean: the sites that have no mean, with the name of their distribution.
        num_draws: draws per datum from which means were estimated where they have no closed form.
    """

    names: tuple[str, ...]
    sites: dict[str, int]
    variance: Tensor
    se: Tensor
    without_mean: dict[str, str]
    num_draws: int

    @property
    def active(self) -> Tensor:
        """Which units are active, ``(D,)``, by the estimate as it stands."""
        return self.variance > ACTIVE_VARIANCE

    @property
    def undecided(self) -> Tensor:
        """Units whose estimate is within four of its standard errors of the threshold, ``(D,)``."""
        return (self.variance - ACTIVE_VARIANCE).abs() < DECIDED * self.se

    @property
    def counts(self) -> list[int | None]:
        """The number of active units of each site, in the order of the guide; None for a site that has no mean."""
        parts = zip(self.sites, self.active.split(list(self.sites.values())), strict=True)
        return [None if name in self.without_mean else int(part.sum()) for name, part in parts]

    @cached_property
    def warnings(self) -> list[str]:
        """What could not be decided, each a line with the figure, the cause and the remedy."""
        found = [
            f"the latent {name!r} ({family}) has no mean: its {self.sites[name]} units are counted neither as active nor as "
            "collapsed; look at its KL instead, or code classes as one-hot vectors"
            for name, family in self.without_mean.items()
        ]
        if bool(self.undecided.any()):
            found.append(
                f"{int(self.undecided.sum())} of {len(self.names)} units vary by {ACTIVE_VARIANCE} to within 4 standard errors "
                f"(largest {float(self.se.nan_to_num().max()):.2g}), from {self.num_draws:,} draws per datum: each is counted on "
                "the side its estimate falls; give more data"
            )
        return found


def unit_activity(program: Program, x: Tensor, y: Tensor | None = None, *, seed: int = 0) -> Activity:
    """The variance over x of the guide's mean of every unit, with its error.

    The mean of a unit is its distribution's own where that has a closed form, averaged over draws of the latents before it, and
    otherwise (flows) an average of draws. An average of K draws is noisy: its variance over data exceeds A_u by the mean over
    data of s^2 / K, which is estimated from the same draws and subtracted. 64 draws are made; where they leave a unit undecided,
    the estimates of all units come from 1,024 new ones.

    Args:
        program: any Program.
        x: data ``(N, *event)``, 500 training images in the reference. Columns of a record are left out
            unless all of one is missing.
        y: what a conditional program is conditioned on, ``(N, ...)``.
        seed: of the draws; torch's generators are put back.

    Returns:
        The estimates; of one datum, zeros. A site whose distribution has no finite mean (an integer-coded categorical, a
        Cauchy) is named and left out.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.build("ppca", "linear", (3,), latent_dim=2, posterior="coupling-flow")
        >>> found = unit_activity(vae, torch.randn(50, 3))
        >>> found.names, found.variance.shape, found.num_draws
        (('z[0]', 'z[1]'), torch.Size([2]), 64)
    """
    found = _estimate(program, x, y, FIRST_DRAWS, seed)
    return _estimate(program, x, y, MOST_DRAWS, seed) if bool(found.undecided.any()) else found


def told(activity: Activity) -> Activity:
    """The same, having warned of what could not be decided."""
    for message in activity.warnings:
        warn(message, ActivityWarning)
    return activity


def _estimate(program: Program, x: Tensor, y: Tensor | None, num_draws: int, seed: int) -> Activity:
    walk, known = Walk(program, x, y, rows=at_once("active units")), given_columns(program, x)
    for block in walk:
        with block:
            walk.keep({n: found for n, found in _moments(block, num_draws, seed).items() if n not in known})
    blocks = walk.gathered()
    shapes = {name: mean for name, (mean, _, _) in blocks[0].items()}
    if not shapes:  # no latents
        return Activity((), {}, torch.zeros(0), torch.zeros(0), {}, num_draws)
    means = {name: torch.cat([b[name][0] for b in blocks]) for name in shapes}
    noises = {name: torch.cat([b[name][1] for b in blocks]) for name in shapes}
    mean, noise = (torch.cat([t.reshape(len(t), -1) for t in sites.values()], 1) for sites in (means, noises))
    variance, se = _variance(mean, noise, num_draws)
    return Activity(
        names=unit_names(shapes),
        sites={name: value[0].numel() for name, value in shapes.items()},
        variance=variance,
        se=se,
        without_mean={n: blocks[0][n][2] for n, mean in means.items() if not bool(torch.isfinite(mean).all())},
        num_draws=num_draws,
    )


def _variance(mean: Tensor, noise: Tensor, num_draws: int) -> tuple[Tensor, Tensor]:
    """Var_x of what ``mean`` ``(N, D)`` estimates with errors of variance ``noise``, unbiased, and its standard error."""
    num = len(mean)
    if num < 2:
        return torch.zeros_like(noise[0]), torch.zeros_like(noise[0])
    estimate = mean.var(0) - noise.mean(0)
    # of sum_n (m_n + e_n)^2 / (N - 1): 4 m_n^2 s_n^2 + 2 s_n^4 each; of s_n^2 itself: 2 s_n^4 / (K - 1)
    signal = ((mean - mean.mean(0)).abs().square() - noise) * noise
    around = 4 * signal.sum(0).clamp(min=0) + 2 * noise.square().sum(0) * (1 + 1 / (num_draws - 1))
    return estimate, around.sqrt() / (num - 1)


def _moments(block: Block, num_draws: int, seed: int) -> dict[str, tuple[Tensor, Tensor, str]]:
    """By site: the mean ``(batch, *event)``, the variance of its error, and the name of the distribution; float64, CPU."""
    total: dict[str, Tensor] = {}
    square: dict[str, Tensor] = {}
    start: dict[str, Tensor] = {}
    families: dict[str, str] = {}
    for part, span in enumerate(spans(num_draws, at_once("active units: draws"))):
        size = span.stop - span.start
        with isolated(), seeded(derive_seed("active units", seed, block.first, num_draws, part), block.x.device):
            sites = latent_sites(run(block.walk.program.guide, block.x, block.y, num_samples=size))
        for name, site in sites.items():
            if site["infer"].get("is_auxiliary"):
                continue
            value = mean_or_draw(site).expand(size, len(block), *site["fn"].event_shape).cpu()
            value = value.to(torch.complex128 if value.is_complex() else torch.float64)
            if part == 0:  # sums are taken from a point near the mean, where squares cancel least
                start[name], families[name] = value.mean(0), type(innermost(site["fn"])).__name__
                total[name], square[name] = torch.zeros_like(start[name]), torch.zeros_like(start[name].abs())
            from_start = value - start[name]
            total[name] += from_start.sum(0)
            square[name] += from_start.abs().square().sum(0)
    found = {}
    for name in total:
        off = total[name] / num_draws
        spread = (square[name] / num_draws - off.abs().square()).clamp(min=0) * (num_draws / (num_draws - 1))
        found[name] = (start[name] + off, spread / num_draws, families[name])
    return found


def mean_or_draw(site: dict[str, Any]) -> Tensor:
    """The mean of a site's distribution, NaN where it has none, or the value drawn where it is not known in closed form.

    Of angles the points of the circle that were drawn; Pyro's means of these, and of a ProjectedNormal, are directions.
    """
    fn = innermost(site["fn"])
    if isinstance(fn, (VonMises, SineBivariateVonMises, SineSkewed)):
        return torch.polar(torch.ones_like(site["value"]), site["value"])
    if isinstance(fn, ProjectedNormal):
        return site["value"]
    try:
        mean: Tensor = site["fn"].mean
    except NotImplementedError:
        drawn: Tensor = site["value"]
        return drawn if drawn.is_floating_point() else drawn.to(torch.get_default_dtype())
    return mean
