"""Probabilistic PCA on real digits: log p(x) in closed form, computed independently by scikit-learn.

    p(z) = N(0, I),  p(x | z) = N(W R z + b, s^2 I):   log p(x) = log N(x; b, W W^T + s^2 I)

R is a fixed random rotation: it leaves p(x) alone, and makes the posterior correlated, so that no diagonal guide is exact.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.networks.heads import positive_inverse
from pyro_vae.seeding import generator

COMPONENTS = 4
SHAPE = (1, 8, 8)


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Grey digits, level / 16: the training rows, and 200 others."""
    data = pv.load_data("digits", binarization="none")
    others = torch.cat([data.observed("test"), data.observed("validation")])[:200]
    return data.observed("train").double(), others.double()


@cache
def solution() -> PCA:
    return PCA(COMPONENTS, svd_solver="full").fit(digits()[0].flatten(1).numpy())


def exact() -> Tensor:
    """Log p(x) of the 200 digits, by scikit-learn."""
    return torch.from_numpy(solution().score_samples(digits()[1].flatten(1).numpy()))


def ppca() -> nn.Module:
    """The declared model, its decoder fixed at scikit-learn's solution times a rotation; its guide untrained."""
    pca = solution()
    variance, noise = torch.from_numpy(pca.explained_variance_), float(pca.noise_variance_)
    rotation, _ = torch.linalg.qr(torch.randn(COMPONENTS, COMPONENTS, generator=generator(3), dtype=torch.float64))
    weight = torch.from_numpy(pca.components_).T * (variance - noise).sqrt() @ rotation
    vae = pv.build("ppca", "linear", SHAPE, latent_dim=COMPONENTS).double()
    with torch.no_grad():
        vae.likelihood.head.map.weight.copy_(weight)
        vae.likelihood.head.map.bias.copy_(torch.from_numpy(pca.mean_))
        vae.likelihood.raw_scale.fill_(positive_inverse(noise**0.5, vae.likelihood.min_scale))
    return vae.requires_grad_(False)


class ExactGuide(nn.Module):
    """The model of a linear VAE with its posterior N(M^-1 W^T (x - b), s^2 M^-1), M = W^T W + s^2 I."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def model(self, x: Tensor) -> None:
        self.vae.model(x)

    def guide(self, x: Tensor) -> None:
        head = self.vae.likelihood.head.map
        variance = self.vae.likelihood(x.new_zeros(COMPONENTS)).base_dist.variance.flatten()[0]
        m = head.weight.T @ head.weight + variance * torch.eye(COMPONENTS, dtype=x.dtype)
        loc = torch.linalg.solve(m, head.weight.T @ (x.flatten(1) - head.bias).T).T
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.MultivariateNormal(loc, precision_matrix=m / variance))


@pytest.mark.parametrize("num_samples", [1, 2, 30, 1000])
def test_with_the_exact_posterior_every_weight_is_p_of_x(num_samples: int) -> None:
    result = pv.log_likelihood(ExactGuide(ppca()), digits()[1], num_samples=num_samples) if num_samples > 24 else None
    if result is None:
        with pytest.warns(UserWarning, match="too few"):
            result = pv.log_likelihood(ExactGuide(ppca()), digits()[1], num_samples=num_samples)
    error = float((result.log_likelihood / exact() - 1).abs().max())
    print("largest relative error", error)
    assert error < 1e-9
    torch.testing.assert_close(result.elbo, exact(), rtol=1e-9, atol=1e-9)
    assert float((result.ess - num_samples).abs().max()) < 1e-9 * num_samples
    if num_samples > 1:
        assert torch.isneginf(result.khat).all()
        assert not result.mc_se.any()
        assert not result.bias.any()
        assert result.nll_mc_se == 0.0


@pytest.mark.slow
def test_with_a_diagonal_guide_trained_alone_the_errors_are_as_stated() -> None:
    vae, (train, x) = ppca(), digits()
    for part in (vae.encoder, vae.posterior):
        part.requires_grad_(True)
    fixed = {n: p.detach().clone() for n, p in vae.named_parameters() if not p.requires_grad}
    pv.fit(vae, train, steps=1500, batch_size=400, lr=0.1, objective="analytic-elbo")
    assert fixed
    assert all(torch.equal(p, fixed[n]) for n, p in vae.named_parameters() if n in fixed)

    result = pv.log_likelihood(vae, x, num_samples=5000, seed=1)
    # The posterior is correlated: no diagonal guide comes closer than the KL of its best, whose precisions are the exact's.
    weight = vae.likelihood.head.map.weight
    precision = weight.T @ weight / float(solution().noise_variance_) + torch.eye(COMPONENTS, dtype=torch.float64)
    least = float(precision.diagonal().log().sum() - precision.logdet()) / 2
    gap = float((exact() - result.elbo).mean())
    print("gap of the ELBO, and the least of a diagonal guide", (gap, least))
    assert least > 0.02
    assert least - 0.005 < gap < 3 * least
    # What follows assumes weights of finite variance, k < 1/2 (khat has errors of its own, of about 0.1).
    print("khat: median, worst", (float(result.khat.median()), float(result.khat.max())))
    assert float((result.khat < 0.5).double().mean()) > 0.97
    assert result.khat_bad_fraction == 0
    z = (result.log_likelihood - result.bias - exact()) / result.mc_se
    n = len(z)
    # Two tests, each of level 5e-4 and two-sided: a false alarm in 1e-3 of seeds.
    mean = float(z.mean()) * n**0.5
    square = float(z.square().sum())
    low, high = scipy.stats.chi2.ppf([2.5e-4, 1 - 2.5e-4], n)
    print("standardised errors: mean * sqrt(n), sum of squares, its bounds", (mean, square, low, high))
    assert abs(mean) < scipy.stats.norm.ppf(1 - 2.5e-4)
    assert low < square < high
    # and the mean over images is within its own error
    assert abs(result.nll + float(exact().mean()) - result.nll_bias) < 3.5 * result.nll_mc_se
