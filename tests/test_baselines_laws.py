"""What holds of every baseline, found in the registry."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pyro_vae as pv
from pyro_vae import registry
from pyro_vae.baselines.base import Baseline
from pyro_vae.baselines.training import declare
from pyro_vae.errors import UserError
from pyro_vae.seeding import generator

DENSE = {"encoder": "mlp:hidden=[8]", "decoder": "mlp:hidden=[8]", "latent_dim": 3}
SMALL: dict[str, dict[str, Any]] = {  # of those whose defaults take their time
    "rbm": {"hidden": 8}, "dbn": {"first": 8, "second": 8, "epochs": 1, "top_epochs": 2}, "autoencoder": DENSE,
    "gan": {**DENSE, "critic": "mlp:hidden=[8]"}, "vae-gan": {**DENSE, "critic": "mlp:hidden=[8]"},
}  # fmt: skip
DATA = {
    "binary": pv.load_data("digits"),
    "grey": pv.load_data("digits", binarization="none", dequantization="uniform"),
}


def begun(name: str, passes: int) -> tuple[Baseline, pv.Data]:
    made = declare(name, SMALL.get(name, {}), (1, 8, 8), 0)
    data = DATA[made.data]
    made.require(data)
    made.start(data, generator("test start", 0))
    for number in range(passes):
        made.train_pass(number, data, generator("test pass", number))
    return made, data


@pytest.mark.parametrize("name", registry.names("baselines"))
def test_a_state_that_is_put_back_goes_on_to_the_bit(name: str) -> None:
    first, data = begun(name, 1)
    second = declare(name, SMALL.get(name, {}), (1, 8, 8), 1)
    second.load_state_dict(first.state_dict())
    before = {key: tensor.clone() for key, tensor in first.state_dict().items()}
    for made in (first, second):
        found = made.train_pass(1, data, generator("test pass", 1))
        assert found
        assert all(isinstance(value, float) for value in found.values())
    ours, theirs = first.state_dict(), second.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert any(not torch.equal(ours[key], before[key]) for key in ours)


@pytest.mark.parametrize("name", registry.names("baselines"))
def test_samples_are_images_and_come_again_with_their_seed(name: str) -> None:
    made, _ = begun(name, 0)
    drawn = made.sample(5, 3)
    assert drawn.shape == (5, 1, 8, 8)
    assert bool(((drawn >= 0) & (drawn <= 1)).all())
    assert torch.equal(drawn, made.sample(5, 3))


@pytest.mark.parametrize("name", registry.names("baselines"))
def test_the_other_kind_of_images_is_refused(name: str) -> None:
    made = declare(name, SMALL.get(name, {}), (1, 8, 8), 0)
    with pytest.raises(UserError, match="give --binarization"):
        made.require(DATA["grey" if made.data == "binary" else "binary"])
