"""Rate, distortion and mutual information against closed forms, and the pictures of the latent space."""

from __future__ import annotations

import math

import by_hand
import conjugate
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from small import digits, small_vae
from torch import Tensor

import pyro_vae as pv
from pyro_vae.analysis.drawing import plain
from pyro_vae.analysis.history import elbo_parts, overlaid_curves
from pyro_vae.analysis.interpolation import slerp, straight
from pyro_vae.analysis.nearest import nearest_neighbours
from pyro_vae.analysis.pictures import interpolations
from pyro_vae.errors import UserError
from pyro_vae.evaluation.means import guide_means
from pyro_vae.priors.gaussian_mixture import DiagonalMixture
from pyro_vae.programs.coordinates import coordinate_log_prob
from pyro_vae.seeding import generator, seeded


@pytest.fixture(scope="module")
def vae():
    return small_vae(digits())


@pytest.fixture(scope="module")
def images() -> Tensor:
    return digits().observed("test", rows=range(60))


@pytest.fixture(autouse=True)
def _seeded():
    """Programs by hand draw their weights from the global generators, which are put back."""
    with seeded(0):
        yield


def wide(x: Tensor) -> dist.TorchDistribution:
    """A normal in two dimensions with a covariance."""
    return dist.MultivariateNormal(torch.zeros(2, dtype=x.dtype), torch.tensor([[2.0, 0.8], [0.8, 1.0]], dtype=x.dtype))


def test_information_of_the_linear_gaussian_model_is_its_closed_form(record_property) -> None:
    """The guide is exact: q(z) = p(z), so the rate is I(x; z) = (1/2) log det(I + W^T W / s^2)."""
    program = conjugate.LinearGaussian(latent_dim=1)
    x = pv.sample(program, 1500, seed=3)
    weight = program.weight.detach()
    exact = 0.5 * float(torch.logdet(torch.eye(1, dtype=x.dtype) + weight.T @ weight / conjugate.NOISE**2))
    found = pv.latent_information(program, x)
    record_property("standardised error of the rate", (found.rate - exact) / found.rate_se)
    # false-alarm rate of each of the three, at 4 standard errors: 6e-5; both bounds lean by O(1/N), not seen here
    assert abs(found.rate - exact) < 4 * found.rate_se
    assert abs(found.information_lower - exact) < 4 * found.information_lower_se + 0.01
    assert abs(found.information_upper - exact) < 4 * found.information_upper_se + 0.01
    assert found.kl.tolist() == pytest.approx([found.rate], rel=1e-6)
    assert found.names == ("z[0]",)
    assert found.marginal_kl[0] < 4 * found.marginal_kl_se[0]
    assert -found.rate - found.distortion == pytest.approx(float(program.evidence(x).mean()), abs=1e-9)


def test_units_add_up_to_the_rate_where_both_are_products(vae, images) -> None:
    found = pv.latent_information(vae, images)
    assert float(found.kl.sum()) == pytest.approx(found.rate, rel=1e-4)
    assert found.num_active == int((guide_means(vae, images)[1].var(0) > 0.01).sum())
    assert set(found.collapsed) == {n for n, a in zip(found.names, found.active, strict=True) if not a}
    assert found.information_lower <= math.log(60)
    assert found.summary()["num_units"] == 3


def test_a_collapsed_guide_is_named() -> None:
    program = by_hand.KnownWeights(1.0, dim=2)
    found = pv.latent_information(program, torch.zeros(20, 2, dtype=torch.float64))
    assert found.collapsed == found.names
    assert "collapsed" in found.warnings[0]
    assert abs(found.information_lower) < 1e-9
    with pytest.raises(UserError, match="at least two rows"):
        pv.latent_information(program, torch.zeros(1, 2))


def test_what_cannot_be_scored_is_not_known(images) -> None:
    planar = pv.build("mlp", "planar", digits(), latent_dim=3, encoder="mlp:hidden=[8]", decoder="mlp:hidden=[8]")
    found = pv.latent_information(planar, images[:20])
    assert (found.kl, found.information_lower, found.marginal_kl) == (None, None, None)
    assert pv.unit_rates(found).axes[0].get_ylabel() == "variance of the guide's mean"
    labels = torch.arange(20) % 3
    conditional = pv.latent_information(by_hand.Conditional(64), images[:20].flatten(1), labels)
    assert conditional.information_lower is None
    assert conditional.kl is not None


def test_coordinates_have_the_marginals_of_the_joint() -> None:
    z = torch.linspace(-2, 2, 5, dtype=torch.float64)
    pairs = torch.stack([z, z], 1)
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    mixture = DiagonalMixture(torch.tensor([0.3, -1.0]).double(), torch.tensor([[0.0, 1], [2, -1]]).double(),
                              torch.tensor([[1.0, 0.5], [0.3, 2]]).double())  # fmt: skip
    for fn in (wide(z), mixture, dist.Normal(pairs.new_zeros(2), 2.0).to_event(1)):
        joint = fn.log_prob(torch.stack([z[:, None].expand(-1, 4001), grid.expand(5, -1)], -1)).exp()
        marginal = torch.trapezoid(joint, grid, dim=1).log()
        torch.testing.assert_close(
            coordinate_log_prob({"fn": fn, "mask": None}, pairs)[:, 0], marginal, atol=1e-6, rtol=1e-5
        )
    site = {"fn": dist.Dirichlet(torch.ones(3)), "mask": None}
    assert coordinate_log_prob(site, torch.ones(2, 3) / 3) is None


