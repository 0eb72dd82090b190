"""The 95 % interval of log p(x): what holds by construction, and its coverage over weights whose mean is known."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from test_ais import LinearGaussian
from torch import Tensor

import pyro_vae as pv
from pyro_vae.evaluation.estimators import Estimate, estimate, good_khat
from pyro_vae.evaluation.quasi import SobolNoise, length_of
from pyro_vae.seeding import generator, seeded

Law = Callable[[Tensor], Tensor]  # log-weights of mean 1 from standard normal numbers, (..., dimensions) to (...)


def gaussian(scale: float) -> Law:
    """Guide of another width than the posterior: k = 1 - scale^2 below 1, bounded weights above."""
    return lambda z: z.shape[-1] * math.log(scale) + 0.5 * (1 - scale**2) * z.square().sum(-1)


def lognormal(sigma: float) -> Law:
    return lambda z: sigma * z.sum(-1) / z.shape[-1] ** 0.5 - sigma**2 / 2


def pareto(k: float, least: float = 0.0) -> Law:
    """A generalised Pareto law of this k, above ``least``."""
    return lambda z: torch.log((least + ((1 - torch.special.ndtr(z[..., 0])) ** -k - 1) / k) / (least + 1 / (1 - k)))


def uniform(z: Tensor) -> Tensor:
    return torch.log(2 * torch.special.ndtr(z[..., 0]))


def rare(z: Tensor) -> Tensor:
    """Ten times the weight once in ten."""
    return torch.where(z[..., 0] > 1.2815515655446004, math.log(10 / 1.9), math.log(1 / 1.9)).double()


def seldom(z: Tensor) -> Tensor:
    """200 times the weight once in 500."""
    return torch.where(z[..., 0] > 2.878161739095476, math.log(200 / 1.398), math.log(1 / 1.398)).double()


LAWS: dict[str, tuple[Law, int]] = {
    "lognormal 0.3": (lognormal(0.3), 1), "lognormal 0.6": (lognormal(0.6), 1), "lognormal 1": (lognormal(1.0), 1),
    "lognormal 1.3": (lognormal(1.3), 1), "lognormal 1.6": (lognormal(1.6), 1),
    "pareto 0.2": (pareto(0.2), 1), "pareto 0.3": (pareto(0.3), 1), "pareto 0.4": (pareto(0.4), 1),
    "pareto 0.5": (pareto(0.5), 1), "pareto 0.4 above 1": (pareto(0.4, 1.0), 1), "pareto 0.5 above 1": (pareto(0.5, 1.0), 1),
    "pareto 0.4 above 10": (pareto(0.4, 10.0), 1),
    "narrow 0.9": (gaussian(0.9), 1), "narrow 0.8": (gaussian(0.8), 1), "narrow 0.75, 4": (gaussian(0.75), 4),
    "narrow 0.85, 10": (gaussian(0.85), 10), "wide 1.5": (gaussian(1.5), 1), "wide 3": (gaussian(3.0), 1),
    "wide 2, 3": (gaussian(2.0), 3), "wide 1.3, 10": (gaussian(1.3), 10), "uniform": (uniform, 1), "rare": (rare, 1),
}  # fmt: skip
TAILS = (0.2, 0.4, 0.55, 0.65, 0.7)  # true k, as of a Pareto law and of a guide that is too narrow
LAWS_OF_TAIL: dict[str, tuple[Law, int]] = {
    **{f"Pareto {k}": (pareto(k, 1 / k), 1) for k in TAILS},
    **{f"narrow guide {k}": (gaussian(math.sqrt(1 - k)), 1) for k in TAILS},
    "200 in 500": (seldom, 1),
}


def simulated(law: str, num_samples: int, count: int, noise: str = "random", seed: int = 0) -> Estimate:
    """Estimates of log 1 = 0."""
    of, dims = (LAWS | LAWS_OF_TAIL)[law]
    block = max(1, min(count, 2_000_000 // (num_samples * dims)))
    length = length_of(num_samples) if noise == "sobol" else 1
    parts = []
    for first in range(0, count, block):
        if noise == "sobol":
            with seeded(0), SobolNoise(seed, first, 0, num_samples, length):
                z = torch.randn(num_samples, block, dims, dtype=torch.float64)
        else:
            z = torch.randn(num_samples, block, dims, generator=generator(law, seed, first), dtype=torch.float64)
        parts.append(estimate(of(z), None, length))
    joined = {f.name: torch.cat([getattr(p, f.name) for p in parts])[:count] for f in dataclasses.fields(Estimate)}
    return Estimate(**joined)


def covered(
    found: Estimate, truth: Tensor | float, num_samples: int | Tensor, *, bad: bool = False
) -> tuple[float, int]:
    """The share of intervals that hold the truth where k is good, or of all, and how many these are."""
    draws = torch.as_tensor(num_samples).expand(len(found.khat)).tolist()
    good = ~(found.khat > torch.tensor([good_khat(n) for n in draws], dtype=torch.float64)) | bad
    holds = (found.interval[:, 0] <= truth) & (truth <= found.interval[:, 1])
    return float(holds[good].double().mean()), int(good.sum())


def plainly_covered(found: Estimate) -> float:
    error = (found.log_likelihood - found.bias).abs()
    return float((error <= 1.96 * found.mc_se)[~(found.khat > 0.5)].double().mean())


# Coverage is to be 93 to 98 %, which is held to one standard error of a share (0.3 to 0.5 points over 2,000 intervals). A cell
# whose coverage is 94.4 to 97.2 %, as of all but a few, raises a false alarm in 1e-3 of seeds; one of 90.9 % or 99.1 % would be
# found with a probability of 0.999.


def as_stated(share: float, count: int) -> bool:
    error = math.sqrt(share * (1 - share) / count)
    return count >= 2000 and 0.93 - error <= share <= 0.98 + error


@pytest.mark.parametrize("law", ["lognormal 1", "narrow 0.8", "wide 2, 3"])
def test_it_covers_at_a_hundred_draws(law: str) -> None:
    found = simulated(law, 100, 3100)
    share, count = covered(found, 0.0, 100)
    assert as_stated(share, count)
    if law == "narrow 0.8":  # the plain interval of the jackknife is found out
        assert plainly_covered(found) < 0.90


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["random", "sobol"])
@pytest.mark.parametrize("num_samples", [100, 1000])
def test_it_covers_whatever_the_weights(noise: str, num_samples: int) -> None:
    wrong, biased = {}, {}
    for law in LAWS:
        few = simulated(law, num_samples, 300, noise, seed=1)
        good = max(0.1, float((~(few.khat > good_khat(num_samples))).double().mean()))
        found = simulated(law, num_samples, int(2300 / good), noise)
        share, count = covered(found, 0.0, num_samples)
        print(f"{noise} K = {num_samples} {law}: {share:.1%} of {count}")
        if not as_stated(share, count):
            wrong[law] = share
        # the bias after correction, of all images, as a share of the reported error: at most a fifth, to its own error of 0.02
        error = float((found.log_likelihood - found.bias).mean() / found.mc_se.square().mean().sqrt())
        if abs(error) > 0.2:
            biased[law] = error
    assert not wrong
    assert not biased


@pytest.mark.slow
def test_it_covers_at_five_thousand_draws() -> None:
    for law in ("lognormal 1.6", "pareto 0.5", "narrow 0.75, 4", "wide 1.3, 10"):
        assert as_stated(*covered(simulated(law, 5000, 2100), 0.0, 5000)), law


@pytest.mark.slow
@pytest.mark.parametrize(("num_samples", "count"), [(100, 6000), (1000, 2000), (10_000, 1600)])
def test_it_covers_whatever_the_tail_up_to_a_bad_k(num_samples: int, count: int) -> None:
    """93 to 99.5 % of all intervals, and of those whose k looks good, which have missed the largest weights.

    Held to two standard errors of a share, 0.2 to 1.1 points: the interval of 2.5 relative errors of k that this one replaced
    held 80 to 93 % at a true k of 0.65 and 0.7 where k looked good. What is found stands in docs/evaluation.md.
    """
    wrong = {}
    for law in LAWS_OF_TAIL:
        found = simulated(law, num_samples, count)
        both = [covered(found, 0.0, num_samples, bad=bad) for bad in (True, False)]
        print(f"K = {num_samples} {law}: " + ", ".join(f"{share:.1%} of {number}" for share, number in both))
        if law == "200 in 500":  # nothing tells of a large weight before one is drawn
            ceiling = 1 - 0.998**num_samples
            error = 2 * math.sqrt(ceiling * (1 - ceiling) / count)
            if not min(0.93, ceiling) - error <= both[0][0] <= ceiling + error:
                wrong[law] = both
        elif any(not within(share, number, 0.93, 0.995) for share, number in both):
            wrong[law] = both
    assert not wrong


def within(share: float, count: int, least: float, most: float) -> bool:
    """Between these, to two standard errors."""
    error = 2 * math.sqrt(share * (1 - share) / count)
    return least - error <= share <= most + error


# Probabilistic PCA, whose log p(x) is known


def narrow(scale: float = 0.85, count: int = 2400) -> tuple[LinearGaussian, Tensor]:
    program = LinearGaussian(5, 3, noise=1.0, narrow=scale)
    return program, pv.sample(program, count, seed=1)


def estimated(program: LinearGaussian, x: Tensor, **options: object) -> pv.LogLikelihood:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pv.log_likelihood(program, x, compile="off", **options)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.85, 1.0, 1.5])
@pytest.mark.parametrize("options", [{}, {"target_se": 0.06}, {"noise": "sobol"}], ids=["random", "adaptive", "sobol"])
def test_it_covers_on_probabilistic_pca(scale: float, options: dict[str, object]) -> None:
    program, x = narrow(scale, 3200)
    found = estimated(program, x, num_samples=1000, seed=2, **options)
    draws = found.draws if found.draws is not None else torch.tensor(1000)
    share, count = covered(found, program.exact(x), draws)  # type: ignore[arg-type]
    assert as_stated(share, count)


def test_the_mean_of_images_is_covered() -> None:
    """160 means of 15 images: 93 to 98 % are 149 to 156 of them; 143 or fewer come in 3e-3 of seeds at 94 %."""
    program, x = narrow()
    found, truth = estimated(program, x, num_samples=120), program.exact(x)
    held = 0
    for first in range(0, 2400, 15):
        low, high = part(found, slice(first, first + 15)).nll_interval
        held += low <= -float(truth[first : first + 15].mean()) <= high
    assert 144 <= held <= 160


def part(result: pv.LogLikelihood, rows: slice) -> pv.LogLikelihood:
    """The result of some images."""
    tensors = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    return dataclasses.replace(result, **{name: t[rows] for name, t in tensors.items() if isinstance(t, Tensor)})


# What holds by construction


def test_it_holds_the_corrected_estimate_and_moves_with_the_weights() -> None:
    log_weight = torch.randn(200, 50, generator=generator(0), dtype=torch.float64) * torch.linspace(0.1, 4, 50)
    found, moved = estimate(log_weight), estimate(log_weight.flip(0) - 1000)
    centre = found.log_likelihood - found.bias
    assert found.interval.shape == (50, 2)
    assert bool((found.interval[:, 0] < centre).all())
    assert bool((centre <= found.interval[:, 1]).all())
    torch.testing.assert_close(moved.interval, found.interval - 1000)
    assert bool((found.log_likelihood - found.interval[:, 0] <= math.log(40) + 1e-12).all())


def test_of_many_light_weights_it_is_the_normal_one() -> None:
    found = estimate(0.1 * torch.randn(20_000, 4, generator=generator(1), dtype=torch.float64))
    centre = (found.log_likelihood - found.bias)[:, None]
    normal = centre + 1.96 * found.mc_se[:, None] * torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(found.interval, normal, atol=float(0.2 * found.mc_se.max()), rtol=0)


def test_few_draws_have_none_and_say_so() -> None:
    for number in (1, 2, 24):
        assert estimate(torch.randn(number, 3, generator=generator(0))).interval.isnan().all()
        assert estimate(torch.zeros(number, 3)).interval.isnan().all()  # equal by chance, for all that is known
    assert estimate(torch.randn(25, 3, generator=generator(0))).interval.isfinite().all()
    with pytest.warns(UserWarning, match="K = 24 draws are too few.*no interval is stated"):
        result = pv.log_likelihood(LinearGaussian(3, 2), torch.zeros(2, 3, dtype=torch.float64), num_samples=24)
    assert all(math.isnan(end) for end in result.nll_interval)
    assert result.summary()["nll_interval_low"] is None
    assert "no interval" in str(result)


def test_weights_without_spread_or_without_sense() -> None:
    equal = estimate(torch.full((100, 2), -3.0))
    assert torch.equal(equal.interval, torch.full((2, 2), -3.0, dtype=torch.float64))
    lost = estimate(torch.full((100, 2), -math.inf))
    assert lost.interval.tolist() == [[-math.inf, math.inf]] * 2
    one = torch.full((100, 1), -math.inf)
    one[3] = 0.0
    low, high = estimate(one).interval[0].tolist()
    assert low == pytest.approx(-math.log(100) - math.log(40))
    assert high == math.inf


def test_that_of_one_image_is_that_of_the_mean() -> None:
    program, x = narrow()
    found = estimated(program, x[:3], num_samples=300)
    for i in range(3):
        low, high = part(found, slice(i, i + 1)).nll_interval
        assert (-high, -low) == pytest.approx(tuple(found.interval[i].tolist()))
    wide = float((found.interval[:, 1] - found.interval[:, 0]).mean())
    assert found.nll_interval[1] - found.nll_interval[0] < wide
    assert found.summary()["nll_interval_low"] == found.nll_interval[0]
    assert found.nll_interval[0] < found.nll_corrected < found.nll_interval[1]
    assert found.summary()["nll_corrected"] == found.nll - found.nll_bias


# Monte Carlo noise is part of the spread over images


def test_the_error_of_the_mean_is_what_redraws_show() -> None:
    """2,000 redraws of 25 images and of 24 draws for each, over a third of the variance Monte Carlo noise.

    The ratio of the stated error to the one that is seen has an error of 1.7 %: five of these are a false alarm in 6e-7. Noise
    counted twice makes it 1.17, which is found with a probability of 0.999.
    """
    program = LinearGaussian(2, 2, noise=0.7, narrow=4.0)
    x = pv.sample(program, 2000 * 25, seed=3)
    whole = estimated(program, x, num_samples=24)
    groups = [part(whole, slice(first, first + 25)) for first in range(0, len(x), 25)]
    nll = torch.tensor([g.nll for g in groups])
    stated = torch.tensor([g.nll_total_se for g in groups]).square().mean().sqrt()
    noise = torch.tensor([g.nll_mc_se for g in groups]).square().mean().sqrt()
    assert float(noise / nll.std()) > 0.55
    assert abs(float(stated / nll.std()) - 1) < 0.085
    assert groups[0].nll_data_se == pytest.approx(float(groups[0].log_likelihood.std()) / 5)


def test_the_error_of_one_image_is_its_noise() -> None:
    program, x = narrow()
    one = estimated(program, x[:1], num_samples=300)
    assert math.isnan(one.nll_data_se)
    assert one.nll_total_se == one.nll_mc_se
