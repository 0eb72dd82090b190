"""What layers carry: KL by layer, collapsed ones by name, free bits and balance by layer, samples at a temperature."""

from __future__ import annotations

import re
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_hierarchy import build, drawn
from torch import Tensor

import pyro_vae as pv
from pyro_vae.evaluation.layers import kl_of_layers
from pyro_vae.objectives.aggregate import FreeBits
from pyro_vae.objectives.base import LAST_STEP
from pyro_vae.programs.trace import draw_terms
from pyro_vae.seeding import seeded

DIM = 5


def hierarchy(*, idle: bool = False) -> Any:
    """Two layers, of which the upper one is the prior whatever x is, where that is asked."""
    vae = build([3, 2], "bottom-up", DIM)
    if idle:
        with torch.no_grad():
            vae.posterior.head.map.weight.zero_()
            vae.posterior.head.map.bias.copy_(torch.tensor([0.0, 0.0, 0.5413, 0.5413]))
            vae.priors[0].head.map.weight.zero_()
    return vae


def test_the_kl_of_layers_adds_up_to_the_rate_and_collapsed_ones_are_named() -> None:
    """Within 5 standard errors of the difference of two sets of draws; only a layer without active units is named."""
    vae = hierarchy()
    x = drawn(vae, 400)
    found = pv.latent_information(vae, x)
    assert list(found.kl_per_layer) == ["z1", "z2"]
    assert abs(sum(found.kl_per_layer.values()) - found.rate) < 5 * 2**0.5 * found.rate_se
    assert not [w for w in found.warnings if "collapsed" in w]
    idle = pv.latent_information(hierarchy(idle=True), x)
    (line,) = [w for w in idle.warnings if "collapsed" in w]
    assert re.match(r"the layer 'z2' has collapsed: its KL is .* nats, and none of its 2 units are active", line)
    assert idle.kl_per_layer["z2"] == pytest.approx(0.0, abs=1e-3)
    assert idle.summary()["kl_per_layer"] == idle.kl_per_layer


@torch.no_grad()
def test_a_layer_that_only_repeats_what_is_above_it_is_named() -> None:
    """q(z1 given x, z2) = p(z1 given z2): the mean of z1 moves with x through z2, and z1 carries nothing of its own."""
    program = {
        "name": "hierarchical",
        "below": [3],
        "hidden": [8],
        "inference": "top-down",
        "skip": True,
        "residual": True,
    }
    with seeded(0):
        vae: Any = pv.build("hvae", "linear", (6,), latent_dim=2, prior="standard-normal", program=program)
        head = vae.posteriors[0].head.map
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.0] * 3 + [0.5413] * 3))  # no shift, a scale of 1
        x = torch.rand(400, 6).round()
    found = pv.latent_information(vae, x)
    assert dict(zip(found.activity.sites, found.activity.counts, strict=True))["z1"]
    (line,) = [w for w in found.warnings if "collapsed" in w]
    assert "'z1' has collapsed" in line


def loss(vae: Any, x: Tensor, step: int = 0, **options: Any) -> Tensor:
    """The surrogate of free bits, of the same draws each time."""
    with seeded(0):
        return FreeBits(**options)(vae, x, step=step)[1].detach()


def test_free_bits_and_balance_by_layer() -> None:
    """A floor that both layers are under counts once for each; weights of a warm-up are those that are written down."""
    vae = hierarchy()
    x = drawn(vae, 30)
    with seeded(0), torch.no_grad():
        terms = draw_terms(vae, x, num_samples=1)
    reconstruction = terms.log_likelihood.mean()
    floored = loss(vae, x, free=1e4, per="layer")
    torch.testing.assert_close(floored, 2e4 - reconstruction)
    whole = loss(vae, x, free=0.0, per="layer")
    torch.testing.assert_close(whole, -terms.log_weight.mean())
    torch.testing.assert_close(loss(vae, x, free=0.0), whole)
    half = loss(vae, x, step=4, free=0.0, warmup_steps=10)
    torch.testing.assert_close(half, -reconstruction + 0.5 * (whole + reconstruction))
    with seeded(0):
        kl = torch.tensor(list(_kl_of_one_draw(vae, x).values())).double()
    share = (0.01 + kl.abs()) / torch.tensor([3.0, 2.0]).double()  # nats per unit, as section H of DVAE++ has it
    balanced = -reconstruction + 0.5 * (share / share.mean() * kl).sum()
    torch.testing.assert_close(loss(vae, x, step=4, free=0.0, per="layer", warmup_steps=10, balance=True), balanced)
    floored = (
        -reconstruction + 0.5 * (share / share.mean() * 100.0).sum()
    )  # the floor is no part of what a layer carries
    torch.testing.assert_close(loss(vae, x, step=4, free=100.0, per="layer", warmup_steps=10, balance=True), floored)
    for step in (9, LAST_STEP):
        after = loss(vae, x, step=step, free=0.0, per="layer", warmup_steps=10, balance=True)
        torch.testing.assert_close(after, whole)
    with pytest.raises(pv.UserError, match="warmup_steps beside balance"):
        FreeBits(balance=True)


def _kl_of_one_draw(vae: Any, x: Tensor) -> dict[str, float]:
    from pyro_vae.programs.trace import isolated, latent_sites, trace

    with isolated(), torch.no_grad():
        traces = trace(vae, x, num_samples=1)
        sites = latent_sites(traces.guide)
        return {
            n: float((s["fn"].log_prob(s["value"]) - traces.model.nodes[n]["fn"].log_prob(s["value"])).mean())
            for n, s in sites.items()
        }