def test_slerp_keeps_the_length_and_the_ends() -> None:
    a, b = torch.randn(2, 7, 3, 4, generator=generator(0)).unbind(0)
    a, b = (t / t.flatten(1).norm(dim=1).reshape(-1, 1, 1) for t in (a, b))
    way = slerp(a, b, torch.linspace(0, 1, 5))
    assert way.shape == (7, 5, 3, 4)
    torch.testing.assert_close(way[:, 0], a)
    torch.testing.assert_close(way[:, -1], b)
    torch.testing.assert_close(way.flatten(2).norm(dim=2), torch.ones(7, 5))
    assert torch.equal(slerp(a, 2 * a, torch.tensor([0.5])), straight(a, 2 * a, torch.tensor([0.5])))
    assert torch.isfinite(slerp(torch.zeros(1, 3), torch.ones(1, 3), torch.linspace(0, 1, 3))).all()


def test_interpolations_take_either_way(vae, images) -> None:
    ways = [
        np.asarray(interpolations(vae, images[:4], 5, path=p).get_images()[0].get_array())
        for p in ("straight", "slerp")
    ]
    assert ways[0].shape == ways[1].shape
    with pytest.raises(UserError, match="choose from slerp, straight"):
        interpolations(vae, images[:4], path="curly")


def test_a_traversal_moves_one_unit_through_the_prior(vae, images) -> None:
    figure = pv.traversals(vae, images, num_units=2, steps=5)
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 2
    bits = small_vae(digits(), "binary-latents", posterior="bernoulli")
    assert len(pv.traversals(bits, images).axes) == 3
    points = pv.build("ppca", "linear", (2,), latent_dim=2)
    assert len(pv.traversals(points, torch.randn(9, 2)).axes[0].get_lines()) == 2
    vectors = by_hand.TwoLayers()
    assert len([ax for ax in pv.traversals(vectors, torch.randn(9, 6)).axes if ax.get_visible()]) == 5
    sphere = pv.build("hypersphere", "hypersphere", digits(), latent_dim=3, encoder="linear", decoder="linear")
    with pytest.raises(UserError, match="leave the support"):
        pv.traversals(sphere, images)


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_an_embedding_has_a_colour_for_each_label(vae, images, method) -> None:
    labels = torch.arange(60) % 3
    names = ("$\\frac{", "_b", "c")  # neither is mathematics
    ax = pv.embedding(vae, images, labels=labels, label_names=names, method=method).axes[0]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [plain(n) for n in names]
    many = pv.embedding(vae, images, labels=torch.arange(60), method="pca")
    assert len(many.axes) == 2
    with pytest.raises(UserError, match="did you mean 'pca'"):
        pv.embedding(vae, images, method="pcaa")
    with pytest.raises(UserError, match="one label for each"):
        pv.embedding(vae, images, labels=labels[:5])


def test_the_aggregate_posterior_stands_beside_the_prior(vae, images) -> None:
    assert len(pv.aggregate_posterior(vae, images).axes) == 2
    one = pv.build("ppca", "linear", (3,), latent_dim=1)
    assert len(pv.aggregate_posterior(one, torch.randn(9, 3)).axes[0].patches) > 0
    labels = torch.arange(60) % 3
    assert pv.aggregate_posterior(by_hand.Conditional(64), images.flatten(1), labels).axes
    with pytest.raises(UserError, match="three data"):
        pv.aggregate_posterior(vae, images[:2])


@pytest.mark.parametrize("shape", [(1, 4, 5), (3, 4, 5), (4, 5), (2,), (6,)])
def test_uncertainty_and_neighbours_of_every_shape(shape) -> None:
    vae = pv.build("ppca", "linear", shape, latent_dim=2)
    x = torch.rand(7, *shape, generator=generator(1))
    assert pv.reconstruction_uncertainty(vae, x, num_samples=5).axes
    assert pv.nearest_training(x[:3], x).axes


def test_the_nearest_is_the_nearest() -> None:
    x = torch.randn(30, 2, 3, generator=generator(2))
    index, distance = nearest_neighbours(x[10:13] + 1e-4, x)
    assert index.tolist() == [10, 11, 12]
    assert float(distance.max()) < 1e-3
    with pytest.raises(UserError, match="one shape"):
        nearest_neighbours(x, x[:, 0])


def test_curves_of_several_runs() -> None:
    metrics = [{"epoch": e, "train_loss": 3.0 / e, "validation_loss": 4.0 / e} for e in (1, 2, 3)]
    bare = [{"epoch": 1, "train_loss": 3.0}]
    ax = overlaid_curves({"_a$": metrics, "b": bare}).axes[0]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [" _a\\$", "b: minus the training loss"]
    with pytest.raises(UserError, match="no validation figures"):
        elbo_parts(bare)
    with pytest.raises(UserError, match="no runs"):
        overlaid_curves({})
