"""Generators trained against a critic."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import pyro_vae as pv
from pyro_vae.baselines.adam import Adam
from pyro_vae.baselines.base import How
from pyro_vae.baselines.gan import GAN, WARNING
from pyro_vae.baselines.training import declare, trained
from pyro_vae.errors import UserError
from pyro_vae.seeding import generator

SMALL: dict[str, Any] = {
    "latent_dim": 4, "decoder": "mlp:hidden=[32]", "critic": "mlp:hidden=[32]", "encoder": "mlp:hidden=[16]", "guide_epochs": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def digits() -> pv.Data:
    return pv.load_data("digits", binarization="none", dequantization="uniform")


def passes(made: GAN, data: pv.Data, numbers: range) -> GAN:
    for number in numbers:
        found = made.train_pass(number, data, generator("test pass", number))
        assert set(found) == {"critic", "generator"}
    return made


def test_adam_is_that_of_torch_and_its_state_is_all_in_its_buffers() -> None:
    ours, theirs = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    adam, reference = Adam([ours]), torch.optim.Adam([theirs])
    for step in range(4):
        for p, move in ((ours, adam.descend), (theirs, None)):
            loss = (p - torch.arange(3.0)).pow(4).sum()
            if move is not None:
                move(loss, 0.1)
            else:
                reference.param_groups[0]["lr"] = 0.1
                reference.zero_grad()
                loss.backward()
                reference.step()
        if step == 1:
            again = Adam([ours])
            again.load_state_dict(adam.state_dict())
            adam = again
    assert torch.allclose(ours, theirs, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gan", "vae-gan"])
def test_its_images_have_the_means_and_spreads_of_the_data(name: str, digits: pv.Data, tmp_path: Path) -> None:
    wider = {"decoder": "mlp:hidden=[64,64]", "critic": "mlp:hidden=[64,64]", "batch_size": 64, "average": 0.98}
    made: Any = declare(name, {**SMALL, **wider}, digits.event_shape, 0)
    made.start(digits, generator("test start", 0))
    passes(made, digits, range(60))
    made.finish(digits, tmp_path, 0, False)
    drawn, x = made.sample(1000, 0), digits.observed("train")
    assert float((drawn.mean(0) - x.mean(0)).abs().mean()) < 0.06
    assert float((drawn.std(0) - x.std(0)).abs().mean()) < 0.08
    found = made.figures(digits, How(chains=4, distributions=50, limit=5), lambda share: None)
    assert found["warnings"][0] == WARNING
    assert "BDMC gap" in found["computed"]
    assert found["bits_per_dim"] > 0
    assert 0.02 < found["scale"] < 0.5
    assert torch.equal(
        pv.load(tmp_path / "program").program.decoder(torch.zeros(1, 4)), made.program.decoder(torch.zeros(1, 4))
    )


def test_a_last_minibatch_of_one_row_leaves_numbers(digits: pv.Data) -> None:
    size = len(digits.train) // 2
    assert len(digits.train) == 2 * size + 1
    made = declare("vae-gan", {"batch_size": size, "epochs": 1}, digits.event_shape, 0)
    made.start(digits, generator("start", 0))
    assert all(math.isfinite(v) for v in made.train_pass(0, digits, generator("pass", 0)).values())
    assert all(bool(p.isfinite().all()) for p in made.parameters())


def test_no_pass_at_all_is_refused(digits: pv.Data) -> None:
    with pytest.raises(UserError, match="epochs = 0"):
        trained("gan", digits, epochs=0)


def test_what_it_cannot_make_is_refused() -> None:
    with pytest.raises(UserError, match="takes grey images"):
        declare("gan", SMALL, (1, 8, 8), 0).require(pv.load_data("digits"))
    with pytest.raises(UserError, match=r"in \[0, 1\], and moons has none"):
        declare("gan", SMALL, (2,), 0).require(pv.load_data("moons"))