def test_a_balanced_step_is_one_graph() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    vae = hierarchy()
    objective = FreeBits(per="layer", warmup_steps=10, balance=True)
    x = drawn(vae, 6)
    with seeded(0):
        graph = make_fx(lambda x, step: objective(vae, x, step=step)[1])(x, torch.tensor(3.0))
        assert torch.isfinite(graph(drawn(vae, 6, seed=9), torch.tensor(11.0)))


def test_the_kl_of_a_flat_model_is_that_of_its_layer() -> None:
    vae = pv.build("ppca", "linear", (DIM,), latent_dim=2)
    assert list(kl_of_layers(vae, torch.zeros(4, DIM))) == ["z"]


def test_samples_at_a_temperature_have_scales_that_much_smaller() -> None:
    """Variances of 20,000 draws within 5 standard errors; 1 is what a seed drew before; what has no scale is refused."""
    vae = hierarchy()
    plain, cold = (pv.sample(vae, 20_000, mean=True, temperature=t, seed=3) for t in (1.0, 0.5))
    torch.testing.assert_close(plain, pv.sample(vae, 20_000, mean=True, seed=3))
    ratio = cold.var(0) / plain.var(0)
    assert bool(((ratio - 0.25).abs() < 5 * 0.25 * (4 / 20_000) ** 0.5).all())
    for prior in ("gaussian-mixture:components=2", "maf:layers=1"):
        other = pv.build("two-layer", "diagonal", (1, 4, 4), prior=prior, encoder="mlp:hidden=[4]", latent_dim=2)
        with pytest.raises(pv.UserError, match="no scale that a temperature could multiply"):
            pv.sample(other, 2, temperature=0.7)
    for wrong in (0.0, -1.0):
        with pytest.raises(pv.UserError, match="temperature above 0"):
            pv.sample(vae, 2, temperature=wrong)


def test_a_latent_of_an_inner_plate_is_cold_about_its_own_mean() -> None:
    """As many draws as elements of the plate: the axes could be exchanged without a word."""

    class Plated(torch.nn.Module):
        event_shape = (3,)

        def model(self, x: Tensor) -> None:
            means = torch.tensor([10.0, 20.0, 30.0]).unsqueeze(-1)
            with pyro.plate("data", len(x), dim=-1):
                with pyro.plate("u", 3, dim=-2):
                    z = pyro.sample("z", dist.Normal(means, 1.0))
                pyro.sample("x", dist.Normal(z.transpose(-1, -2), 0.001).to_event(1), obs=x)

        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1), pyro.plate("u", 3, dim=-2):
                pyro.sample("z", dist.Normal(x.transpose(-1, -2), 1.0))

    cold = pv.sample(Plated(), 3, temperature=1e-3)
    torch.testing.assert_close(cold, torch.tensor([10.0, 20.0, 30.0]).expand(3, 3), rtol=0, atol=0.05)


def test_a_latent_is_not_shared_by_rows_of_different_y() -> None:
    """The one draw was the first row's: rows of another y were draws of no p(x given y)."""

    class Conditional(torch.nn.Module):
        event_shape = (1,)

        def model(self, x: Tensor, y: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                z2 = pyro.sample("z2", dist.Normal(100 * y.reshape(-1, 1), 1.0).to_event(1))
                z1 = pyro.sample("z1", dist.Normal(z2, 0.1).to_event(1))
                pyro.sample("x", dist.Normal(z1, 0.01).to_event(1), obs=x)

        def guide(self, x: Tensor, y: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                z2 = pyro.sample("z2", dist.Normal(x, 1.0).to_event(1))
                pyro.sample("z1", dist.Normal(z2, 0.1).to_event(1))

    with pytest.raises(pv.UserError, match="rows of one y"):
        pv.sample(Conditional(), 3, torch.arange(3.0), shared="z2")
    assert bool((pv.sample(Conditional(), 2, torch.ones(2), shared="z2") - 100).abs().max() < 10)


def test_draws_that_share_their_upper_layers_differ_below() -> None:
    """All layers from the one named upwards are one draw: with the lowest, means of x are all alike."""
    vae = hierarchy()
    alike = pv.sample(vae, 50, mean=True, shared="z1")
    assert bool((alike == alike[0]).all())
    upper = pv.sample(vae, 4000, mean=True, shared="z2").var(0)
    assert bool((upper > 0).all())
    assert bool((upper < pv.sample(vae, 4000, mean=True).var(0) * 1.2).all())
    assert pv.sample(vae, 3, shared="z2", temperature=0.5).shape == (3, DIM)
    with pytest.raises(pv.UserError, match="shared = 'z3'"):
        pv.sample(vae, 2, shared="z3")


@pytest.mark.filterwarnings("ignore")
def test_layers_are_of_the_rows_that_are_evaluated() -> None:
    """The first 500 rows were taken for all: of data in an order of their own, layers did not add up to the rate."""
    x = torch.cat([torch.zeros(500, 6), torch.ones(300, 6)])
    program = pv.build("mlp", "diagonal", (6,), latent_dim=3, encoder="mlp:hidden=[8]", decoder="mlp:hidden=[8]")
    with torch.no_grad():
        program.encoder.layers[0].weight.mul_(10)
    figures, result = pv.evaluate(program, pv.Data("rows", x, x[:0], x, levels=None), num_samples=50)
    apart = abs(float(result.kl[:500].mean() - result.kl[500:].mean()))
    assert apart > 0.5
    # the fault is 0.375 of it, and errors of 800 rows of eight draws below 0.05 nats
    assert sum(figures["kl_per_layer"].values()) == pytest.approx(figures["kl"], abs=0.15 * apart)
