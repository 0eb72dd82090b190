"""The command line in processes of its own, for tests that kill, starve and interrupt it.

Most of them are forked from one that has imported everything and computed nothing, which saves each the seconds of importing.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

# Reads a line of JSON per command; a go-between waits for the command and files how it ended.
SERVER = """
import json, os, sys
import pyro_vae.cli.app, pyro_vae.training.fit, pyro_vae.evaluation.evaluate, pyro_vae.analysis.pictures
import sklearn.datasets, torch._dynamo
from pyro_vae import registry
for kind in registry.PACKAGES: registry.names(kind)
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if os.fork():
        continue
    child = os.fork()
    if child == 0:
        os.dup2(os.open(job["path"] + ".out", os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(os.open(job["path"] + ".err", os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        exec(job["prelude"], {"__name__": "prelude"})
        from pyro_vae.cli import main
        main(job["arguments"])
    with open(job["path"] + ".new", "w") as file:
        file.write(str(child))
    os.rename(job["path"] + ".new", job["path"] + ".pid")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(job["path"] + ".new", "w") as file:
        file.write(str(status))
    os.rename(job["path"] + ".new", job["path"] + ".status")
    os._exit(0)
"""


class Server:
    """The process that commands are forked from."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="commands-")
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        self.count = itertools.count()
        atexit.register(self.stop)

    def start(self, arguments: tuple[str, ...], prelude: str) -> Command:
        path = Path(self.folder.name) / str(next(self.count))
        job = {"path": str(path), "arguments": arguments, "prelude": prelude}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return Command(path)

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.folder.cleanup()


_server: list[Server] = []


class Command:
    """One command on its way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pid = int(self._wait(".pid", 60))

    def poll(self) -> int | None:
        """The exit status (minus the signal that ended it), or None."""
        path = self.path.with_suffix(".status")
        return int(path.read_text()) if path.is_file() else None

    def send_signal(self, signum: int) -> None:
        """Send a signal, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, signum)

    def finish(self, timeout: float = 600) -> tuple[int, str, str]:
        """Wait for its end: exit status, standard output and standard error."""
        try:
            status = int(self._wait(".status", timeout))
        finally:
            self.send_signal(signal.SIGKILL)
        return status, self.path.with_suffix(".out").read_text(), self.path.with_suffix(".err").read_text()

    def _wait(self, suffix: str, timeout: float) -> str:
        path, deadline = self.path.with_suffix(suffix), time.monotonic() + timeout
        while not path.is_file():
            assert time.monotonic() < deadline, f"no end within {timeout} s"
            time.sleep(0.01)
        return path.read_text()


def start(*arguments: str, prelude: str = "") -> Command:
    """Start ``pyro-vae *arguments``; ``prelude`` is Python that runs first in its process."""
    if not _server:
        _server.append(Server())
    return _server[0].start(arguments, prelude)


def run(*arguments: str) -> tuple[int, str, str]:
    """``pyro-vae *arguments`` from start to end."""
    return start(*arguments).finish()


def run_afresh(*arguments: str, **how: Any) -> tuple[int, str, str]:
    """The same as a user starts it, by a new interpreter."""
    command = [sys.executable, "-m", "pyro_vae.cli", *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, **how)
    return done.returncode, done.stdout, done.stderr


def metrics(run_path: Path) -> list[dict[str, Any]]:
    """The metrics of a run but for the clock's."""
    lines = (run_path / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def require_same(run_path: Path, other: Path) -> None:
    """The final weights, to the bit, and the metrics of two runs; no temporary file in the first."""
    assert metrics(run_path) == metrics(other)
    assert (run_path / "weights.safetensors").read_bytes() == (other / "weights.safetensors").read_bytes()
    left = {p.name for p in run_path.iterdir()} - {p.name for p in other.iterdir()}
    assert not left, f"left behind: {left}"
