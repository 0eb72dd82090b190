"""pyro-vae baseline: a directory without pickles, resumed to the bit, and one line for what is wrong."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import commands
import pytest

from pyro_vae.cli.app import run
from pyro_vae.training.files import read_tensors

RBM = ("baseline", "rbm", "--set", "hidden=8", "--chains", "10", "--distributions", "20", "--quiet")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("baseline") / "rbm"
    assert run([*RBM, "--epochs", "4", "--out", str(path)]) == 0
    return path


def test_figures_are_printed_and_kept(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["baseline", "rbm", "--out", str(trained), "--resume", *RBM[4:], "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    kept = (trained / "evaluation.json").read_text()
    assert figures == json.loads(kept)
    assert {"nll", "nll_mc_se", "nll_data_se", "computed", "images_used", "parameters", "minutes"} <= set(figures)
    assert figures["images_used"] == 1439
    assert sorted(p.suffix for p in trained.iterdir()) == [
        ".json", ".json", ".jsonl", ".png", ".safetensors", ".safetensors",
    ]  # fmt: skip
    assert (
        run(["baseline", "rbm", "--out", str(trained), "--resume", *RBM[4:], "--split", "train", "--limit", "5"]) == 0
    )
    assert (trained / "evaluation.json").read_text() == kept
    assert json.loads((trained / "evaluation-train.json").read_text())["num_data"] == 5


def test_a_network_begins_with_the_machine_and_is_refused_another(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dbn = ("baseline", "dbn", "--from", str(trained), "--set", "second=8", "--set", "top_epochs=2", "--samples", "20")
    out = str(tmp_path / "dbn")
    assert "--set first=so many" in refused(capsys, *dbn, "--out", out)
    assert "was trained on other rows" in refused(capsys, *dbn, "--validation", "50", "--out", out)
    begun = tmp_path / "begun"  # as a kill before the first checkpoint leaves it
    shutil.copytree(trained, begun, ignore=shutil.ignore_patterns("state*", "metrics*"))
    assert "has made 0 of 4 passes" in refused(capsys, *dbn, "--from", str(begun), "--out", out)
    assert not (tmp_path / "dbn").exists()
    assert run([*dbn, "--set", "first=8", "--out", out, "--limit", "10", *RBM[4:]]) == 0
    assert "by chains" in capsys.readouterr().out
    lower = read_tensors(tmp_path / "dbn" / "state.safetensors")[0]["lower.weight"]
    assert bool((lower == read_tensors(trained / "state.safetensors")[0]["machine.weight"]).all())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["rbx"], "did you mean 'rbm'"),
        (["rbm", "no-such-data"], "unknown data set"),
        (["rbm", "digits", "--set", "hiden=3"], "hidden"),
        (["rbm", "digits", "--set", "hidden=0"], "greater than or equal to 1"),
        (["rbm", "moons"], "binary"),
        (["rbm", "digits", "--binarization", "none"], "takes binary images"),
        (["rbm", "--resume"], "needs --out"),
        (["rbm", "--from", "nowhere"], "no directory"),
        (["dbn", "--set", "epochs=0"], "--from DIR"),
        (["autoencoder", "--set", "likelihood=categorical"], "choose bernoulli or normal"),
        (["autoencoder", "--set", "posterior=planar"], "has none: choose diagonal-normal"),
        (["autoencoder", "--set", "prior=vamp"], "made of the guide"),
        (["autoencoder", "--set", "prior=gaussian-mixture:components=5000"], "give fewer"),
        (["vae-gan", "--set", "posterior=planar"], "has none: choose diagonal-normal"),
        (["gan", "--binarization", "static"], "takes grey images"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told in refused(capsys, "baseline", *arguments)
    assert not list(tmp_path.iterdir())


def test_show_says_what_a_baseline_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["show", "rbm", "--shape", "1,8,8", "--set", "hidden=10"]) == 0
    said = capsys.readouterr().out
    assert "p(x, h) = exp(b.x + c.h + x W h) / Z" in said
    assert "714 parameters" in said
    assert "| hidden       | 500     | 10" in said
    assert "no pair of programs" in refused(capsys, "show", "rbm", "diagonal")


def test_directories_are_not_mixed_up(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "already holds" in refused(capsys, *RBM, "--out", str(trained))
    assert "holds a rbm" in refused(capsys, "baseline", "dbn", "--resume", "--out", str(trained))
    assert "leave out --set" in refused(
        capsys, "baseline", "rbm", "--resume", "--out", str(trained), "--set", "hidden=3"
    )
    (tmp_path / "other").write_text("")
    assert "not an empty directory" in refused(capsys, *RBM, "--out", str(tmp_path))
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in trained.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    torn = copy / "state.safetensors"
    torn.write_bytes(torn.read_bytes()[:-40])
    assert "is damaged" in refused(capsys, "baseline", "rbm", "--resume", "--out", str(copy))


@pytest.mark.slow
def test_a_killed_training_ends_where_one_left_alone_ends(tmp_path: Path) -> None:
    """Killed at four moments, two of them while a file is written, and resumed each time."""
    often = "from pyro_vae.baselines import training; training.SECONDS = 0"
    dbn = ("baseline", "dbn", "--set", "first=8", "--set", "second=8", "--set", "top_epochs=4", "--limit", "3", "--samples",
           "2", "--epochs", "4", "--chains", "2", "--distributions", "3", "--quiet", "--out")  # fmt: skip
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert commands.run(*dbn, str(alone))[0] == 0
    for passes in (1, 3, 5):
        arguments = (
            (*dbn, str(killed)) if passes == 1 else ("baseline", "dbn", "--resume", "--quiet", "--out", str(killed))
        )
        process = commands.start(*arguments, prelude=often)
        deadline, lines = time.monotonic() + 60, killed / "metrics.jsonl"
        while time.monotonic() < deadline and process.poll() is None:
            if lines.is_file() and lines.read_text().count("\n") >= passes:
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.finish()
    assert commands.run("baseline", "dbn", "--resume", "--quiet", "--limit", "3", "--out", str(killed))[0] == 0
    ours, theirs = (read_tensors(path / "state.safetensors")[0] for path in (killed, alone))
    assert ours.keys() == theirs.keys()
    assert all(bool((ours[name] == theirs[name]).all()) for name in ours)


@pytest.mark.slow
def test_a_finished_autoencoder_is_evaluated_anew_from_its_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its prior and guide come from the run in it, and one whose guide was not begun goes on."""
    small = ("--set", "latent_dim=2", "--set", "encoder=mlp:hidden=[8]", "--set", "decoder=mlp:hidden=[8]", "--set",
             "prior=gaussian-mixture:components=3", "--set", "guide_epochs=3", "--epochs", "3")  # fmt: skip
    how = ("--samples", "20", "--limit", "5", "--chains", "2", "--distributions", "5", "--quiet", "--json", "--out")
    assert run(["baseline", "autoencoder", *small, *how, str(tmp_path / "a")]) == 0
    first = json.loads(capsys.readouterr().out)
    for _ in range(2):
        assert run(["baseline", "autoencoder", "--resume", *how, str(tmp_path / "a")]) == 0
        again = json.loads(capsys.readouterr().out)
        assert {k: v for k, v in again.items() if k != "minutes"} == {k: v for k, v in first.items() if k != "minutes"}
        for file in (tmp_path / "a" / "program").iterdir():
            file.unlink()
        (tmp_path / "a" / "program").rmdir()
