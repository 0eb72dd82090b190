"""Which images does a program not expect? Scores, calibrated on data that it was not trained on.

    nll = -log p(x),   negative_elbo,   reconstruction = -E_q log p(x | z),   typicality = |nll - median nll of the
    reference|

Higher is more surprising. The likelihood alone can fail, and does: images that are simpler than the data may be
*more* likely than they are (Nalisnick et al. 2019, https://arxiv.org/abs/1810.09136). Typicality, which asks whether
log p(x) is as usual rather than high (Nalisnick et al. 2019, https://arxiv.org/abs/1906.02994), then helps, and costs
a little where it does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from scipy.stats import rankdata
from torch import Tensor

from pyro_vae.analysis.drawing import drawn, image_grid
from pyro_vae.errors import UserError, unsaid, warn
from pyro_vae.evaluation import consistency
from pyro_vae.evaluation.consistency import FEW
from pyro_vae.evaluation.importance import log_likelihood
from pyro_vae.evaluation.result import UnreliableEstimateWarning
from pyro_vae.evaluation.score import VERDICTS
from pyro_vae.programs.columns import taken
from pyro_vae.programs.given import require_rows
from pyro_vae.programs.trace import Program
from pyro_vae.signatures import checked

SCORES = ("nll", "negative_elbo", "reconstruction", "typicality")
LEVEL = 0.05  # that anomalies are found at
FEWEST = round(1 / LEVEL) - 1  # reference images; of fewer no p-value is so small
FAILS = 0.5  # an AUROC below by more than two standard errors ranks the anomalies the wrong way round
Scores = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Anomalies:
    """Scores of normal images and of others, with how well they are told apart.

    Attributes:
        normal, other: scores by name, ``(n,)`` and ``(m,)``, higher for more surprising images.
        normal_p, other_p: their p-values on the reference, (1 + #{reference >= score}) / (1 + #reference): of normal
            images they are uniform, whatever the model.
        auroc: by score, the chance that one of the others scores higher than one of the normal images.
        auroc_se: its standard error over images (DeLong et al. 1988, https://doi.org/10.2307/2531595).
        num_samples: importance samples per image.
        num_reference: images that the p-values are calibrated on.
        forbidden: what of the result theory forbids (:mod:`pyro_vae.evaluation.consistency`).
    """

    normal: Scores
    other: Scores
    normal_p: Scores
    other_p: Scores
    auroc: dict[str, float]
    auroc_se: dict[str, float]
    num_samples: int
    num_reference: int
    forbidden: tuple[str, ...] = ()

    @property
    def warnings(self) -> list[str]:
        """What theory forbids of the result; where a score fails, and what that means."""
        found = [*self.forbidden]
        if self.num_reference < FEWEST:
            found.append(
                f"of {self.num_reference} reference images no p-value is below {1 / (1 + self.num_reference):.2g}: nothing can "
                f"be found at {LEVEL:.0%}; give {FEWEST} at least"
            )
        for name, area in self.auroc.items():
            if min(len(self.normal[name]), len(self.other[name])) < FEW:
                continue
            if area < FAILS - 2 * self.auroc_se[name]:
                found.append(
                    f"{name} ranks the anomalies as less surprising than the data (AUROC {area:.2f}): here it fails; "
                    + ("look at typicality" if name != "typicality" else "no score of this model's does")
                )
        return found

    def found(self, level: float = LEVEL, score: str = "nll") -> float:
        """The share of the others with a p-value of ``level`` or less; of normal images it would be about ``level``."""
        return float((self.other_p[score] <= level).mean())

    def columns(self, rows: Sequence[int] | None = None, threshold: float | None = None) -> dict[str, list[Any]]:
        """A line per row of the others, as columns: its number, scores, p-value by nll, and a verdict where there is a threshold.

        Args:
            rows: their numbers where they stand; from 0 where None.
            threshold: nats of log p(x), below which a row is an anomaly.
        """
        found: dict[str, list[Any]] = {"row": list(range(len(self.other["nll"])) if rows is None else rows)}
        found |= {name: values.tolist() for name, values in self.other.items()}
        found["p_value"] = self.other_p["nll"].tolist()
        if threshold is not None:
            found["verdict"] = [VERDICTS[not -nll >= threshold] for nll in found["nll"]]
        return found

    def summary(self) -> dict[str, Any]:
        """Plain numbers for a table or JSON."""
        rows = {
            name: {
                "auroc": self.auroc[name],
                "auroc_se": self.auroc_se[name],
                "found_at_5_percent": self.found(0.05, name),
                "false_alarms_at_5_percent": float((self.normal_p[name] <= 0.05).mean()),
                "median_normal": float(np.median(self.normal[name])),
                "median_other": float(np.median(self.other[name])),
            }
            for name in self.auroc
        }
        sizes = {"num_normal": len(self.normal["nll"]), "num_other": len(self.other["nll"])}
        return {"scores": rows, **sizes, "num_samples": self.num_samples, "warnings": self.warnings}


@checked
def scores(
    program: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    num_samples: int = 500,
    seed: int = 0,
    reference: Scores | None = None,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """How surprising each row of x is, by name, in nats, ``(N,)`` each.

    Args:
        program: any Program.
        x: data ``(N, *event)``.
        y: what a conditional program is conditioned on.
        num_samples: importance samples per image.
        seed: of the draws.
        reference: scores of held-in data; without them there is no ``typicality``.
        progress: called with the number of images after every block.
    """
    with unsaid(UnreliableEstimateWarning):  # a loose bound is what an anomaly has: the score is none the worse
        result = log_likelihood(program, x, y, num_samples=num_samples, seed=seed, progress=progress)
    found = {
        "nll": -result.log_likelihood.numpy(),
        "negative_elbo": -result.elbo.numpy(),
        "reconstruction": -result.reconstruction.numpy(),
    }
    # an image that the model rules out is more surprising than any other
    found = {n: np.nan_to_num(v, nan=math.inf, posinf=1e30, neginf=-1e30).clip(max=1e30) for n, v in found.items()}
    if reference is not None:
        found["typicality"] = np.abs(found["nll"] - np.median(reference["nll"]))
    return found


def p_values(score: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Empirical p-values (1 + #{reference >= score}) / (1 + #reference); of a new image like the reference, uniform.

    >>> p_values(np.array([0.0, 2.5, 9.0]), np.array([1.0, 2.0, 3.0])).tolist()
    [1.0, 0.5, 0.25]
    """
    at_least = len(reference) - np.searchsorted(np.sort(reference), score, side="left")
    p: np.ndarray = (1 + at_least) / (1 + len(reference))
    return p


def auroc(normal: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """The area under the ROC curve, and its standard error by DeLong et al. 1988, https://doi.org/10.2307/2531595.

    >>> auroc(np.array([0.0, 1.0, 2.0]), np.array([3.0, 4.0]))
    (1.0, 0.0)
    """
    n, m = len(normal), len(other)
    ranks = rankdata(np.r_[normal, other])
    area = float(ranks[n:].sum() - m * (m + 1) / 2) / (n * m)  # of Mann and Whitney, ties counting half
    of_normal = 1 - (ranks[:n] - rankdata(normal)) / m
    of_other = (ranks[n:] - rankdata(other)) / n
    variance = sum(float(part.var(ddof=1)) / len(part) for part in (of_normal, of_other) if len(part) > 1)
    return area, math.sqrt(variance)


@checked
def detect(
    program: Program,
    reference: Tensor,
    normal: Tensor,
    other: Tensor,
    *,
    num_samples: int = 500,
    seed: int = 0,
    against_itself: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Anomalies:
    """Score normal images and others, and say how well the two are told apart.

    Args:
        program: any unconditional Program.
        reference: held-in data ``(N, *event)``, or a record, that the p-values are calibrated on: not those it was trained on.
        normal: more held-in data ``(n, *event)``.
        other: what may be anomalies ``(m, *event)``, prepared as the normal images are: see
            :func:`~pyro_vae.data.alike.observed_like`, and :func:`~pyro_vae.data.alike.fitted` for another size.
        num_samples: importance samples per image.
        seed: of the draws, which are the same for the same rows: data against themselves have an AUROC of exactly 1/2.
        against_itself: whether ``other`` are the same data as ``normal``, row by row, also where they were prepared anew: scores
            that differ on average are then an error.
        progress: called with the number of images after every block.
    """
    reference, normal, other = (taken(program, x) for x in (reference, normal, other))
    for name, x in (("reference", reference), ("normal", normal), ("other", other)):
        require_rows(x, program)
        if len(x) < 2:
            raise UserError(f"expected at least two {name} images, got {len(x)}")
    options: dict[str, Any] = {"num_samples": num_samples, "seed": seed, "progress": progress}
    base = scores(program, reference, **options)
    base["typicality"] = np.abs(base["nll"] - np.median(base["nll"]))
    ours = scores(program, normal, reference=base, **options)
    theirs = scores(program, other, reference=base, **options)
    areas = {n: auroc(ours[n], theirs[n]) for n in SCORES}
    forbidden: tuple[str, ...] = ()
    if len(normal) == len(other) and (against_itself or torch.equal(normal, other)):
        twice = [{n: torch.from_numpy(v) for n, v in found.items()} for found in (ours, theirs)]
        claims = consistency.of_itself(*twice)
        forbidden = consistency.forbidden(claims)
        consistency.tell(forbidden)
    result = Anomalies(
        normal=ours,
        other=theirs,
        normal_p={n: p_values(ours[n], base[n]) for n in SCORES},
        other_p={n: p_values(theirs[n], base[n]) for n in SCORES},
        auroc={n: area for n, (area, _) in areas.items()},
        auroc_se={n: error for n, (_, error) in areas.items()},
        num_samples=num_samples,
        num_reference=len(reference),
        forbidden=forbidden,
    )
    if len(reference) < FEWEST:
        warn(result.warnings[len(forbidden)], UnreliableEstimateWarning)
    return result


@drawn
def most_surprising(
    result: Anomalies, normal: Tensor, other: Tensor, num: int = 40, score: str = "nll", ax: Axes | None = None
) -> Axes:
    """Draw the normal images that score highest above the others that score highest, most surprising first.

    Args:
        result: what :func:`detect` returned for these images.
        normal, other: the images, ``(n, *event)`` and ``(m, *event)``.
        num: how many of each.
        score: which score orders them.
        ax: where to draw; a new figure where None.
    """
    num = min(num, len(normal), len(other))
    columns = min(10, num)
    num -= num % columns
    parts = []
    for images, values in ((normal, result.normal[score]), (other, result.other[score])):
        parts.append(images[torch.from_numpy(np.argsort(-values, kind="stable")[:num].copy())].cpu().float())
    title = f"The most surprising by {score}: of the data (above) and of the others (below)"
    return image_grid(torch.cat(parts), columns, ax, title=title, wide_rows=(num // columns,))
