"""The picture of the bound against K, and the digits that are printed."""

from __future__ import annotations

import math

import pytest
import torch

import pyro_vae as pv
from pyro_vae.analysis.curve import bound_against_samples
from pyro_vae.errors import UserError
from pyro_vae.evaluation.curve import curve
from pyro_vae.evaluation.result import digits, total_error
from pyro_vae.seeding import generator


@pytest.fixture
def weights() -> torch.Tensor:
    return torch.randn(64, 5, generator=generator(0), dtype=torch.float64)


def test_the_line_is_the_mean_bound_and_the_band_holds_95_percent(weights):
    found = curve(weights)
    ax = bound_against_samples(found)
    (line,) = ax.get_lines()
    x, y = line.get_data()
    assert list(x) == found.num_samples.tolist() == [1, 2, 4, 8, 16, 32, 64]
    torch.testing.assert_close(torch.as_tensor(y), found.mean)
    (band,) = ax.collections
    vertices = torch.as_tensor(band.get_paths()[0].vertices)
    at_one = vertices[vertices[:, 0] == 1][:, 1]
    width = 2 * 1.959964 * weights.std(0).square().sum().sqrt() / math.sqrt(64) / 5
    assert float(at_one.max() - at_one.min()) == pytest.approx(float(width), rel=1e-6)
    assert ax.get_xscale() == "log"
    assert "nats" in ax.get_ylabel()


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")  # nothing is trained
def test_levels_are_bias_corrected_lines_with_names():
    vae = pv.build("ppca", "linear", (3,), latent_dim=2)
    x = torch.zeros(5, 3)
    level = pv.log_likelihood(vae, x, num_samples=100)
    found = pv.bound_curve(vae, x, num_samples=100)
    ax = bound_against_samples({"ours": found}, levels={"K = 100": level})
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["ours", "K = 100"]
    expected = float((level.log_likelihood - level.bias).mean())
    assert ax.get_lines()[1].get_ydata()[0] == pytest.approx(expected)


def test_several_curves_share_axes_that_are_given(weights):
    ax = bound_against_samples({"a": curve(weights), "b": curve(weights - 1)})
    assert bound_against_samples(curve(weights), ax) is ax
    assert len(ax.get_lines()) == 3


def test_different_images_are_refused(weights):
    with pytest.raises(UserError, match="same images"):
        bound_against_samples({"a": curve(weights), "b": curve(weights[:, :2])})
    with pytest.raises(UserError, match="no curve"):
        bound_against_samples({})


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (87.53127, 0.25, "87.53"),
        (87.53127, 0.36, "87.5"),
        (19.0149, 0.011, "19.015"),
        (19.0149, 0.96, "19.0"),
        (19.0149, 0.094, "19.01"),
        (-19.0149, 0.41, "-19.0"),
        (1234.5, 56.0, "1230"),
        (1234.5, 11.0, "1234"),
        (19.0149, 4.1, "19"),
        (19.0149, 0.0, "19.0149"),
        (19.01494999, 1e-9, "19.0149"),
        (19.0149, math.nan, "19"),
        (19.0149, math.inf, "19"),
        (math.nan, 0.1, "nan"),
        (math.inf, 0.1, "inf"),
    ],
)
def test_no_digit_is_printed_that_the_error_does_not_support(value, error, text):
    assert digits(value, error) == text


def test_the_spread_over_images_holds_the_noise_of_estimates():
    assert total_error(3.0, 4.0) == 4.0
    assert total_error(5.0, 4.0) == 5.0  # images that lie closer together than their noise allows
    assert total_error(math.nan, 4.0) == 4.0
    assert total_error(math.inf, 4.0) == math.inf
    assert math.isnan(total_error(math.nan, math.nan))


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")  # nothing is trained
def test_a_printed_nll_has_the_decimals_of_its_error():
    vae = pv.build("ppca", "linear", (3,), latent_dim=2)
    x = torch.randn(20, 3, generator=generator(1))
    result = pv.log_likelihood(vae, x, num_samples=100)
    assert str(result).startswith(f"NLL {digits(result.nll, result.nll_total_se)} +- ")
