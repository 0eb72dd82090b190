"""The command line: train and evaluate, in this process and in their own."""

from __future__ import annotations

import json
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pyro_vae as pv
from pyro_vae import __version__
from pyro_vae.cli.app import run
from pyro_vae.cli.evaluate import _corrected
from pyro_vae.evaluation.result import UnreliableEstimateWarning
from pyro_vae.seeding import seeded

KEYS = {
    "nll", "nll_mc_se", "nll_data_se", "elbo", "reconstruction", "kl", "bits_per_dim", "active_units", "ess_median",
    "khat_median", "khat_bad_fraction", "num_samples", "num_data", "binarization", "seconds", "warnings",
}  # fmt: skip
SMALL = ["--encoder", "mlp:hidden=[16]", "--decoder", "mlp:hidden=[16]", "--set", "latent_dim=2", "--quiet"]
Python = Callable[..., "subprocess.CompletedProcess[str]"]


def trained(out: Path, *options: str) -> Path:
    assert run(["train", *options, *SMALL, "--epochs", "1", "--out", str(out)]) == 0
    return out


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert run(["evaluate", *arguments, "--json", "--quiet"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    found = json.loads(output.out)
    assert isinstance(found, dict)
    return found


def test_train_says_where_the_run_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = trained(tmp_path / "run", "digits")
    output = capsys.readouterr()
    assert output.out == f"{out}\n"
    assert "validation ELBO" in output.err
    assert sorted(p.name for p in out.iterdir())[:3] == ["checkpoint.safetensors", "metrics.csv", "metrics.jsonl"]


def test_evaluate_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = trained(tmp_path / "run")
    found = evaluated(capsys, str(out), "--samples", "50", "--limit", "20")
    assert set(found) >= KEYS
    assert (found["num_samples"], found["num_data"], found["binarization"]) == (50, 20, "dynamic")
    assert found["elbo"] == pytest.approx(found["reconstruction"] - found["kl"])
    assert found["nll"] <= -found["elbo"]
    assert len(found["active_units"]) == 1
    assert found["bits_per_dim"] == pytest.approx(found["nll"] / 64 / 0.6931471805599453)
    assert isinstance(found["warnings"], list)
    others = {"num_samples", "num_data", "binarization", "warnings", "active_units"}
    assert all(isinstance(found[k], float) for k in KEYS - others)
    assert json.loads((out / "evaluation.json").read_text()) == found

    again = evaluated(capsys, str(out), "--samples", "50", "--limit", "20")
    timeless = lambda d: {k: v for k, v in d.items() if k != "seconds"}  # noqa: E731
    assert timeless(again) == timeless(found)
    data, program = pv.load_data("digits"), pv.load(out).program
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)  # it stands in the figures
        figures, _ = pv.evaluate(program, data, num_samples=50, limit=20)
    assert timeless(figures).items() <= timeless(found).items()


def test_what_is_undefined_is_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = trained(tmp_path / "run", "moons", "--model", "ppca")
    found = evaluated(capsys, str(out), "--samples", "1", "--limit", "1")
    assert [found[k] for k in ("bits_per_dim", "nll_mc_se", "nll_data_se", "khat_median", "khat_bad_fraction")] == [
        None
    ] * 5
    assert found["warnings"]


def test_evaluate_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = trained(tmp_path / "run")
    capsys.readouterr()
    assert run(["evaluate", str(out), "--samples", "30", "--limit", "5", "--quiet"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("NLL", "Monte Carlo error", "ELBO", "Pareto k", "bits per dimension"))


def test_the_interval_stands_beside_the_estimate_it_is_of() -> None:
    """To the same digits; and says where some k are bad."""
    figures: dict[str, Any] = {
        "nll_corrected": 83.98712345, "nll_interval_low": 83.9699, "nll_interval_high": 84.0043, "nll_mc_se": 0.0088,
        "khat_bad_fraction": 0.0,
    }  # fmt: skip
    assert _corrected(figures) == "83.9871 (95 %: 83.9699 to 84.0043, of these images)"
    assert "; 2.5% have a bad k, and may lie lower)" in _corrected(figures | {"khat_bad_fraction": 0.025})
    assert _corrected(figures | {"nll_interval_low": None}) == "-"


def test_ways_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = trained(tmp_path / "run")
    few = (str(out), "--samples", "40", "--limit", "3")
    assert evaluated(capsys, *few, "--noise", "sobol")["noise"] == "sobol"
    assert evaluated(capsys, *few, "--target-error", "0.5")["draws_mean"] <= 40
    assert evaluated(capsys, *few, "--precision", "bf16")["precision"] == "bf16"
    assert run(["evaluate", *few, "--noise", "sobol", "--quiet"]) == 0
    assert "K = 40, sobol noise" in capsys.readouterr().out
    assert run(["evaluate", *few, "--noise", "halton", "--quiet"]) == 2


def test_every_option_of_train(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = [
        "train", "digits", "--model", "mlp", "--guide", "diagonal", "--prior", "gaussian-mixture:components=3",
        "--likelihood", "bernoulli", "--posterior", "diagonal-normal", "--encoder", "mlp:hidden=[8],activation=tanh",
        "--decoder", "gated-mlp:hidden=[8]", "--set", "latent_dim=3", "--set", "prior.spread=2.0", "--objective", "elbo:beta=0.5",
        "--steps", "3",
        "--batch-size", "32", "--lr", "0.01", "--schedule", "cosine", "--optimizer", "adamw", "--clip-norm", "1.0",
        "--average", "0",
        "--patience", "2", "--seed", "4", "--device", "cpu", "--binarization", "threshold", "--validation", "50",
        "--out", str(out), "--quiet",
    ]  # fmt: skip
    assert run(options) == 0
    record = pv.load(out).record
    assert record["model"]["prior"] == {"name": "gaussian-mixture", "components": 3, "spread": 2.0}
    assert record["model"]["latent_dim"] == 3
    assert record["guide"]["encoder"] == {"name": "mlp", "hidden": [8], "activation": "tanh"}
    training = record["training"]
    assert training["objective"] == {"name": "elbo", "beta": 0.5}
    assert "average" not in training
    assert (training["steps"], training["batch_size"], training["lr"], training["seed"]) == (3, 32, 0.01, 4)
    assert record["data"]["binarization"] == "threshold"
    assert record["data"]["validation"] == 50


def test_the_command_line_trains_what_python_trains(tmp_path: Path) -> None:
    cli = pv.load(trained(tmp_path / "run", "digits", "--seed", "3")).program
    data = pv.load_data("digits")
    vae = pv.build(data=data, encoder="mlp:hidden=[16]", decoder="mlp:hidden=[16]", latent_dim=2, seed=3)
    pv.fit(vae, data, epochs=1, seed=3)
    assert all(torch.equal(t, cli.state_dict()[n]) for n, t in vae.state_dict().items())


def test_resume_from_the_command_line(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert run(["train", *SMALL, "--epochs", "3", "--out", str(whole)]) == 0
    data, killed = pv.load_data("digits"), tmp_path / "killed"

    def kill(metrics: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    vae = pv.build(data=data, encoder="mlp:hidden=[16]", decoder="mlp:hidden=[16]", latent_dim=2)
    with pytest.raises(KeyboardInterrupt):
        pv.fit(vae, data, epochs=3, out=killed, callback=kill)
    assert run(["train", "--resume", "--out", str(killed), "--quiet"]) == 0
    a, b = pv.load(whole).program.state_dict(), pv.load(killed).program.state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_runs_are_numbered_where_no_directory_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for expected in ("runs/digits-mixture-diagonal", "runs/digits-mixture-diagonal-2"):
        assert run(["train", *SMALL, "--steps", "1"]) == 0
        assert capsys.readouterr().out.strip() == expected


def test_a_density_on_grey_levels_is_dequantized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = trained(tmp_path / "run", "digits", "--model", "frey")
    found = evaluated(capsys, str(out), "--samples", "50", "--limit", "20")
    assert (found["binarization"], found["dequantization"]) == ("none", "uniform")
    assert isinstance(found["bits_per_dim"], float)


def test_static_mnist_evaluates(tmp_path: Path, data_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not list(data_root.glob("BinarizedMNIST/*.amat*")):
        pytest.skip("the data root has no BinarizedMNIST")
    out = tmp_path / "run"
    assert (
        run(["train", "static-mnist", *SMALL, "--steps", "20", "--out", str(out), "--data-root", str(data_root)]) == 0
    )
    found = evaluated(capsys, str(out), "--samples", "30", "--limit", "5", "--data-root", str(data_root))
    assert (found["binarization"], found["num_data"]) == ("static", 5)


# In a process of its own


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_answer_in_a_second(option: str, python: Python) -> None:
    """The best of several, so that a machine that is busy with something else does not decide."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        result = python("-m", "pyro_vae.cli", option)
        times.append(time.perf_counter() - start)
        assert result.returncode == 0
        assert (__version__ if option == "--version" else "Usage") in result.stdout
        if times[-1] < 1.0:
            break
    assert min(times) < 1.0


HEAVY = (
    "torch", "pyro", "matplotlib", "matplotlib.pyplot", "sklearn", "scipy", "numpy", "pydantic", "arviz_stats", "arviz_base",
    "torchvision", "safetensors", "PIL",
)  # fmt: skip


def loaded_after(python: Python, code: str) -> set[str]:
    result = python("-c", f"{code}\nimport sys\nprint('LOADED', *[m for m in {HEAVY!r} if m in sys.modules])")
    assert result.returncode == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith("LOADED"))
    return set(line.split()[1:])


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["train", "--help"], ["evaluate", "--help"], ["manifold", "--help"]]
)
def test_help_imports_nothing_heavy(arguments: list[str], python: Python) -> None:
    code = f"from pyro_vae.cli.app import run\nassert run({arguments!r}) == 0"
    # typer itself needs pydantic for the options of a command, in its newer versions
    assert loaded_after(python, code) - {"pydantic"} == set()


def test_importing_the_package_imports_nothing_heavy(python: Python) -> None:
    assert loaded_after(python, "import pyro_vae; pyro_vae.__version__; dir(pyro_vae)") == set()


def test_no_command_imports_what_it_does_not_use(tmp_path: Path, python: Python) -> None:
    """One after the other in one process, which is quicker: each loads more than the one before."""
    out = tmp_path / "run"
    listing, train = ["list", "models"], ["train", *SMALL, "--steps", "2", "--out", str(out)]
    evaluate = ["evaluate", str(out), "--samples", "30", "--limit", "5", "--quiet"]
    code = f"""
import sys
from pyro_vae.cli.app import run
assert run({listing!r}) == 0
assert not {{"torch", "matplotlib", "pyro"}} & set(sys.modules)
assert run({train!r}) == 0
assert "matplotlib" not in sys.modules
assert run({evaluate!r}) == 0
"""
    # arviz_base imports matplotlib itself, to validate a setting of its own; nothing may go on to draw with it
    assert "matplotlib.pyplot" not in loaded_after(python, code)


def test_importing_every_module_changes_no_global_state(python: Python) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch, pyro, numpy, matplotlib, sklearn.datasets, torchvision, scipy.stats, pydantic
from conftest import global_state
import arviz_stats.base, arviz_base
backend, before = dict(matplotlib.rcParams), global_state()
import importlib, pkgutil, pyro_vae
for module in pkgutil.walk_packages(pyro_vae.__path__, "pyro_vae."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
after = global_state()
assert before == after, [k for k in before if before[k] != after[k]]
assert backend == dict(matplotlib.rcParams)
"""
    result = python("-c", code)
    assert result.returncode == 0, result.stderr


# The examples evaluate programs that were never trained, and are rightly warned of.
@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.result.UnreliableEstimateWarning")
def test_every_documented_example_runs() -> None:
    import doctest
    import importlib
    import pkgutil

    found = 0
    for module in pkgutil.walk_packages(pv.__path__, "pyro_vae."):
        if module.name.endswith("__main__"):
            continue
        with seeded(0):
            result = doctest.testmod(importlib.import_module(module.name), optionflags=doctest.NORMALIZE_WHITESPACE)
        assert result.failed == 0, module.name
        found += result.attempted
    assert found > 20


def test_a_density_on_the_unit_interval_has_its_data_dequantized(tmp_path: Path) -> None:
    assert run(["train", "digits", "--model", "beta", "--steps", "1", "--out", str(tmp_path / "run"), "--quiet"]) == 0
    assert 'dequantization = "uniform"' in (tmp_path / "run" / "spec.toml").read_text()
