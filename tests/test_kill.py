"""Training that is killed at any moment, and resumed, ends where one left alone ends: to the bit."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import commands
import pytest

TRAIN = (
    "train", "digits", "--model", "mixture", "--set", "latent_dim=4", "--prior", "gaussian-mixture:components=5",
    "--encoder", "mlp:hidden=[32]", "--decoder", "mlp:hidden=[32]", "--batch-size", "16", "--epochs", "8", "--quiet",
)  # fmt: skip
EPOCHS = 8

# Writing a file passes through these; a process that counts to the n-th dies in the middle of it.
DIE_WRITING = """
import math, os, signal, tempfile
from pyro_vae.training import due, files, loop
due.SHARE = math.inf  # one after every epoch
left = {count}
def die(*a, **k):
    os.kill(os.getpid(), signal.SIGKILL)
class Torn:
    def __init__(self, file): self.file = file
    def __enter__(self): return self
    def __exit__(self, *a): return self.file.__exit__(*a)
    def write(self, content):
        self.file.write(content[: len(content) // 2]); self.file.flush(); die()
    def __getattr__(self, name): return getattr(self.file, name)
class Os:
    def __getattr__(self, name):
        global left
        value = getattr(os, name)
        if name not in ("fdopen", "fsync", "chmod", "replace", "unlink"):
            return value
        left -= 1
        if left != 0:
            return value
        return (lambda *a, **k: Torn(value(*a, **k))) if name == "fdopen" else die
files.os = Os()
"""
CALLS = 5  # to os.* for each file that is written: fdopen, fsync, chmod, replace, fsync of the folder
EVERY = 2 + CALLS  # a line of metrics, and a checkpoint, after every epoch; weights too, after some
LEAST = 3 * CALLS + EVERY * EPOCHS  # rows, the start and the spec come first


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run left alone."""
    path = tmp_path_factory.mktemp("kill") / "alone"
    status, _, err = commands.run(*TRAIN, "--out", str(path))
    assert status == 0, err
    return path


def resume(path: Path, *options: str) -> None:
    """Go on with a run that was killed; one killed before it was a run is begun again."""
    if (path / "spec.toml").is_file():
        status, _, err = commands.run("train", "--out", str(path), "--resume", "--quiet")
    else:
        status, _, err = commands.run(*TRAIN, "--out", str(path), *options)
    assert status == 0, err


def kill_at(path: Path, epoch: int, delay: float, *options: str) -> int:
    """Kill training ``delay`` seconds after it has completed ``epoch`` epochs."""
    process = commands.start(*TRAIN, "--out", str(path), *options)
    sign, deadline = path / ("metrics.jsonl" if epoch else "spec.toml"), time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if sign.is_file() and (epoch == 0 or len(sign.read_text().splitlines()) >= epoch):
            break
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    return process.finish()[0]


def kill_writing(path: Path, count: int, *options: str) -> int:
    """Let training kill itself at the ``count``-th call that a written file passes through."""
    prelude = DIE_WRITING.format(count=count)
    return commands.start(*TRAIN, "--out", str(path), *options, prelude=prelude).finish()[0]


def moments(number: int, seed: int) -> list[tuple[str, int, float]]:
    """Random moments, every third of them inside the writing of a file."""
    draw = random.Random(seed)
    return [
        ("write", draw.randint(1, LEAST), 0.0)
        if i % 3 == 0
        else ("time", draw.randrange(EPOCHS - 2), draw.uniform(0.0, 0.25))
        for i in range(number)
    ]


def check(path: Path, alone: Path, moment: tuple[str, int, float], *options: str) -> None:
    kind, count, delay = moment
    status = kill_writing(path, count, *options) if kind == "write" else kill_at(path, count, delay, *options)
    assert status == -signal.SIGKILL, f"{moment} came after the end"
    resume(path, *options)
    commands.require_same(path, alone)


@pytest.mark.parametrize(
    "moment",
    [
        ("time", 3, 0.05),
        *(
            pytest.param(m, marks=pytest.mark.slow)
            for m in (("time", 0, 0.0), ("write", CALLS + 2, 0.0), ("write", 3 * CALLS + 3 * EVERY + 4, 0.0))
        ),
    ],
    ids=str,
)
def test_a_killed_run_resumes_to_the_bit(tmp_path: Path, alone: Path, moment: tuple[str, int, float]) -> None:
    check(tmp_path / "run", alone, moment)


@pytest.mark.slow
@pytest.mark.parametrize("moment", moments(20, seed=7), ids=str)
def test_twenty_moments(tmp_path: Path, alone: Path, moment: tuple[str, int, float]) -> None:
    check(tmp_path / "run", alone, moment)


@pytest.mark.slow
def test_a_new_interpreter_trains_to_the_same_bits(tmp_path: Path, alone: Path) -> None:
    status, _, err = commands.run_afresh(*TRAIN, "--out", str(tmp_path / "run"))
    assert status == 0, err
    commands.require_same(tmp_path / "run", alone)


@pytest.mark.slow
def test_compiled(tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    status, _, err = commands.run(*TRAIN, "--out", str(alone), "--compile", "on")
    assert status == 0, err
    assert "uncompiled" not in err
    for index, moment in enumerate([("time", 0, 1.0), ("time", 4, 0.03), ("write", 3 * CALLS + 4 * EVERY + 5, 0.0)]):
        check(tmp_path / f"run{index}", alone, moment, "--compile", "on")


def test_what_killed_writers_left_is_removed(tmp_path: Path, alone: Path) -> None:
    from pyro_vae.training.files import remove_temporaries, write_text

    outside = tmp_path / "outside"
    outside.write_text("mine")
    for name in (".weights.safetensors.abc.tmp", ".metrics.jsonl.x.tmp"):
        (tmp_path / name).write_text("half")
    os.symlink(outside, tmp_path / ".spec.toml.y.tmp")
    keep = [".weights.safetensors", ".others.tmp", "weights.safetensors.tmp"]
    for name in keep:
        write_text(tmp_path / name, "whole")
    remove_temporaries(tmp_path, ("weights.safetensors", "metrics.jsonl", "spec.toml"))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*keep, "outside"])
    assert outside.read_text() == "mine"


@pytest.mark.slow
def test_records_with_few_labels(tmp_path: Path) -> None:
    """A semi-supervised run: which labels are present is drawn again when it is resumed, the same ones."""
    options = ("--model", "semi-supervised", "--present", "label=50", "--objective", "elbo:label_weight=20")
    status, _, err = commands.run(*TRAIN, "--out", str(tmp_path / "alone"), *options)
    assert status == 0, err
    for index, moment in enumerate([("time", 2, 0.05), ("write", 3 * CALLS + 3 * EVERY + 4, 0.0)]):
        check(tmp_path / f"run{index}", tmp_path / "alone", moment, *options)
