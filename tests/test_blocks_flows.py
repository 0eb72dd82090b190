"""Bijections, conditioners and layers: inverses, log-determinants against autograd, what sees what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from densities import shaken
from torch import Tensor
from torch.autograd.functional import jacobian

from pyro_vae.networks.bijections import Affine, Spline
from pyro_vae.networks.flows import Flow
from pyro_vae.networks.masked import MaskedNet
from pyro_vae.seeding import seeded

BIJECTIONS = {"affine": Affine(), "spline": Spline(bins=6, bound=3.0)}
KINDS = ["autoregressive", "coupling"]


def make(name: str, kind: Any, dim: int, context_dim: int = 0, layers: int = 3) -> Any:
    with seeded(0):
        return shaken(Flow(dim, BIJECTIONS[name], kind, layers, [16], context_dim))


def apply(transforms: list[Any], x: Tensor) -> Tensor:
    for transform in transforms:
        x = transform(x)
    return x


@pytest.mark.parametrize("name", BIJECTIONS)
def test_a_bijection_has_the_slope_and_the_inverse_that_it_says(name: str) -> None:
    with seeded(0):
        params = torch.randn(200, BIJECTIONS[name].num_params, dtype=torch.float64)
        x = 2 * torch.randn(200, dtype=torch.float64)
    x.requires_grad_()
    y, log_slope = BIJECTIONS[name].forward(x, params)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(log_slope, slope.log(), atol=1e-9, rtol=0)
    back, same_slope = BIJECTIONS[name].inverse(y, params)
    torch.testing.assert_close(back, x, atol=1e-8, rtol=0)
    torch.testing.assert_close(same_slope, log_slope, atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", BIJECTIONS)
def test_zero_parameters_are_the_identity(name: str) -> None:
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)
    y, log_slope = BIJECTIONS[name].forward(x, torch.zeros(41, BIJECTIONS[name].num_params, dtype=torch.float64))
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(log_slope, torch.zeros_like(x), atol=1e-12, rtol=0)


def test_a_spline_is_continuous_and_increasing_across_its_box() -> None:
    spline = Spline(bins=5, bound=2.0)
    with seeded(1):
        params = 3 * torch.randn(1, spline.num_params, dtype=torch.float64)
    x = torch.linspace(-2.5, 2.5, 20_001, dtype=torch.float64)
    y, log_slope = spline.forward(x, params.expand(len(x), -1))
    assert bool((y.diff() > 0).all())
    assert float(y.diff().max()) <= float(log_slope.exp().max()) * float(x.diff().max()) * 1.01
    assert float(y[0]) == -2.5
    assert float(y[-1]) == 2.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BIJECTIONS)
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_a_flow_has_the_log_determinant_of_autograd_and_comes_back(name: str, kind: str, dim: int) -> None:
    flow = make(name, kind, dim, context_dim=3)
    with seeded(2):
        context, x = torch.randn(3, dtype=torch.float64), torch.randn(dim, dtype=torch.float64)
    transforms = flow.transforms(context)
    y, total = x, torch.zeros((), dtype=torch.float64)
    for transform in transforms:
        after = transform(y)
        total = total + transform.log_abs_det_jacobian(y, after)
        # a pair that is not in the cache is scored the same
        torch.testing.assert_close(
            transform.log_abs_det_jacobian(y.clone(), after.clone()), transform.log_abs_det_jacobian(y, after)
        )
        y = after
    matrix = jacobian(lambda v: apply(flow.transforms(context), v), x)
    torch.testing.assert_close(total, torch.linalg.slogdet(matrix).logabsdet, atol=1e-9, rtol=0)
    back = y.clone()
    for transform in reversed(flow.transforms(context)):
        back = transform.inv(back)
    torch.testing.assert_close(back, x, atol=1e-7, rtol=0)


@pytest.mark.parametrize("context_dim", [0, 3])
def test_an_output_sees_the_inputs_before_it_and_no_others(context_dim: int) -> None:
    degrees = [2, 0, 3, 1]
    with seeded(0):
        net = shaken(MaskedNet(degrees, 2, [16, 16], context_dim))
        x = torch.randn(4, dtype=torch.float64)
    seen = jacobian(net, x).abs().sum(1) > 0
    assert seen.tolist() == [[below < own for below in degrees] for own in degrees]


@pytest.mark.parametrize("kind", KINDS)
def test_a_context_is_broadcast_over_samples(kind: str) -> None:
    flow = make("affine", kind, 3, context_dim=2)
    with seeded(3):
        context, x = torch.randn(4, 2, dtype=torch.float64), torch.randn(7, 4, 3, dtype=torch.float64)
    whole = apply(flow.transforms(context), x)
    for i in range(4):
        torch.testing.assert_close(whole[:, i], apply(flow.transforms(context[i]), x[:, i]))


def test_the_inverse_of_a_deep_autoregressive_layer_does_not_overflow() -> None:
    with seeded(0):
        flow = shaken(Flow(40, Affine(), "autoregressive", 2, [64]), size=0.5).float()
        y = 5 * torch.randn(16, 40)
    for transform in reversed(flow.transforms()):
        y = transform.inv(y)
    assert bool(torch.isfinite(y).all())
