"""Are the latents any good as features? A linear classifier on few labels, against raw pixels and PCA.

Kingma et al. 2014, Semi-supervised learning with deep generative models, https://arxiv.org/abs/1406.5298 (their model
M1).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from pyro_vae.errors import UserError
from pyro_vae.evaluation.evaluate import chosen_rows
from pyro_vae.evaluation.means import guide_means
from pyro_vae.programs.given import require_rows
from pyro_vae.programs.trace import Program

STRENGTHS = (0.001, 0.01, 0.1, 1.0)  # the penalties C, of which the best on other training rows is taken
HELD_OUT = 1000  # of those rows
UNLABELLED = 10_000  # rows that PCA is fitted to, labels unseen


def linear_probe(
    program: Program | Mapping[str, Program],
    x: Tensor,
    labels: Tensor,
    x_test: Tensor,
    labels_test: Tensor,
    *,
    num_labels: Sequence[int] = (10, 100, 1000),
    num_seeds: int = 5,
    seed: int = 0,
) -> xr.DataArray:
    """Test accuracy of logistic regression on the guide's means, on raw pixels and on as many principal components.

    Each seed draws its own labelled rows, as many of each class. The penalty C is that of (0.001, 0.01, 0.1, 1) which
    does best on up to 1,000 other training rows: their labels choose it for every representation alike, and for
    nothing else.

    Args:
        program: any Program with continuous latents, unconditional; or several by name, an autoencoder's and a VAE's, say.
        x: training data ``(N, *event)``; PCA is fitted to at most 10,000 of them.
        labels: their classes ``(N,)``.
        x_test: test data, with ``labels_test``.
        labels_test: see ``x_test``.
        num_labels: how many labels the classifier has.
        num_seeds: draws of the labelled rows.
        seed: of those draws.

    Returns:
        Accuracies ``(representation, num_labels, seed)``; ``.mean("seed")`` and ``.std("seed")`` make a table.

    Example:
        >>> import torch, pyro_vae as pv
        >>> data = pv.load_data("digits")
        >>> vae = pv.build("ppca", "linear", data, latent_dim=2)
        >>> x, y = data.observed("train"), data.labels["train"]
        >>> linear_probe(vae, x, y, x[:100], y[:100], num_labels=(20,), num_seeds=1).dims
        ('representation', 'num_labels', 'seed')
    """
    programs = dict(program) if isinstance(program, Mapping) else {"latents": program}
    for data in (x, x_test):
        for one in programs.values():
            require_rows(data, one)
    y, y_test = (np.asarray(t.cpu()) for t in (labels, labels_test))
    classes = np.unique(y)
    if len(classes) < 2 or len(y) != len(x) or len(y_test) != len(x_test):
        raise UserError(
            f"expected labels of at least two classes, one for each row; got {len(y)} of {len(classes)} for {len(x)} rows"
        )
    for number in num_labels:
        if number < len(classes) or number > len(y):
            raise UserError(f"expected between {len(classes)} labels (one of each class) and {len(y)}, got {number}")
    means = {n: tuple(guide_means(one, t)[1].numpy() for t in (x, x_test)) for n, one in programs.items()}
    pixels, pixels_test = (t.flatten(1).cpu().double().numpy() for t in (x, x_test))
    size = max((train.shape[1] for train, _ in means.values()), default=1)
    some = pixels[chosen_rows(len(pixels), UNLABELLED).numpy()]
    pca = PCA(min(size, *some.shape), svd_solver="full").fit(some)
    sets = {
        **means,
        "pixels": (pixels, pixels_test),
        "pca": (pca.transform(pixels), pca.transform(pixels_test)),
    }
    found = np.empty((len(sets), len(num_labels), num_seeds))
    for column, number in enumerate(num_labels):
        rows = [_balanced(y, classes, number, np.random.default_rng([seed, s])) for s in range(num_seeds)]
        for row, (train, test) in enumerate(sets.values()):
            found[row, column] = [_accuracy(train, y, r, test, y_test) for r in rows]
    return xr.DataArray(
        found,
        dims=("representation", "num_labels", "seed"),
        coords={"representation": list(sets), "num_labels": list(num_labels), "seed": np.arange(num_seeds)},
        name="accuracy",
    )


def _balanced(y: np.ndarray, classes: np.ndarray, number: int, random: np.random.Generator) -> np.ndarray:
    """Rows with as many of each class as can be."""
    order = random.permutation(len(y))
    chosen = [order[y[order] == c][: number // len(classes)] for c in classes]
    rest = np.setdiff1d(order, np.concatenate(chosen))
    return np.concatenate([*chosen, random.permutation(rest)[: number - sum(map(len, chosen))]])


def _accuracy(x: np.ndarray, y: np.ndarray, rows: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> float:
    """Of a classifier that learned from some rows, its penalty chosen on others."""
    others = np.setdiff1d(np.arange(len(y)), rows)
    others = np.random.default_rng(0).permutation(others)[:HELD_OUT] if len(others) else rows
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a penalty too weak for few labels: another is chosen
        models = [
            make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300)).fit(x[rows], y[rows])
            for strength in STRENGTHS
        ]
    best = max(models, key=lambda model: float(model.score(x[others], y[others])))
    return float(best.score(x_test, y_test))
