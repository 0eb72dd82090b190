"""Extreme inputs in float32: finite losses and gradients from every likelihood and posterior, or a refusal by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae import registry
from pyro_vae.errors import NumericalError, UserError
from pyro_vae.programs.contract import admit
from pyro_vae.programs.rows import OtherRounding
from pyro_vae.programs.values import check_observed
from pyro_vae.seeding import generator, seeded
from pyro_vae.training.fit import _objective
from pyro_vae.training.settings import Settings

SHAPES = {"images": (1, 4, 4), "one pixel": (1, 1, 1)}
BATCH = 6


def of_kind(kind: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Extreme data of the kind that a likelihood takes."""
    full = lambda value: torch.full((BATCH, *shape), value)  # noqa: E731
    noise = torch.rand(BATCH, *shape, generator=generator(0))
    found = {"all 0": full(0.0), "all 1": full(1.0), "half of each": (noise > 0.5).float()}
    if kind == "count":
        found |= {"large counts": full(1e6), "rare": (noise > 0.99).float()}
    if kind in ("unit", "lattice"):
        found |= {"constant": full(128 / 255), "next to 0": full(1 / 255), "next to 1": full(254 / 255)}
    if kind == "unit":
        found |= {"1e-30": full(1e-30), "within rounding of 1": full(1 - 2**-24)}
    if kind == "real":
        found |= {
            "constant": full(0.3),
            "1e-30": noise * 1e-30,
            "1e30": (noise - 0.5) * 1e30,
            "minus 1e30": full(-1e30),
        }
    return found


def partner(posterior: str) -> str:
    """A prior whose latents a posterior draws."""
    wanted: Any = registry.get("posteriors", posterior)
    for prior in ("standard-normal", *registry.names("priors")):
        family: Any = registry.get("priors", prior)
        same = family.support is None or repr(family.support) == repr(wanted.support)
        if same:
            try:
                pv.build("mlp", "diagonal", (1, 2, 2), posterior=posterior, prior=prior, latent_dim=4)
            except UserError:
                continue
            return prior
    raise AssertionError(f"no prior has the support of {posterior}")


def loss_and_gradients(program: Any, x: Tensor, objective: str = "elbo") -> list[str]:
    """What is not finite of one step: nothing, if all is well. UserError where x is refused."""
    with seeded(0):
        check_observed(admit(program, x[:2]), x)
        program.train()
        loss, surrogate = _objective(Settings(objective=objective))(program, x)  # type: ignore[arg-type]
        surrogate.backward()
    wrong = [] if bool(torch.isfinite(loss)) else [f"loss {float(loss)}"]
    named = program.named_parameters()
    return wrong + [n for n, p in named if p.grad is not None and not bool(torch.isfinite(p.grad).all())]


def small(shape: tuple[int, ...], **blocks: Any) -> Any:
    return pv.build(
        "mlp",
        "diagonal",
        shape,
        **{"latent_dim": 4, "encoder": "mlp:hidden=[8]", "decoder": "mlp:hidden=[8]", **blocks},
    )


def of_scale(program: Any, part: str, scale: float) -> Any:
    """A program one of whose parts has weights, and so parameters of its distribution, of an extreme scale."""
    with torch.no_grad():
        for p in getattr(program, part).parameters():
            p.copy_(p.sign() * scale)
    return program


@pytest.mark.parametrize(
    "shape",
    [pytest.param(shape, marks=[] if name == "images" else pytest.mark.slow) for name, shape in SHAPES.items()],
    ids=SHAPES,
)
@pytest.mark.parametrize("likelihood", registry.names("likelihoods"))
def test_data(likelihood: str, shape: tuple[int, ...]) -> None:
    kind: Any = registry.get("likelihoods", likelihood).data  # type: ignore[attr-defined]
    for name, x in of_kind(kind, shape).items():

        def make(x: Tensor = x) -> Any:
            program = small(shape, likelihood=likelihood)
            program.likelihood.start_at(x.mean(0))
            return program

        require_finite_or_named(f"likelihood {likelihood}, {name}", make, x)


