"""Are samples of a model like the data, and all of the data? Precision and recall, and how far the nearest training data are.

A likelihood does not answer this, and some systems have none: here all are asked by the same means, in the features of a small
classifier, or in any features.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from pyro_vae.analysis.nearest import nearest_neighbours
from pyro_vae.analysis.scoring import host
from pyro_vae.errors import UserError
from pyro_vae.evaluation.evaluate import chosen_rows
from pyro_vae.programs.given import require_rows
from pyro_vae.seeding import derive_seed

BLOCK = 1000
LEARNED = 20_000  # rows that the classifier is trained on, at most


@dataclass(frozen=True)
class Fidelity:
    """What was found of samples.

    Attributes:
        precision: the share of samples that lie in the estimated support of the data.
        recall: the share of data that lie in the estimated support of the samples.
        nearest: mean distance of a sample to the training datum nearest to it, over that of a test datum: 1 for samples that are
            as far from the training data as other data are, near 0 for a copy of them.
        num: how many of each there are.
    """

    precision: float
    recall: float
    nearest: float | None
    num: int

    @property
    def precision_se(self) -> float:
        """Standard error over samples, the support given."""
        return math.sqrt(self.precision * (1 - self.precision) / self.num)

    @property
    def recall_se(self) -> float:
        """Standard error over data, the support given."""
        return math.sqrt(self.recall * (1 - self.recall) / self.num)


def precision_recall(data: Tensor, samples: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision and recall of samples, supports estimated by balls that reach to the k-th neighbour.

    Both depend on the number of rows: compare what was found with equal numbers alone. Kynkaanniemi et al. 2019,
    https://arxiv.org/abs/1904.06991.

    Args:
        data: features ``(n, F)`` of data.
        samples: features ``(n, F)`` of as many samples.
        k: which neighbour.

    Example:
        >>> at = torch.arange(8.0)[:, None]
        >>> precision_recall(at, at / 4 + 0.01)
        (1.0, 0.375)
    """
    if data.dim() != 2 or data.shape != samples.shape or len(data) <= k or k < 1:
        raise UserError(
            f"expected features (n, F) of more than k = {k} data and as many samples, got {tuple(data.shape)} and "
            f"{tuple(samples.shape)}"
        )
    data, samples = data.double(), samples.double()
    return _share_inside(samples, data, k), _share_inside(data, samples, k)


def _share_inside(x: Tensor, others: Tensor, k: int) -> float:
    """The share of rows of x that lie in a ball around one of the others."""
    radius = torch.cat([torch.cdist(part, others).kthvalue(k + 1, 1).values for part in others.split(BLOCK)])
    inside = [(torch.cdist(part, others) <= radius).any(1) for part in x.split(BLOCK)]
    return float(torch.cat(inside).double().mean())


def classifier_features(x: Tensor, labels: Tensor, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """The last hidden layer (64 units) of a classifier trained on labelled data: a function of ``(n, *event)``.

    Args:
        x: training data ``(N, *event)``, of which at most 20,000 are used.
        labels: their classes ``(N,)``.
        seed: of the classifier's weights and minibatches.
    """
    require_rows(x)
    if len(labels) != len(x):
        raise UserError(f"expected a label for each of {len(x)} rows, got {len(labels)}")
    model = MLPClassifier(
        (256, 64), early_stopping=True, max_iter=30, random_state=derive_seed("classifier", seed) % 2**32
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a classifier that could learn more has features too
        rows = chosen_rows(len(x), LEARNED)  # by chance: data may be in the order of their classes
        model.fit(host(x[rows.to(x.device)].flatten(1)), np.asarray(labels.cpu()[rows]))

    def features(rows: Tensor) -> Tensor:
        h = torch.from_numpy(host(rows.flatten(1)))
        for weight, bias in zip(model.coefs_[:-1], model.intercepts_[:-1], strict=True):
            h = (h @ torch.from_numpy(weight).to(h) + torch.from_numpy(bias).to(h)).relu()
        return h

    return features


def fidelity(
    samples: Tensor, test: Tensor, train: Tensor, features: Callable[[Tensor], Tensor] | None = None, k: int = 3
) -> Fidelity:
    """Precision and recall of samples against test data, and how far training data are from them.

    Args:
        samples: ``(n, *event)``.
        test: data of the same kind (binarized as they are, say), at least n; n by chance are compared with.
        train: training data, for the distance of the nearest; none are drawn on for the rest.
        features: what precision and recall are found in, ``(n, *event)`` to ``(n, F)``; the data themselves where None.
        k: which neighbour the balls reach.

    Example:
        >>> x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
        >>> found = fidelity(x[:100], x[100:200], x[200:])
        >>> found.precision > 0.8, found.recall > 0.8, 0.5 < found.nearest < 2
        (True, True, True)
    """
    if len(test) < len(samples):
        raise UserError(f"expected at least as many test data as samples, got {len(test)} and {len(samples)}")
    test = test[chosen_rows(len(test), len(samples)).to(test.device)]
    flat = (lambda x: x.flatten(1)) if features is None else features
    precision, recall = precision_recall(flat(test), flat(samples), k)
    ours, theirs = (float(nearest_neighbours(x, train)[1].mean()) for x in (samples, test))
    return Fidelity(precision, recall, ours / theirs if theirs > 0 else None, len(samples))
