"""A score for every row, as a service gives it: the same wherever the row stands, and a verdict by a threshold that is fixed.

log p(x) of each row, by importance sampling with noise that is seeded by (seed, the row's bytes)
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pyro_vae import tables
from pyro_vae.errors import UserError, unsaid
from pyro_vae.errors import warn as warn_of
from pyro_vae.evaluation.importance import log_likelihood
from pyro_vae.evaluation.result import LogLikelihood, UnreliableEstimateWarning
from pyro_vae.programs.door import door
from pyro_vae.programs.trace import Program

NOT_ALL = "not all of these scores can be relied on: .warnings says why, .khat of which rows; warn=False says nothing"
VERDICTS = ("normal", "anomaly")


@dataclass(frozen=True, eq=False)
class Scores:
    """How likely every row is, with the evidence.

    Attributes:
        result: log p(x) of every row with all that is known of it.
        threshold: nats, that log p(x) of a normal row is not below; None where there is none.
    """

    result: LogLikelihood
    threshold: float | None = None

    def __len__(self) -> int:
        return len(self.result)

    @property
    def log_likelihood(self) -> Tensor:
        """Log p(x) ``(N,)`` in nats, float64; higher is less surprising."""
        return self.result.log_likelihood

    @property
    def khat(self) -> Tensor:
        """Pareto k ``(N,)`` of each row's weights."""
        return self.result.khat

    @property
    def warnings(self) -> list[str]:
        """What stands against the scores, a line each."""
        return [*self.result.forbidden, *self.result.warnings]

    @property
    def anomalous(self) -> Tensor | None:
        """Whether log p(x) of a row is below the threshold, or NaN ``(N,)``; None without a threshold."""
        return None if self.threshold is None else ~(self.result.log_likelihood >= self.threshold)

    def columns(self) -> dict[str, list[Any]]:
        """A line per row, as columns: its number, log p(x) with its evidence, and a verdict where there is a threshold."""
        named = ("log_likelihood", "mc_se", "elbo", "ess", "khat")
        found: dict[str, list[Any]] = {"row": list(range(len(self)))}
        found |= {name: getattr(self.result, name).tolist() for name in named}
        if self.anomalous is not None:
            found["verdict"] = [VERDICTS[bad] for bad in self.anomalous.tolist()]
        return found

    def write(self, path: str | os.PathLike[str]) -> Path:
        """:meth:`columns` as a ``.csv`` or ``.parquet`` file."""
        return tables.write_columns(path, self.columns())


def require_threshold(threshold: float | None) -> None:
    """:class:`UserError` for a threshold that is no number: nothing is below it."""
    if threshold is not None and math.isnan(threshold):
        raise UserError("threshold is NaN: expected nats of log p(x), below which a row is an anomaly")


@door(records=True)
def score(
    program: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    num_samples: int = 500,
    threshold: float | None = None,
    seed: int = 0,
    streams: str = "content",
    warn: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Log p(x) of every row of x, by itself: a row scores the same alone, in any batch, and from any thread.

    Args:
        program: any Program, on its device.
        x: data ``(N, *event)`` as the program sees it.
        y: what a conditional program is conditioned on, ``(N, ...)``.
        num_samples: K, draws of each row.
        threshold: nats of log p(x), below which a row is an anomaly; take a quantile of the scores of rows that are none.
        seed: of the draws, beside the row's bytes.
        streams: ``content``; ``place`` draws rows together, which is faster where K is small, and lets a row's noise depend on
            where it stands: :func:`~pyro_vae.evaluation.importance.log_likelihood`.
        warn: whether to warn, always in the same words, where some of the scores cannot be relied on.
        progress: called with the number of rows after every block.

    Returns:
        The scores; ``.write("scores.csv")`` files a line per row.

    Raises:
        UserError: as :func:`~pyro_vae.evaluation.importance.log_likelihood`.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae, x = pv.build("ppca", "linear", (3,), latent_dim=2), torch.eye(3)
        >>> whole = pv.score(vae, x, num_samples=50, threshold=-1e3)
        >>> bool(pv.score(vae, x[2:], num_samples=50).log_likelihood == whole.log_likelihood[2:])
        True
        >>> whole.columns()["verdict"]
        ['normal', 'normal', 'normal']
    """
    require_threshold(threshold)
    with unsaid(UserWarning):
        result = log_likelihood(program, x, y, num_samples=num_samples, seed=seed, streams=streams, progress=progress)
    found = Scores(result, threshold)
    if warn and found.warnings:
        warn_of(NOT_ALL, UnreliableEstimateWarning)
    return found
