"""Several processes, forked or under torchrun, do what one does, and notice when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import commands
import pytest
import torch
from record_programs import M2, m2_data

import pyro_vae as pv
from pyro_vae.seeding import generator

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TRAIN = (
    "train", "digits", "--set", "latent_dim=4", "--prior", "gaussian-mixture:components=5",
    "--encoder", "mlp:hidden=[32]", "--decoder", "mlp:hidden=[32]", "--batch-size", "16", "--quiet",
)  # fmt: skip

FEW = (  # of the gradients
    "diagonal",
    "vamp",
    "digits, binarized anew",
    "dropout and gamma",
    "objective dreg",
    "records with few labels",
)
WORKER = Path(__file__).with_name("distributed_worker.py")
# What torchrun tells a process. Those that are forked have imported everything, and are asked for a few gradients alone.
FORKED = f"""
import os, runpy, sys
os.environ.update(RANK="{{rank}}", LOCAL_RANK="{{rank}}", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="{{port}}")
sys.path.insert(0, {str(WORKER.parent)!r})
sys.argv = [{str(WORKER)!r}, {{out!r}}, *{FEW!r}]
runpy.run_path(sys.argv[0], run_name="__main__")
sys.exit(0)
"""


def found_by_forked(out: Path) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [commands.start(prelude=FORKED.format(rank=rank, port=port, out=str(out))) for rank in (0, 1)]
    ended = [process.finish(300) for process in started]
    assert [status for status, _, _ in ended] == [0, 0], ended[0][2][-3000:] + ended[1][2][-3000:]
    return {**json.loads(ended[0][1].splitlines()[-1]), "out": out}


def found_under_torchrun(out: Path) -> dict[str, Any]:
    done = subprocess.run(
        [*TORCHRUN, str(WORKER), str(out)], env=commands.ENVIRONMENT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "out": out}


@pytest.fixture(
    scope="module",
    params=[found_by_forked, pytest.param(found_under_torchrun, marks=pytest.mark.slow)],
    ids=["forked", "torchrun"],
)
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes found."""
    found: dict[str, Any] = request.param(tmp_path_factory.mktemp("two") / "run")
    return found


def test_gradients_of_two_are_those_of_one(report: dict[str, Any]) -> None:
    """In float64, on the same global batch, with the same noise: to 1e-10."""
    assert report["processes"] == 2
    assert report["gradients"].keys() >= set(FEW)
    wrong = {name: worst for name, worst in report["gradients"].items() if worst is None or not worst < 1e-10}
    assert not wrong, wrong


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the processes have: another order of summation would accept another proposal of a chain sooner or later."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_evaluation_gives_the_same_numbers_per_image(report: dict[str, Any]) -> None:
    vae = pv.build("mlp", "diagonal", (6,), likelihood="normal", latent_dim=4)
    x = torch.rand(50, 6, generator=generator(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = pv.log_likelihood(vae, x, num_samples=30, chunk_size=90)
        annealed = pv.annealed_log_likelihood(vae, x[:4], num_chains=4, num_distributions=10, chunk_size=8)
        record = m2_data(20)
        few = pv.log_likelihood(M2(), record, num_samples=30, chunk_size=300)
        given = pv.log_likelihood(M2(), record, of="image", given="label", num_samples=30, common=True)
        bounds = pv.bidirectional(vae, 4, num_chains=4, num_distributions=10, chunk_size=8)
    assert alone.log_likelihood.tolist() == report["log_likelihood"]
    assert [few.log_likelihood.tolist(), given.log_likelihood.tolist(), given.mc_se.tolist()] == report["records"]
    assert alone.khat.tolist() == report["khat"]
    assert annealed.log_likelihood.tolist() == report["annealed"]
    assert bounds.gap.tolist() == report["gap"]


def test_a_run_of_two_is_that_of_one(report: dict[str, Any], tmp_path: Path) -> None:
    """In float32: up to rounding. One writes; the directory is complete and loads."""
    vae = pv.build("mlp", "diagonal", (6,), likelihood="normal", latent_dim=4)
    alone = pv.fit(
        vae, torch.rand(50, 6, generator=generator(0)), epochs=3, batch_size=10, seed=1, out=tmp_path / "run"
    )
    assert [m["train_loss"] for m in alone.metrics] == pytest.approx(report["metrics"], rel=1e-5)
    loaded = pv.load(report["out"])
    for name, weight in vae.state_dict().items():
        torch.testing.assert_close(loaded.program.state_dict()[name], weight, rtol=1e-3, atol=1e-5)


def workers_of(agent: int) -> list[int]:
    """The processes that torchrun started."""
    children = Path(f"/proc/{agent}/task/{agent}/children")
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []


def start_and_kill_one(path: Path, *options: str, epochs: int) -> tuple[subprocess.Popen[str], float]:
    """Train under torchrun, kill one process after two epochs, and say when."""
    agent = subprocess.Popen(
        [*TORCHRUN, *options, "-m", "pyro_vae.cli", *TRAIN, "--epochs", str(epochs), "--out", str(path)],
        env=commands.ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not ((path / "metrics.jsonl").is_file() and len((path / "metrics.jsonl").read_text().splitlines()) >= 2):
        assert agent.poll() is None, agent.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(workers_of(agent.pid)[-1], signal.SIGKILL)
    return agent, time.monotonic()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_a_killed_process_ends_the_others(tmp_path: Path) -> None:
    path = tmp_path / "run"
    agent, killed = start_and_kill_one(path, epochs=400)
    _, err = agent.communicate(timeout=60)
    assert time.monotonic() - killed < 30
    assert agent.returncode != 0
    assert "error: another process of this training died or cannot be reached: go on from the checkpoint" in err
    before = len(commands.metrics(path))
    assert before >= 2
    pv.load(path)
    # what is left is whole, for one process too: it goes on where the two were
    process = commands.start("train", "--out", str(path), "--resume", "--quiet")
    deadline = time.monotonic() + 200
    while len(commands.metrics(path)) < before + 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.finish()[0] == 143
    assert len(commands.metrics(path)) >= before + 2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_elastic_restart_resumes(tmp_path: Path) -> None:
    """With --max-restarts the same command goes on from the checkpoint, and ends where one left alone ends."""
    agent, _ = start_and_kill_one(tmp_path / "killed", "--max-restarts", "2", epochs=30)
    _, err = agent.communicate(timeout=300)
    assert agent.returncode == 0, err[-3000:]
    done = subprocess.run(
        [*TORCHRUN, "-m", "pyro_vae.cli", *TRAIN, "--epochs", "30", "--out", str(tmp_path / "alone")],
        env=commands.ENVIRONMENT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    commands.require_same(tmp_path / "killed", tmp_path / "alone")
