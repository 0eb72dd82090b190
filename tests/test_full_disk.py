"""A disk that fills up: the last checkpoint stays readable, and one line says what happened."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import commands
import pytest

import pyro_vae as pv
from pyro_vae.cli.app import run as command

TRAIN = (
    "train", "digits", "--model", "mlp", "--set", "latent_dim=4", "--encoder", "mlp:hidden=[64]",
    "--decoder", "mlp:hidden=[64]", "--epochs", "4", "--quiet",
)  # fmt: skip
WEIGHTS = 4 * (64 * 64 + 64 + 64 * 8 + 8 + 4 * 64 + 64 + 64 * 64 + 64)  # bytes; a checkpoint has four times as many
NO_SPACE = os.strerror(28)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one run, but not for a second checkpoint beside the first."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = (8 * WEIGHTS + 40_000) // 4096 * 4096
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting is not allowed here; the limit on file sizes is tested instead")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path) -> None:
    """Leave no block free."""
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def require_one_line(err: str, *words: str) -> None:
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: cannot write ")
    assert all(word in lines[0] for word in words), err


def test_training(small_disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_vae.training.due.SHARE", math.inf)  # a checkpoint after every epoch
    path = small_disk / "run"
    assert command([*TRAIN, "--out", str(path)]) == 2
    require_one_line(capsys.readouterr().err, NO_SPACE, "checkpoint.safetensors", "what stood there before is whole")
    assert not [p for p in path.iterdir() if p.name.endswith(".tmp")]
    assert len(pv.load(path).metrics) == 2  # written before the checkpoint, and cut on resuming
    moved = small_disk.parent / "moved"
    shutil.copytree(path, moved)
    assert command(["train", "--out", str(moved), "--resume", "--quiet"]) == 0
    assert [m["epoch"] for m in commands.metrics(moved)] == [1, 2, 3, 4]


def test_evaluation(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small_disk / "run"
    assert command([*TRAIN[:-2], "1", "--quiet", "--out", str(path)]) == 0
    fill(small_disk)
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert command(["evaluate", str(path), "--samples", "5", "--limit", "20", "--quiet"]) == 2
    require_one_line(capsys.readouterr().err, NO_SPACE, "evaluation.json")
    assert not (path / "evaluation.json").exists()
    pv.load(path)


def test_a_new_run_leaves_nothing_behind(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(small_disk)
    assert command([*TRAIN, "--out", str(small_disk / "run")]) == 2
    assert NO_SPACE in capsys.readouterr().err
    assert not (small_disk / "run").exists()


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    """The same where mounting is not allowed: a checkpoint that may not be as large as the one before."""
    pytest.importorskip("resource")
    path = tmp_path / "run"
    assert command([*TRAIN, "--out", str(path), "--patience", "4"]) == 0
    checkpoint = (path / "checkpoint.safetensors").read_bytes()
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from pyro_vae.training.files import write_bytes; from pathlib import Path; import sys\n"
        "from pyro_vae.errors import UserError\n"
        "try: write_bytes(Path(sys.argv[1]), bytes(200_000))\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path / "checkpoint.safetensors")],
        env=commands.ENVIRONMENT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert os.strerror(27) in done.stdout
    assert (path / "checkpoint.safetensors").read_bytes() == checkpoint
    assert len(list(path.iterdir())) == 6
