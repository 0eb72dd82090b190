"""Every verdict has a least sample below which it is none; what results share is known to what compares them."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from one_latent import OneLatent, exact
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.analysis.anomaly import detect
from pyro_vae.evaluation.compare import compare, together
from pyro_vae.evaluation.result import LogLikelihood

ROWS, SETS = 40, 100


def wide(width: float) -> OneLatent:
    return OneLatent(lambda x: dist.Normal(x[:, 0] / 2, math.sqrt(0.5) * width))


def results(
    widths: tuple[float, float], num_samples: int, seeds: tuple[int, int], sets: int = 1
) -> list[LogLikelihood]:
    x = torch.linspace(-1.5, 1.5, ROWS, dtype=torch.float64).repeat(sets)[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            pv.log_likelihood(wide(w), x, num_samples=num_samples, seed=s) for w, s in zip(widths, seeds, strict=True)
        ]


def sets(result: LogLikelihood) -> list[LogLikelihood]:
    names = [n for n, v in vars(result).items() if isinstance(v, Tensor) and len(v) == len(result)]
    return [
        replace(result, **{n: getattr(result, n)[i : i + ROWS] for n in names}) for i in range(0, len(result), ROWS)
    ]


@pytest.mark.parametrize("seeds", [(1, 2), pytest.param((0, 0), marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("num_samples", "widths"),
    [
        (25, (1.1, 1.3)),
        pytest.param(100, (1.2, 1.5), marks=pytest.mark.slow),
        pytest.param(100, (1.0, 1.4), marks=pytest.mark.slow),
    ],
)
def test_one_model_is_told_from_itself_as_often_as_is_said(
    num_samples: int, widths: tuple[float, float], seeds: tuple[int, int]
) -> None:
    """5 % of 100 comparisons, at most by 4 errors; the stated error is the spread over redraws, one noise or two, to a fifth."""
    a, b = results(widths, num_samples, seeds, SETS)
    found = [compare(*pair) for pair in zip(sets(a), sets(b), strict=True)]
    told = sum(c.p_value < 0.05 for c in found) / SETS
    spread = float(torch.tensor([c.mean for c in found]).std())
    stated = sum(c.mc_se for c in found) / SETS
    print(f"told apart {told:.3f}, stated error / spread {stated / spread:.2f}")
    assert told <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / SETS)
    assert 0.8 < stated / spread < 1.25


@pytest.mark.parametrize("num_samples", [1, 2, 24])
def test_few_draws_and_few_images_make_no_verdict(num_samples: int) -> None:
    a, b = results((1.2, 1.3), num_samples, (1, 2))
    found = compare(a, b)
    assert math.isnan(found.p_value)
    assert f"no verdict on a and b: {num_samples} draws of a are too few" in found.verdict
    assert found.summary()["p_value"] is None
    few = compare(*(sets(r)[0] for r in results((1.2, 1.3), 50, (1, 2))))
    assert not math.isnan(few.p_value)
    fewer = compare(*(replace(few_rows(r), seed=i) for i, r in enumerate(results((1.2, 1.3), 50, (1, 2)))))
    assert "19 images are too few" in fewer.verdict


def few_rows(result: LogLikelihood) -> LogLikelihood:
    names = [n for n, v in vars(result).items() if isinstance(v, Tensor) and len(v) == len(result)]
    return replace(result, **{n: getattr(result, n)[:19] for n in names})


def test_without_the_shares_of_one_noise_the_error_is_not_known() -> None:
    a, b = results((1.2, 1.3), 50, (0, 0))
    assert compare(a, b).mc_se < compare(a, replace(b, seed=1)).mc_se / 2
    assert math.isnan(compare(a, replace(b, groups=None)).mc_se)


def test_a_verdict_that_rests_on_bad_k_says_so() -> None:
    a, b = results((0.4, 1.2), 1000, (1, 2))
    found = compare(a, b, ("narrow", "wide"))
    assert a.khat_bad_fraction > 0.5 > b.khat_bad_fraction
    assert found.khat_bad == (a.khat_bad_fraction, b.khat_bad_fraction)
    assert "wide is better" in found.verdict
    assert "Pareto k is bad for" in found.verdict
    assert "of the images of narrow: compare by annealing" in found.verdict
    assert any(w.startswith("narrow: Pareto k") for w in found.summary()["warnings"])


def test_several_comparisons_are_corrected_by_holms_rule() -> None:
    a, b = results((1.2, 1.3), 50, (1, 2))
    shifted = [replace(b, log_likelihood=b.log_likelihood + by) for by in (1.0, 2.2e-3, 0.0)]
    found = together([compare(a, one) for one in shifted])
    raw = sorted(c.p_value for c in found)
    assert sorted(c.p_together for c in found if c.p_together is not None) == pytest.approx(
        [3 * raw[0], max(3 * raw[0], 2 * raw[1]), max(2 * raw[1], raw[2])]
    )
    assert together([compare(a, b)])[0].p_together == compare(a, b).p_value
    assert together([compare(few_rows(a), few_rows(b))])[0].p_together is None


class Exact(nn.Module):
    """Probabilistic PCA whose guide is the posterior: its log p(x) is exact but for rounding."""

    event_shape = (20,)

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
        covariance = torch.linalg.inv(torch.eye(4) + weight.T @ weight / 0.25)
        self.weight, self.gain = nn.Parameter(weight), nn.Parameter(covariance @ weight.T / 0.25)
        self.tril = nn.Parameter(torch.linalg.cholesky(covariance))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T, 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(x @ self.gain.T, scale_tril=self.tril))


def test_rounding_is_no_difference() -> None:
    program = Exact()
    x = pv.sample(program, 300).detach()
    a = pv.log_likelihood(program, x, num_samples=100)
    b = pv.log_likelihood(copy.deepcopy(program).double(), x.double(), num_samples=100)
    found = compare(a, b)
    assert 0 < abs(found.mean) < found.rounding < 1e-4
    assert found.p_value == 1.0
    better = replace(b, log_likelihood=b.log_likelihood + 1e-3)
    assert compare(a, better).p_value < 1e-9


def draws(num_samples: int) -> list[str]:
    x = torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None]
    program = OneLatent(lambda x: dist.Normal(x[:, 0].clone() * 0, 3.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pv.posterior(program, x, num_samples=num_samples, source="psis", predictive="none", prior=False)
    return [str(w.message) for w in caught]


def test_resampling_of_few_draws_says_that_k_is_unknown() -> None:
    assert any("Pareto k is unknown (of 20 draws, where 25 are needed)" in said for said in draws(5))
    assert not draws(250)


def test_a_reference_that_can_find_nothing_says_so() -> None:
    program, x = OneLatent(exact), torch.linspace(-1, 1, 60, dtype=torch.float64)[:, None]
    with pytest.warns(UserWarning, match="of 18 reference images no p-value is below 0.053"):
        found = detect(program, x[:18], x[18:40], x[40:], num_samples=10)
    assert found.found() == 0.0
    enough = detect(program, x[:19], x[19:40], x[40:], num_samples=10)
    assert not [w for w in enough.warnings if "reference" in w]


def test_a_start_at_the_guide_is_held_against_chains_from_the_prior() -> None:
    class Modes(OneLatent):
        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 6.0))
                pyro.sample("x", dist.Normal(z.abs().unsqueeze(-1) + self.shift, 1.0).to_event(1), obs=x)

    x = torch.linspace(4.0, 7.0, 20, dtype=torch.float64)[:, None]
    how: Any = {"num_chains": 64, "num_distributions": 100, "num_leapfrog": 5, "start": "guide"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        one = pv.annealed_log_likelihood(Modes(lambda x: dist.Normal(36 / 37 * x[:, 0], 1.0)), x, **how)
    assert one.witness is not None
    assert one.witness.shape == (4, 2)
    assert float(one.witness[:, 0].mean()) == pytest.approx(math.log(2), abs=0.2)
    assert any("chains from the prior find" in str(w.message) for w in caught)
    right = pv.annealed_log_likelihood(OneLatent(exact), x / 4, **how)
    assert not [w for w in right.warnings if "chains from the prior" in w]
