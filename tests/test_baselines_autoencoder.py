"""The deterministic autoencoder and the density that it is given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sklearn.decomposition import PCA

import pyro_vae as pv
from pyro_vae.baselines.autoencoder import Autoencoder
from pyro_vae.baselines.base import How
from pyro_vae.baselines.density import codes, fit_prior
from pyro_vae.errors import UserError
from pyro_vae.seeding import generator, seeded

LINEAR = {
    "latent_dim": 2,
    "likelihood": "normal",
    "encoder": "linear",
    "decoder": "linear",
    "posterior": "full-rank-normal",
}


def trained(made: Autoencoder, data: pv.Data) -> Autoencoder:
    made.start(data, generator("test start", 0))
    for number in range(made.passes):
        made.train_pass(number, data, generator("test pass", number))
    return made


@pytest.fixture(scope="module")
def normal_data() -> pv.Data:
    source = torch.Generator().manual_seed(0)
    z = torch.randn(1200, 2, generator=source) * torch.tensor([2.0, 1.0])
    x = z @ torch.randn(2, 6, generator=source) + 0.5 * torch.randn(1200, 6, generator=source) + 1
    return pv.Data("plane", x[:1000], x[1000:1100], x[1100:], None)


@pytest.mark.slow
def test_a_linear_one_with_normal_noise_is_principal_components_and_its_density_is_exact(normal_data: pv.Data) -> None:
    """Reconstruction finds the plane of PCA; the density made of it is N(m, W S W^T + s^2 I), never above probabilistic PCA's."""
    made = trained(
        Autoencoder(
            (6,), prior="full-normal", epochs=200, batch_size=1000, lr=0.05, prior_epochs=400, guide_epochs=1, **LINEAR
        ),
        normal_data,
    )
    pca = PCA(2).fit(normal_data.train.numpy())
    error = (
        (normal_data.train - torch.from_numpy(pca.inverse_transform(pca.transform(normal_data.train)))).square().mean()
    )
    program = made.program
    with torch.no_grad():
        mean, _ = program.likelihood.location_and_scale(program.decoder(codes(program, normal_data)))
    assert float((normal_data.train - mean).square().mean()) == pytest.approx(float(error), rel=1e-4)
    made.finish(normal_data, None, 0, False)
    with torch.no_grad():
        at = torch.eye(3, 2)  # the decoder at the unit vectors and at zero
        f, scale = program.likelihood.location_and_scale(program.decoder(at))
        weight, origin, prior = (f[:2] - f[2]).double(), f[2].double(), program.prior(normal_data.test)
        covariance = weight.T @ prior.covariance_matrix.double() @ weight + scale.double() ** 2 * torch.eye(6)
        exact = torch.distributions.MultivariateNormal(origin + prior.loc.double() @ weight, covariance)
    x = normal_data.test[:40]
    found = pv.annealed_log_likelihood(program, x, num_chains=16, num_distributions=200)
    error = found.log_likelihood - exact.log_prob(x.double())
    assert float((error / found.mc_se).abs().max()) < 4.5
    assert abs(float(error.mean())) < 4 * found.nll_mc_se < 0.2
    best = float(pca.score(normal_data.train.numpy()))  # the highest likelihood of any such model
    ours = float(exact.log_prob(normal_data.train.double()).mean())
    assert (
        best - 0.3 < ours <= best + 1e-3
    )  # of the distance 0.19 is the scale, fitted to what is left by reconstruction


def clusters() -> torch.Tensor:
    source = torch.Generator().manual_seed(0)
    return torch.cat([torch.randn(300, 2, generator=source) * 0.3 + at for at in (-5.0, 0.0, 4.0)])


def test_a_mixture_is_fitted_to_codes_by_em() -> None:
    mixture = pv.build("mixture", "diagonal", (4,), latent_dim=2, prior="gaussian-mixture:components=3").prior
    assert fit_prior(mixture, clusters(), 1, 0) > -2.0  # entropy of the truth: log 3 + 2 (1.42 - 1.2)
    assert sorted(mixture.loc[:, 0].tolist()) == pytest.approx([-5, 0, 4], abs=0.1)


@pytest.mark.slow
def test_a_flow_is_fitted_to_codes_by_gradients() -> None:
    flow = pv.build("spline-flow", "diagonal", (4,), latent_dim=2).prior
    assert fit_prior(flow, clusters(), 0, 0) < fit_prior(flow, clusters(), 10, 0)


def test_a_prior_is_fitted_until_it_has_arrived() -> None:
    """Codes far from where the prior begins: within 0.05 nats of the normal in closed form, from few rows and passes."""
    with seeded(0):
        z = 5 + 3 * torch.randn(1000, 4)
        prior = pv.build("mlp", "diagonal", (4,), latent_dim=4, prior="full-normal").prior
    best = torch.distributions.MultivariateNormal(z.mean(0), torch.cov(z.T, correction=0)).log_prob(z).mean()
    assert abs(fit_prior(prior, z, 1, 0) - float(best)) < 0.05


def test_a_second_one_takes_the_codes_of_the_first_and_the_directory_holds_a_run(tmp_path: Path) -> None:
    small = {"latent_dim": 3, "encoder": "mlp:hidden=[8]", "decoder": "mlp:hidden=[8]", "guide_epochs": 2}
    data = pv.load_data("digits")
    first = trained(Autoencoder(data.event_shape, epochs=2, prior="gaussian-mixture:components=2", **small), data)
    second = Autoencoder(data.event_shape, epochs=0, prior="standard-normal", **small)
    second.begin_with(first)
    before = {name: p.clone() for name, p in first.program.decoder.named_parameters()}
    assert torch.equal(codes(first.program, data), codes(second.program, data))
    first.finish(data, tmp_path, 0, False)
    assert all(torch.equal(p, before[name]) for name, p in first.program.decoder.named_parameters())
    found = first.figures(data, How(samples=50, chains=2, distributions=5, limit=5), lambda share: None)
    assert found["num_data"] == 5
    assert "AIS of 5 images" in found["computed"]
    again = pv.load(tmp_path / "program").program
    x = data.observed("test")
    assert torch.equal(again.q(x).mean, first.program.q(x).mean)
    with pytest.raises(UserError, match="the decoder of the autoencoder of --from is another"):
        Autoencoder(
            data.event_shape, epochs=0, prior="standard-normal", **{**small, "decoder": "mlp:hidden=[9]"}
        ).begin_with(first)


def test_what_data_it_takes_is_said_by_the_likelihood() -> None:
    assert Autoencoder.kind_of({}) == "binary"
    assert Autoencoder.kind_of({"likelihood": "normal:scale=shared"}) == "grey"
