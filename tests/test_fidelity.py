"""Precision and recall of samples, and probes of several codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.analysis.features import linear_probe
from pyro_vae.analysis.fidelity import classifier_features, fidelity, precision_recall
from pyro_vae.errors import UserError


def normal(n: int, seed: int, scale: float = 1.0, at: float = 0.0) -> Tensor:
    return at + scale * torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))


def test_it_is_what_its_definition_says() -> None:
    data, samples, k = normal(40, 0), normal(40, 1, 1.5), 3
    inside = {}
    for name, x, others in (("precision", samples, data), ("recall", data, samples)):
        hits = 0
        for row in x:
            for i, other in enumerate(others):
                radius = sorted(float((other - o).norm()) for j, o in enumerate(others) if j != i)[k - 1]
                if float((row - other).norm()) <= radius:
                    hits += 1
                    break
        inside[name] = hits / 40
    assert precision_recall(data, samples, k) == pytest.approx((inside["precision"], inside["recall"]))


def test_a_lost_mode_costs_recall_and_a_wide_model_precision() -> None:
    modes = torch.cat([normal(300, 0, 0.3, -3.0), normal(300, 1, 0.3, 3.0)])
    same = torch.cat([normal(300, 2, 0.3, -3.0), normal(300, 3, 0.3, 3.0)])
    train = torch.cat([normal(300, 4, 0.3, -3.0), normal(300, 5, 0.3, 3.0)])
    good = fidelity(same, modes, train)
    assert min(good.precision, good.recall) > 0.9
    assert good.nearest == pytest.approx(1, abs=0.2)
    lost = fidelity(normal(600, 6, 0.3, 3.0), modes, train)
    assert lost.precision > 0.9
    assert lost.recall == pytest.approx(0.5, abs=0.05)
    wide = fidelity(normal(600, 7, 5.0), modes, train)
    assert wide.precision < 0.5
    assert wide.nearest is not None
    assert wide.nearest > 3
    assert fidelity(train[:300], modes, train).nearest == 0
    assert 0 < wide.precision_se < 0.03
    half = fidelity(same[::2], modes, train)  # of test data in the order of their modes not the first half alone
    assert min(half.precision, half.recall) > 0.85


@pytest.mark.slow
def test_the_features_of_a_classifier_tell_classes_apart() -> None:
    data = pv.load_data("digits")
    x, y = data.observed("train"), data.labels["train"]
    features = classifier_features(x, y)
    test = data.observed("test")
    assert features(test).shape == (len(test), 64)
    zeros, others = features(x[y == 0]), features(x[y != 0])
    within = torch.cdist(zeros, zeros).mean()
    assert float(torch.cdist(zeros, others).mean()) > 1.2 * float(within)
    assert torch.equal(features(test), classifier_features(x, y)(test))


def test_several_programs_are_probed_beside_pixels_and_their_components() -> None:
    data = pv.load_data("digits")
    programs = {n: pv.build("ppca", "linear", data, latent_dim=d) for n, d in (("autoencoder", 2), ("vae", 5))}
    x, y = data.observed("train"), data.labels["train"]
    table = linear_probe(programs, x, y, x[:100], y[:100], num_labels=(20,), num_seeds=1)
    assert table.representation.values.tolist() == ["autoencoder", "vae", "pixels", "pca"]


@pytest.mark.parametrize(("n", "m", "told"), [(3, 3, "more than k = 3"), (10, 9, "as many samples")])
def test_what_has_no_neighbours_is_refused(n: int, m: int, told: str) -> None:
    with pytest.raises(UserError, match=told):
        precision_recall(normal(n, 0), normal(m, 1))
    with pytest.raises(UserError, match="at least as many test data"):
        fidelity(normal(10, 0), normal(9, 1), normal(9, 2))
