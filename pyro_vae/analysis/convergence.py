"""Whether Markov chains have forgotten where they began."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

import numpy as np
import xarray as xr
from arviz_stats.base import array_stats

from pyro_vae.analysis.schema import SAMPLE_DIMS

GOOD_RHAT = 1.01  # Vehtari et al. 2021, https://arxiv.org/abs/1903.08008
BAD_RHAT = 1.05  # from which on more draws would change what is said of a posterior; between the two, the line tells
RHAT_DRAWS = 4  # of a chain, without which there is no R-hat
ENOUGH_DRAWS = 10  # of a chain, for its two halves to say anything of each other
AT_EDGE = 1e-3  # of the draws
BAD_DIVERGENT = 0.01  # of an image's draws: the step is too long where the posterior is narrow


class Convergence:
    """What Markov chains say of themselves.

    Args:
        tree: :func:`pyro_vae.posterior` with ``source="nuts"`` or ``"hmc"``.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.build("ppca", "linear", (3,), latent_dim=2)
        >>> tree = pv.posterior(vae, torch.zeros(5, 3), source="nuts", num_samples=100, num_warmup=100)
        >>> Convergence(tree).rhat.shape, Convergence(tree).warnings
        ((5, 2), [])
    """

    def __init__(self, tree: xr.DataTree) -> None:
        self.values = flat_latents(tree["posterior"].to_dataset()).values
        statistics = tree["sample_stats"].to_dataset()
        self.diverging, self.at_edge = statistics["diverging"], statistics.get("at_edge")

    @cached_property
    def rhat(self) -> np.ndarray:
        """R-hat ``(image, latent)``, rank-normalised and folded; NaN for fewer than two chains or four draws."""
        return self._of_chains(array_stats.rhat)

    @cached_property
    def ess(self) -> np.ndarray:
        """Bulk effective sample size ``(image, latent)``; NaN likewise."""
        return self._of_chains(array_stats.ess)

    @cached_property
    def ess_tail(self) -> np.ndarray:
        """Effective sample size of the 5 % and 95 % quantiles, the smaller ``(image, latent)``; NaN likewise."""
        return self._of_chains(partial(array_stats.ess, method="tail", prob=0.05))

    @property
    def untold(self) -> bool:
        """Whether there are too few chains or draws to tell anything of convergence."""
        num_chains, num_draws = self.values.shape[:2]
        return num_chains < 2 or num_draws < ENOUGH_DRAWS

    def _of_chains(self, statistic: Callable[..., np.ndarray]) -> np.ndarray:
        num_chains, num_draws, *shape = self.values.shape
        if num_chains < 2 or num_draws < RHAT_DRAWS:
            return np.full(shape, np.nan)
        with np.errstate(invalid="ignore", divide="ignore"):  # chains that never moved have none
            return statistic(self.values, chain_axis=0, draw_axis=1)

    @property
    def line(self) -> str:
        """R-hat, ESS and divergences for a reader."""
        divergent = f"{int(self.diverging.sum())} divergent transitions"
        if np.isnan(self.rhat).all():
            return f"{divergent}; no R-hat, which takes two chains of four draws that move"
        good = float((self.rhat < GOOD_RHAT).mean())
        return (
            f"R-hat below {GOOD_RHAT} for {good:.1%} of {self.rhat.size} coordinates "
            f"(largest {np.nanmax(self.rhat):.3f}); bulk ESS median {np.nanmedian(self.ess):.0f}; {divergent}"
        )

    @property
    def warnings(self) -> list[str]:
        """Why the draws are not to be trusted, if they are not; for how many images."""
        found, of = [], f"of {len(self.rhat)} images"
        if self.untold:
            num_chains, num_draws = self.values.shape[:2]
            found.append(
                f"{_counted(num_chains, 'chain')} of {_counted(num_draws, 'draw')} cannot tell whether they have converged: draw "
                f"two chains or more (4 are usual), of {ENOUGH_DRAWS} draws at least (num_chains, num_samples)"
            )
        else:
            found += self._of_rhat(of)
        bad = int((self.diverging.mean(SAMPLE_DIMS) > BAD_DIVERGENT).sum())
        if bad:
            found.append(
                f"more than {BAD_DIVERGENT:.0%} of the transitions of {bad} {of} diverge, where the posterior is narrower than "
                "a step: raise target_accept"
            )
        if self.at_edge is not None and (share := float(self.at_edge.mean())) > AT_EDGE:
            found.append(
                f"{share:.1%} of the draws are nearer to the edge of a latent's support than its numbers can tell: the posterior "
                "there is cut off; use larger concentrations (0.2 or more), or float64 on a CPU"
            )
        return found

    def _of_rhat(self, of: str) -> list[str]:
        found = []
        stuck = int(np.isnan(self.rhat).any(1).sum())
        if stuck:
            found.append(
                f"the chains of {stuck} {of} have no R-hat, since a latent never moved or is not finite: nothing vouches for "
                "them; draw more (num_warmup, num_samples)"
            )
        bad = int((self.rhat > BAD_RHAT).any(1).sum())
        if bad:
            found.append(
                f"the chains of {bad} {of} have not converged (R-hat above {BAD_RHAT}, largest {np.nanmax(self.rhat):.2f}): "
                "draw more (num_warmup, num_samples), or see whether each stays in a mode of its own"
            )
        return found


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def flat_latents(group: xr.Dataset | xr.DataTree) -> xr.DataArray:
    """All latents of a group side by side, ``(chain, draw, image, latent)``, named as in ArviZ's summaries."""
    arrays, names = [], []
    for name, variable in group.data_vars.items():
        array = variable.transpose("chain", "draw", "image", ...)
        event = array.shape[3:]
        arrays.append(array.values.reshape(*array.shape[:3], -1))
        names += [f"{name}[{', '.join(map(str, i))}]" if event else str(name) for i in np.ndindex(*event)]
    return xr.DataArray(
        np.concatenate(arrays, -1),
        dims=("chain", "draw", "image", "latent"),
        coords={"image": group["image"].values, "latent": names},
    )
