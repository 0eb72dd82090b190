"""The laws of every registered encoder and decoder: leading axes, gradients, save and load, repr, options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from densities import shaken
from small import small

from pyro_vae import registry
from pyro_vae.errors import UserError
from pyro_vae.networks.base import activation
from pyro_vae.networks.heads import Head, positive, positive_inverse
from pyro_vae.seeding import generator, seeded

NETWORKS = [(kind, name) for kind in ("encoders", "decoders") for name in registry.names(kind)]
SHAPES = [(5,), (1, 8, 8), (3, 6, 4)]

every_network = pytest.mark.parametrize(("kind", "name"), NETWORKS)


def make(kind: str, name: str, shape: tuple[int, ...], seed: int = 0) -> Any:
    """A small network for events of a shape, or None where it refuses such events."""
    cls: Any = registry.get(kind, name)
    options = small(kind, name)
    with seeded(seed):
        try:
            network = cls(shape, **options) if kind == "encoders" else cls((3,), shape, **options)
        except UserError:
            return None
    return shaken(network, 0.1, seed=seed).eval()


def networks(kind: str, name: str) -> list[Any]:
    """One for every shape of event that it takes, images of 8 x 8 among them."""
    found = {shape: make(kind, name, shape) for shape in SHAPES}
    assert found[(1, 8, 8)] is not None
    return [network for network in found.values() if network is not None]


def some_input(network: Any, *leading: int) -> torch.Tensor:
    return torch.randn(*leading, *network.in_shape, generator=generator(1), dtype=torch.float64)


@every_network
def test_any_leading_axes(kind: str, name: str) -> None:
    for network in networks(kind, name):
        x = some_input(network, 2, 3)
        whole = network(x)
        assert whole.shape == (2, 3, *network.out_shape)
        assert whole.dtype == torch.float64
        looped = torch.stack([torch.stack([network(row) for row in rows]) for rows in x])
        assert looped.shape == whole.shape
        torch.testing.assert_close(looped, whole, rtol=1e-10, atol=1e-10)
        assert network(x[:, :0]).shape == (2, 0, *network.out_shape)


@every_network
def test_gradients_reach_every_parameter(kind: str, name: str) -> None:
    for network in networks(kind, name):
        y = network(some_input(network, 16))
        if not list(network.parameters()):
            continue
        (y * torch.linspace(0.5, 1.5, y[0].numel(), dtype=y.dtype).reshape(y.shape[1:])).sum().backward()
        without = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
        assert without == []
        assert all(torch.isfinite(p.grad).all() for p in network.parameters())


@every_network
def test_save_and_load(kind: str, name: str) -> None:
    for shape in SHAPES:
        network, other = make(kind, name, shape), make(kind, name, shape, seed=9)
        if network is None:
            continue
        other.load_state_dict(network.state_dict())
        x = some_input(network, 4)
        assert torch.equal(network(x), other(x))
        assert torch.equal(network(x), network(x))


@every_network
def test_it_says_what_it_is(kind: str, name: str) -> None:
    cls = registry.get(kind, name)
    for network in networks(kind, name):
        assert repr(network).startswith(cls.__name__)
        assert f"in_shape={network.in_shape}" in repr(network)
        assert f"out_shape={network.out_shape}" in repr(network)
    assert cls.__doc__


@every_network
def test_options_are_validated(kind: str, name: str) -> None:
    with pytest.raises(UserError, match="has no option 'nonsense'"):
        registry.validate(kind, name, {"nonsense": 1})
    for option, field in registry.schema(kind, name).model_fields.items():
        registry.validate(kind, name, {option: field.default})
        for wrong in (object(), -1, [], [0], "nonsense"):
            with pytest.raises(UserError, match=option):
                registry.validate(kind, name, {option: wrong})


@pytest.mark.parametrize("shape", [(1, 9, 9), (1, 8, 7), (8, 8), (64,)])
@pytest.mark.parametrize("kind", ["encoders", "decoders"])
def test_a_convolution_refuses_what_it_cannot_take(kind: str, shape: tuple[int, ...]) -> None:
    cls: Any = registry.get(kind, "conv")
    with pytest.raises(UserError, match="even height and width") as caught:
        cls(shape) if kind == "encoders" else cls((3,), shape)
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize(
    ("features", "event"), [((5,), (4,)), ((5,), (1, 4, 4)), ((6, 4, 4), (2, 4, 4)), ((6, 2, 2), (1, 4, 4))]
)
@pytest.mark.parametrize("num_params", [1, 2, 3])
def test_a_head(features: tuple[int, ...], event: tuple[int, ...], num_params: int) -> None:
    with seeded(0):
        head = Head(features, event, num_params).double()
    assert head.convolutional == (len(features) == 3 and features[1:] == event[1:])
    x = torch.randn(2, 3, *features, generator=generator(0), dtype=torch.float64)
    y = head(x)
    assert [tuple(p.shape) for p in y] == [(2, 3, *event)] * num_params
    one = head(x[1, 2])
    for p, q in zip(y, one, strict=True):
        torch.testing.assert_close(p[1, 2], q, rtol=1e-10, atol=1e-10)
    head.set_bias(0.75, param=num_params - 1)
    head.scale_weight(0.0)
    *others, last = head(x)
    assert torch.equal(last, torch.full_like(last, 0.75))
    assert all(not p.any() for p in others)


def test_positive_and_its_inverse() -> None:
    for value in (1e-4, 0.3, 1.0, 50.0, 1e4):
        for floor in (1e-6, 1e-5):
            raw = torch.tensor(positive_inverse(value, floor), dtype=torch.float64)
            assert float(positive(raw, floor)) == pytest.approx(value, rel=1e-9)
    extreme = positive(torch.tensor([-1e30, -50.0, 1e30]), 1e-6)
    assert torch.isfinite(extreme).all()
    assert (extreme >= 1e-6).all()


def test_every_activation_has_its_name() -> None:
    for name in ("relu", "silu", "gelu", "tanh", "elu", "softplus", "leaky-relu"):
        assert activation(name)(torch.tensor([-1.0, 2.0])).shape == (2,)
