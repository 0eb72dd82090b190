"""Three layers of latents through every function that takes a program, with their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.text
import pyro
import pyro.distributions as dist
import pytest
import torch
from small import digits
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.analysis.below import followed
from pyro_vae.analysis.calibration import sbc
from pyro_vae.analysis.pictures import interpolations, manifold
from pyro_vae.evaluation.means import guide_means
from pyro_vae.seeding import generator

pytestmark = [
    pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning"),  # nothing is trained
    pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.gaps.NotConvergedWarning"),
]

LAYERS = {"z3": 2, "z2": 3, "z1": 4}
GUIDES = ["bottom-up", "ladder"]


def ladder(inference: str = "ladder") -> Any:
    """A declared program of three layers, on digits."""
    return pv.build(
        "ladder", "diagonal", (1, 8, 8), latent_dim=2, encoder="mlp:hidden=[8]", decoder="mlp:hidden=[8]",
        program=f"hierarchical:below=[4,3],inference={inference},hidden=[8]",
    )  # fmt: skip


def images(rows: int) -> Tensor:
    return digits().observed("test")[:rows]


class Chain(nn.Module):
    """z3 ~ N(0, 1), z2 ~ N(2 z3, 1), z1 ~ N(z2 + 1, 1) and w ~ N(0, 1), x ~ N((z1, w), 1), vectors all."""

    event_shape = (2,)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z3 = pyro.sample("z3", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            z2 = pyro.sample("z2", dist.Normal(2 * z3, 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2 + 1, 1.0).to_event(1))
            w = pyro.sample("w", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.cat([z1, w.expand_as(z1)], -1), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            for name in ("z3", "z2", "z1"):
                pyro.sample(name, dist.Normal(x[..., :1], 1.0).to_event(1))
            pyro.sample("w", dist.Normal(x[..., 1:], 1.0).to_event(1))


def test_layers_below_follow_by_their_means() -> None:
    t = torch.tensor([[-1.0], [0.5]])
    z = followed(Chain(), {"z3": t}, event_shape=(2,))
    assert {n: v.tolist() for n, v in z.items()} == {
        "z3": t.tolist(), "z2": (2 * t).tolist(), "z1": (2 * t + 1).tolist(), "w": [[0.0], [0.0]]
    }  # fmt: skip
    start = {n: torch.full((2, 1), v) for n, v in (("z3", 0.5), ("z2", 3.0), ("z1", 7.0), ("w", -1.0))}
    z = followed(Chain(), {"z3": t}, start=start, event_shape=(2,))
    assert z["z1"].tolist() == [[4.0], [7.0]]  # by as much as 2 z3 + 1; what was not moved is where it was
    assert z["w"].tolist() == [[-1.0], [-1.0]]


def test_the_unit_of_an_upper_layer_moves_what_is_below_it() -> None:
    figure = pv.traversals(Chain(), torch.tensor([[1.0, 9.0], [-1.0, -9.0], [2.0, 3.0]]), num_units=4, steps=3)
    paths = {line.get_label(): torch.as_tensor(line.get_xydata()) for ax in figure.axes for line in ax.get_lines()}
    for name, slope in (("z3[0]", 2.0), ("z2[0]", 1.0), ("z1[0]", 1.0)):
        spread = {"z3[0]": 1.0, "z2[0]": 5**0.5, "z1[0]": 6**0.5}[name]
        moved = paths[name][-1] - paths[name][0]
        assert float(moved[0]) == pytest.approx(4 * slope * spread, rel=0.1)  # the spread is that of 1,000 draws
        assert float(moved[1]) == pytest.approx(0.0, abs=1e-6)
    assert float((paths["w[0]"][-1] - paths["w[0]"][0])[0]) == pytest.approx(0.0, abs=1e-6)


def test_the_manifold_is_that_of_the_top_layer() -> None:
    ax = manifold(ladder(), 3)
    assert ax.get_images()
    with pytest.raises(
        pv.UserError, match="or a top layer of all, of dimension 2, and this program has 'z3' of dimension 1"
    ):
        manifold(Chain(), 3)


@pytest.mark.parametrize("inference", GUIDES)
def test_latents_go_in_and_out_by_name(inference: str) -> None:
    program, x = ladder(inference), images(5)
    z: Any = pv.encode(program, x)
    assert {n: v.shape[1:].numel() for n, v in z.items()} == LAYERS
    torch.testing.assert_close(pv.decode(program, z), pv.reconstruct(program, x))
    assert pv.decode(program, {"z3": z["z3"]}).shape == x.shape  # those below are drawn
    names, means = guide_means(program, x)
    assert {n.split("[")[0] for n in names} == set(LAYERS)
    assert means.shape == (5, 9)
    assert interpolations(program, x[:4], 3).get_images()


def test_figures_name_the_units_of_every_layer() -> None:
    figure = pv.traversals(ladder(), images(10), num_units=9, steps=2)
    said = {t.get_text().replace("$", "").replace("\\", "") for t in figure.findobj(matplotlib.text.Text)}
    assert {f"{n}[{i}]" for n, size in LAYERS.items() for i in range(size)} <= said


@pytest.mark.slow
@pytest.mark.parametrize("inference", GUIDES)
def test_posterior_trees_hold_every_layer(inference: str) -> None:
    program, x = ladder(inference), images(2)
    for source in ("guide", "psis", "nuts"):
        how: dict[str, Any] = {"num_warmup": 10, "num_chains": 2} if source == "nuts" else {}
        tree: Any = pv.posterior(program, x, source=source, num_samples=30, **how)
        for group in ("posterior", "log_prior", "prior"):
            assert set(tree[group].to_dataset().data_vars) == set(LAYERS), (source, group)
        sizes = {n: v.shape[-1] for n, v in tree["posterior"].to_dataset().data_vars.items()}
        assert sizes == LAYERS


@pytest.mark.slow
@pytest.mark.parametrize("inference", GUIDES)
def test_numbers_of_a_hierarchy(inference: str, tmp_path: Path) -> None:
    program, x = ladder(inference), images(40)
    iw = pv.log_likelihood(program, x[:6], num_samples=2000, seed=1)
    chains: Any = pv.annealed_log_likelihood(program, x[:6], num_chains=32, num_distributions=100)
    off = float((chains.log_likelihood - chains.bias - iw.log_likelihood + iw.bias).mean())
    assert abs(off) < 4 * (float(chains.mc_se.square().sum() + iw.mc_se.square().sum()) ** 0.5 / 6)
    both = pv.bidirectional(program, 16, num_distributions=20, num_chains=8)
    assert float(both.gap.mean()) > -4 * float(both.gap.std()) / 4
    assert pv.prove(program, x).verdict in ("proved", "not proved")
    gaps = pv.inference_gaps(program, x[:4], num_steps=20, num_draws=4, num_final_draws=100)
    assert gaps.forbidden == ()
    found = pv.latent_information(program, x, num_samples=4)
    assert {n.split("[")[0] for n in found.names} == set(LAYERS)
    assert found.information_lower is not None
    summary, _ = pv.evaluate(program, digits(), num_samples=50, limit=20)
    assert len(summary["active_units"]) == 3
    hidden = torch.rand(x[:2].shape, generator=generator(1)) < 0.5
    assert bool(torch.isfinite(pv.impute(program, x[:2], hidden, num_chains=4).mean).all())
    ranks = sbc(program, 40, 19)
    assert {str(n).split("[")[0] for n in ranks.ranks.coords["quantity"].values} >= set(LAYERS)
    assert len(pv.score(program, x[:3]).result) == 3
    exported = pv.export(program, tmp_path)
    assert set(exported) == {"encoder", "decoder"}


@pytest.mark.slow
def test_the_report_of_a_hierarchy_shows_all_sections(tmp_path: Path) -> None:
    program = ladder()
    run = pv.fit(program, digits(), epochs=1, out=tmp_path / "run", compile="off")
    text = Path(pv.report(run, tmp_path / "page.html", num_samples=50)).read_text()
    for words in ("Manifold", "Traversals", "z3", "z2", "z1"):
        assert words in text, words
    assert [line for line in text.splitlines() if "left out" in line] == []
