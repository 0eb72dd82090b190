"""One new file makes a new prior: it is listed, held to the laws, put in the matrix, built and trained, with no other edit."""

from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from typer.testing import CliRunner

import pyro_vae as pv
import pyro_vae.priors
from pyro_vae import registry
from pyro_vae.cli.app import app
from pyro_vae.errors import UserError
from pyro_vae.spec import Spec, parse_assignment

NAME = "logistic-for-a-test"
SOURCE = '''"""p(z) = prod_d Logistic(z_d; 0, s)."""

from typing import Annotated

import pyro.distributions as dist
from pydantic import Field
from torch import Tensor

from pyro_vae.priors.base import Distribution, GuideDensity, Prior, Shape, vector_zeros
from pyro_vae.registry import register


@register("priors", "logistic-for-a-test")
class MyLogistic(Prior):
    """p(z) = prod_d Logistic(z_d; 0, s): tails of exponential weight.

    Args:
        scale: s.
    """

    formula = "p(z) = prod_d Logistic(0, s)"

    def __init__(self, latent_shape: Shape, *, scale: Annotated[float, Field(gt=0)] = 0.55) -> None:
        super().__init__(latent_shape)
        self.scale = scale

    def forward(self, like: Tensor, guide: GuideDensity | None = None) -> Distribution:
        """The product, with batch shape ``()``."""
        zeros = vector_zeros(like, self.latent_shape)
        return dist.Logistic(zeros, zeros + self.scale).to_event(1)
'''
SIZES = {"latent_dim": 3, "encoder": "mlp:hidden=[8]", "decoder": "mlp:hidden=[8]"}


@pytest.fixture
def my_prior(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The file in a folder of its own, which the package of priors is made to look into; all put back afterwards."""
    (tmp_path / "my_prior.py").write_text(SOURCE)
    monkeypatch.setattr(pyro_vae.priors, "__path__", [*pyro_vae.priors.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    yield NAME
    found = registry._classes["priors"].pop(NAME, None)
    if found is not None:
        registry._schemas.pop(found, None)
    sys.modules.pop("pyro_vae.priors.my_prior", None)
    if hasattr(pyro_vae.priors, "my_prior"):
        del pyro_vae.priors.my_prior


def test_the_file_is_short() -> None:
    assert len(SOURCE.splitlines()) <= 40


def test_it_is_listed_with_its_formula_and_options(my_prior: str) -> None:
    assert my_prior in registry.names("priors")
    result = CliRunner().invoke(app, ["list", "priors"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert my_prior in result.output
    assert "Logistic(0, s)" in result.output
    assert "0.55" in result.output


def test_the_laws_and_the_matrix_take_it_from_the_same_list(my_prior: str) -> None:
    """What parametrises them is read anew, as in a session that began with the file in its place."""
    here = Path(__file__).parent
    laws, matrix, combinations, priors = (
        runpy.run_path(str(here / f"test_{name}.py"))
        for name in ("laws", "matrix", "laws_combinations", "blocks_priors")
    )
    assert ("priors", my_prior) in laws["BLOCKS"]
    assert my_prior in matrix["PRIORS"]
    assert any(my_prior in pair for pair in combinations["PAIRS"])
    assert my_prior in priors["PRIORS"]


def test_it_keeps_the_laws(my_prior: str) -> None:
    from densities import Z_LIMIT, discrepancy, plane

    prior: Any = registry.get("priors", my_prior)((2,))
    points, weights = plane(400)
    total, z = discrepancy(prior(torch.zeros(1, dtype=torch.float64)), points, weights)
    assert total == pytest.approx(1.0, abs=1e-3)
    assert z < Z_LIMIT


def test_it_is_built_and_trained(my_prior: str) -> None:
    data = pv.load_data("digits")
    vae = pv.build("mlp", "diagonal", data, prior=my_prior, **SIZES)
    run = pv.fit(vae, data, steps=2, compile="off", device="cpu")
    assert len(run.metrics) == 1
    assert pv.sample(vae, 2).shape == (2, 1, 8, 8)
    with pytest.raises(UserError, match="lives on vectors of real"):
        pv.build("mlp", "diagonal", data, prior=my_prior, posterior="bernoulli", **SIZES)


def test_it_goes_with_every_posterior_on_its_support(my_prior: str) -> None:
    """A cell of the matrix each: it builds and scores, or is refused by its support."""
    for posterior in registry.names("posteriors"):
        other: Any = registry.get("posteriors", posterior)
        if "Real" in repr(other.support):
            vae = pv.build("mlp", "diagonal", (4,), prior=my_prior, posterior=posterior, **SIZES)
            assert vae.prior.formula.endswith("Logistic(0, s)")
        else:
            with pytest.raises(UserError, match=r"lives on|choose a prior of such latents"):
                pv.build("mlp", "diagonal", (4,), prior=my_prior, posterior=posterior, **SIZES)


@pytest.mark.parametrize("name", ["vamp", NAME])
def test_swapping_a_prior_says_the_same_however_it_is_said(name: str, my_prior: str, tmp_path: Path) -> None:
    option, value = {"vamp": ("components", 7), my_prior: ("scale", 0.3)}[name]
    block = {"name": name, option: value}
    file = tmp_path / "model.toml"
    file.write_text(tomli_w.dumps({"latent_dim": 3, "prior": block, "decoder": {"name": "mlp", "hidden": [8]}}))
    guide = {"posterior": "diagonal-normal", "encoder": {"name": "mlp", "hidden": [8]}}
    said = dict(parse_assignment(text) for text in (f"prior={name}", f"prior.{option}={value}"))
    base = Spec.from_dict({"model": {"latent_dim": 3, "decoder": {"name": "mlp", "hidden": [8]}}, "guide": guide})
    ways = {
        "TOML": pv.build(file, guide, (4,), seed=2),
        "--prior": pv.build(base.model, base.guide, (4,), seed=2, prior=f"{name}:{option}={value}"),
        "--set": pv.build(base.override(said).model, guide, (4,), seed=2),
        "Python": pv.build(base.model, base.guide, (4,), seed=2, prior=block),
    }
    expected = ways["Python"].state_dict()
    for way, program in ways.items():
        assert program.spec == ways["Python"].spec, way
        assert getattr(program.prior, option) == value
        state = program.state_dict()
        assert list(state) == list(expected), way
        assert all(torch.equal(state[key], expected[key]) for key in state), way


def test_it_leaves_no_trace() -> None:
    assert NAME not in registry.names("priors")
