"""Paired differences between runs, the bound as a function of K, and the commands that print them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from test_ais import LIMIT, LinearGaussian

import pyro_vae as pv
from pyro_vae.cli.app import run as command
from pyro_vae.errors import UserError
from pyro_vae.evaluation.compare import compare
from pyro_vae.evaluation.curve import bound_curve, curve
from pyro_vae.seeding import generator


def test_tells_apart_what_separate_error_bars_do_not() -> None:
    """Two programs 0.2 nats apart on 300 images: each mean has an error of 0.15 nats, their paired difference is sure."""
    good, worse = LinearGaussian(6, 2, narrow=1.5), LinearGaussian(6, 2, noise=0.61, narrow=1.5)
    x = pv.sample(good, 300, seed=1)
    a, b = (pv.log_likelihood(p, x, num_samples=200) for p in (good, worse))
    exact = float((good.exact(x) - worse.exact(x)).mean())
    found = compare(a, b, ("good", "worse"))
    assert 0.1 < exact < 0.3
    assert abs(a.nll - b.nll) < 2 * (a.nll_data_se + b.nll_data_se)  # the separate intervals overlap
    assert abs(found.mean - exact) < LIMIT * found.mc_se  # false alarm 0.1 %
    assert found.p_value < 0.001
    assert found.interval[0] < exact < found.interval[1]
    assert found.verdict.startswith("good is better than worse by 0.")
    assert compare(b, a).mean == -found.mean
    same = compare(a, a)
    assert same.mean == 0.0
    assert same.p_value == 1.0
    assert "not told apart" in same.verdict
    with pytest.raises(UserError, match="same images"):
        compare(a, pv.log_likelihood(good, x[:5], num_samples=50))


def test_the_curve_rises_to_the_bound() -> None:
    program = LinearGaussian(6, 3, narrow=1.8)  # wide enough for weights without a heavy tail
    x = pv.sample(program, 30, seed=2)
    found = bound_curve(program, x, num_samples=1000, seed=3)
    whole = pv.log_likelihood(program, x, num_samples=1000, seed=3)
    assert found.num_samples.tolist() == [1, 2, 4, 8, 16, 32, 64, 128, 256, 500, 1000]
    assert torch.allclose(found.bound[-1], whole.log_likelihood)
    elbo = whole.elbo.mean()
    assert float(found.mean[0]) == pytest.approx(float(elbo), abs=1e-6)
    rises = found.mean.diff()
    # a later point may lie below an earlier one by chance only
    assert bool((rises > -LIMIT * (found.mean_se[1:] + found.mean_se[:-1])).all())
    assert float(found.mean[-1] - found.mean[0]) > 0.1
    assert found.last_rise < 0.05


def test_the_curve_of_few_weights() -> None:
    found = curve(torch.randn(3, 2, generator=generator(0)))
    assert found.num_samples.tolist() == [1, 3]
    assert math.isfinite(found.last_rise)
    with pytest.raises(UserError, match="log-weights"):
        curve(torch.zeros(3))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs on the digits, the second trained less; and one on other data."""
    root = tmp_path_factory.mktemp("runs")
    paths = [root / "a", root / "b", root / "c"]
    small = [
        "--set",
        "latent_dim=2",
        "--decoder",
        "mlp:hidden=[16]",
        "--encoder",
        "mlp:hidden=[16]",
        "--compile",
        "off",
    ]
    for path, epochs, extra in zip(paths, (40, 1, 1), ([], [], ["--binarization", "threshold"]), strict=True):
        out = ["--out", str(path), "--epochs", str(epochs), "--quiet", "--device", "cpu"]
        assert command(["train", "digits", "--model", "mlp", *small, *out, *extra]) == 0
    return paths


CPU = ["--device", "cpu", "--quiet"]


def test_compare_prints_a_table(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    a, b, _ = map(str, runs)
    capsys.readouterr()
    assert command(["compare", a, b, "--samples", "50", "--limit", "100", "--json", *CPU]) == 0
    figures = json.loads(capsys.readouterr().out)
    (pair,) = figures["comparisons"]
    assert pair["runs"] == [a, b]
    assert pair["p_value"] < 0.01
    assert pair["difference"] == pytest.approx(figures["runs"][1]["nll"] - figures["runs"][0]["nll"], abs=0.5)
    assert figures["num_data"] == 100
    assert command(["compare", a, b, "--samples", "50", "--limit", "100", *CPU]) == 0
    printed = capsys.readouterr().out
    assert f"{a} is better than {b} by" in printed
    assert "| run " in printed


@pytest.mark.parametrize(("which", "message"), [((0, 2), "different data"), ((0,), "two runs or more")])
def test_compare_refuses(
    runs: list[Path], which: tuple[int, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert command(["compare", *(str(runs[i]) for i in which), *CPU]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("method", [pytest.param(m, marks=pytest.mark.slow) for m in ("ais", "bdmc")])
def test_evaluate_by_annealing(runs: list[Path], method: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(runs[0])
    capsys.readouterr()
    how = ["--limit", "6", "--chains", "8", "--distributions", "50", "--leapfrog", "5", *CPU]
    assert command(["evaluate", run, "--method", method, "--json", *how]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert command(["evaluate", run, "--samples", "2000", "--limit", "6", "--json", *CPU]) == 0
    weighted = json.loads(capsys.readouterr().out)
    assert set(weighted) - {"proof"} <= set(figures)  # annealing has no weights of the guide
    assert weighted["method"] == "iw"
    error = math.hypot(figures["nll_mc_se"], weighted["nll_mc_se"])
    assert abs(figures["nll"] - weighted["nll"]) < LIMIT * error + 0.05
    assert figures["khat_median"] is None
    if method == "bdmc":
        assert figures["bdmc_num_images"] == 6
        assert figures["bdmc_gap"] == pytest.approx(figures["bdmc_upper"] - figures["bdmc_lower"])
    assert not list(runs[0].glob("*ais.safetensors"))
    assert (runs[0] / f"evaluation-{method}.json").is_file()
    assert command(["evaluate", run, "--method", method, *how]) == 0
    assert "acceptance" in capsys.readouterr().out


def test_an_unknown_method_is_refused(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["evaluate", str(runs[0]), "--method", "nuts", *CPU]) == 2
    assert "unknown --method 'nuts': choose from ais, bdmc, iw" in capsys.readouterr().err