@pytest.mark.parametrize("scale", [pytest.param(1e-30, marks=pytest.mark.slow), 1e30])
@pytest.mark.parametrize("likelihood", registry.names("likelihoods"))
def test_parameters_of_a_likelihood(likelihood: str, scale: float) -> None:
    kind: Any = registry.get("likelihoods", likelihood).data  # type: ignore[attr-defined]
    data = of_kind(kind, (1, 4, 4))
    make = lambda: of_scale(small((1, 4, 4), likelihood=likelihood), "likelihood", scale)  # noqa: E731
    for name in ("half of each", "constant"):
        if name in data:
            require_finite_or_named(f"likelihood {likelihood} with parameters of {scale:g}, {name}", make, data[name])


@pytest.mark.parametrize(
    "name", ["all 0", "1e30", *(pytest.param(name, marks=pytest.mark.slow) for name in ("all 1", "constant", "1e-30"))]
)
@pytest.mark.parametrize("posterior", registry.names("posteriors"))
def test_data_under_a_posterior(posterior: str, name: str) -> None:
    make = lambda: small((1, 4, 4), posterior=posterior, prior=partner(posterior), likelihood="normal")  # noqa: E731
    require_finite_or_named(f"posterior {posterior}, {name}", make, of_kind("real", (1, 4, 4))[name])


@pytest.mark.parametrize("scale", [pytest.param(1e-30, marks=pytest.mark.slow), 1e30])
@pytest.mark.parametrize("posterior", registry.names("posteriors"))
def test_parameters_of_a_posterior(posterior: str, scale: float) -> None:
    make = lambda: of_scale(small((1, 4, 4), posterior=posterior, prior=partner(posterior)), "posterior", scale)  # noqa: E731
    x = of_kind("binary", (1, 4, 4))["half of each"]
    require_finite_or_named(f"posterior {posterior} with parameters of {scale:g}", make, x)


def require_finite_or_named(case: str, make: Callable[[], Any], x: Tensor) -> None:
    """A finite loss and finite gradients; or training refuses it, naming the data, or the site and the parameter."""
    try:
        wrong = loss_and_gradients(make(), x)
    except UserError as refusal:
        REFUSED.append(f"{case}: {refusal}")
        return
    if not wrong:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((NumericalError, UserError)) as caught:
            pv.fit(make(), x, epochs=1, batch_size=BATCH)
    text = str(caught.value)
    assert "rescale them" in text or ("at the site" in text and "the parameter at fault is" in text), f"{case}: {text}"
    REFUSED.append(f"{case}: {text}")


REFUSED: list[str] = []


class OtherProcessor(OtherRounding):
    """Sums whose rounding depends on how many numbers there are, as it does from one processor's kernels to another's."""

    def __init__(self) -> None:
        super().__init__(0)

    def _moved(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self._random.manual_seed(value.numel())
        return super()._moved(value)


@pytest.mark.parametrize("likelihood", ["laplace", "low-rank-normal", "normal", "student-t", "negative-binomial"])
def test_data_on_another_processor(likelihood: str) -> None:
    """The rounding of sums of 1e30 was taken for dependence on other rows, by processors that add up in other orders."""
    with OtherProcessor():
        test_data(likelihood, (1, 4, 4))
    assert not [refused for refused in REFUSED if "depends on the other rows" in refused]


@pytest.mark.parametrize("posterior", ["diagonal-normal", "full-rank-normal", "low-rank-normal"])
def test_a_posterior_on_another_processor(posterior: str) -> None:
    with OtherProcessor():
        test_data_under_a_posterior(posterior, "1e30")
        test_parameters_of_a_posterior(posterior, 1e30)


def test_what_was_refused() -> None:
    """For the reader of the log: which extremes are answered with a named refusal instead of a finite loss."""
    print("\n".join(REFUSED))
