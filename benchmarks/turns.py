"""Contestants that take turns: each a process of its own, blocked on its standard input while another runs.

A contestant is a function ``train(turn)`` that trains one turn after another, calls ``turn(loss)`` after each, and stops when
that returns True. The first turn compiles and warms up. In its process, :func:`serve` runs it; outside, a :class:`Worker` starts
the process, says when to take a turn, and hears how many seconds it took, on the clock and of all processors.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

Turn = Callable[[float | None], bool]  # of the mean loss per image; None where nothing is learned
SETTLE_SECONDS = 0.1  # between turns, for the threads of the last to fall asleep
LIBRARIES = ("torch", "pyro-ppl", "numpyro", "jax", "pythae", "numpy")


class LeftOut(Exception):
    """Why a contestant cannot take part, in one line."""


class _Channel:
    """The child's side: clocks every turn, reports it, and waits to be told of the next."""

    def __init__(self, reports: TextIO) -> None:
        self.reports = reports
        self._begin()

    def __call__(self, loss: float | None) -> bool:
        clock, cpu = time.perf_counter() - self.clock, time.process_time() - self.cpu
        self.report(seconds=clock, cpu_seconds=cpu, loss=loss, **memory())
        stop = sys.stdin.readline().strip() != "turn"
        self._begin()
        return stop

    def _begin(self) -> None:
        self.clock, self.cpu = time.perf_counter(), time.process_time()

    def report(self, **what: Any) -> None:
        print(json.dumps(what), file=self.reports, flush=True)


def serve(make: Callable[[], Callable[[Turn], Any]]) -> None:
    """Make a contestant and run it turn by turn, in a process that a :class:`Worker` started."""
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not for the channel
    channel = _Channel(reports)
    try:
        make()(channel)
    except (ImportError, LeftOut) as error:
        channel.report(left_out=" ".join(str(error).split()))
    except Exception as error:
        traceback.print_exc()
        channel.report(left_out=f"failed, {type(error).__name__}: {' '.join(str(error).split())[:200]}")


class Worker:
    """A contestant's process: ``python SCRIPT ARGUMENTS``, which is to call :func:`serve`."""

    def __init__(self, script: Path, arguments: list[str], environment: dict[str, str], affinity: set[int]) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._cache = tempfile.mkdtemp()  # an empty cache: every compilation is a cold one
        self._process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": self._cache, **environment},
            preexec_fn=lambda: _pin(affinity),
        )
        self.first = self._hear()
        self.left_out: str | None = self.first.get("left_out")

    def turn(self) -> dict[str, float]:
        """Let it take a turn: ``seconds``, ``cpu_seconds``, ``loss`` and what memory it has taken."""
        time.sleep(SETTLE_SECONDS)
        assert self._process.stdin is not None
        self._process.stdin.write("turn\n")
        self._process.stdin.flush()
        heard = self._hear()
        if "left_out" in heard:
            raise RuntimeError(heard["left_out"])
        return heard

    def stop(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
        shutil.rmtree(self._cache, ignore_errors=True)
        self._log.close()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            heard: dict[str, Any] = json.loads(line)
        else:
            heard = {"left_out": f"failed, its process ended with status {self._process.wait()}"}
        if str(heard.get("left_out", "")).startswith("failed"):
            self._log.seek(0)
            print(self._log.read()[-3000:], file=sys.stderr)
        return heard


def environment(threads: int) -> dict[str, str]:
    """What holds OpenMP, MKL and XLA to that many threads, and has idle ones sleep rather than spin."""
    found = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "KMP_BLOCKTIME": "0",
        "NPROC": str(threads),  # the size of XLA's pool
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    if threads == 1:
        found["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    return found


def cores(count: int) -> set[int]:
    """The cores that contestants are held to: as many as they have threads, where the system can."""
    return set(sorted(_usable())[:count])


def num_cores() -> int:
    """How many cores this process may use."""
    return len(_usable())


def _usable() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _pin(affinity: set[int]) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, affinity)


def memory() -> dict[str, float]:
    """Peak resident memory of this process in MB, and what it holds now that no file stands behind, where Linux tells."""
    try:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {
            "peak_mb": int(status["VmHWM"].split()[0]) / 1024,
            "anonymous_mb": int(status["RssAnon"].split()[0]) / 1024,
        }
    except (OSError, KeyError):
        unit = 2**20 if platform.system() == "Darwin" else 2**10
        return {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}


def machine() -> dict[str, Any]:
    """Processor, cores and versions."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {"processor": processor, "architecture": platform.machine(), "cores": num_cores(), "versions": versions()}


def versions() -> dict[str, str]:
    """Of Python and of every library that takes part."""
    found = {"Python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def described(of: dict[str, Any]) -> str:
    """One line on machine and versions, for the end of a table."""
    with_versions = ", ".join(f"{name} {version}" for name, version in of["versions"].items())
    return f"{of['processor']} ({of['architecture']}), {of['cores']} cores; {with_versions}"
