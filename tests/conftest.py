"""What every test is held to: nothing leaves a trace in the global state of torch, NumPy or Pyro."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from typed import Typed

# On purpose, once, and before any test: the networks of the tests are small, and more threads make them slower.
torch.set_num_threads(min(2, torch.get_num_threads()))

# A runner in the background of a shell inherits an ignored SIGINT; the tests of interrupts, and the processes they start, need
# Python's own handler.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What is made while tests are imported and listed is not garbage: looking for some takes half of that time.
gc.disable()


def pytest_collection_finish() -> None:
    """Look for garbage again, but not among what is there by now and stays."""
    gc.freeze()
    gc.enable()


def global_state() -> dict[str, Any]:
    """Everything that an import, a constructor or a call might change for others."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    settings = pyro.settings.get()
    return {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's random state": torch.random.get_rng_state().numpy().tobytes(),
        "NumPy's random state": (kind, keys.tobytes(), *rest),  # type: ignore[union-attr]
        "Pyro's settings": settings,  # its validation flags among them
        "Pyro's parameter store": sorted(pyro.get_param_store().keys()),
        "Pyro's handlers": len(pyro.poutine.runtime._PYRO_STACK),
        "torch's distribution validation": torch.distributions.Distribution._validate_args,
        "the number of threads": torch.get_num_threads(),
        "whether gradients are on": torch.is_grad_enabled(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "the precision of products": (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32),
    }


@pytest.fixture(autouse=True)
def _global_state_untouched() -> Iterator[None]:
    """Fail whoever changes global state, and put it back so that only the culprit fails."""
    before = global_state()
    torch_rng, numpy_rng = torch.random.get_rng_state(), np.random.get_state()  # noqa: NPY002
    yield
    after = global_state()
    changed = [name for name in before if before[name] != after[name]]
    torch.set_default_dtype(before["torch's default dtype"])
    torch.random.set_rng_state(torch_rng)
    np.random.set_state(numpy_rng)  # noqa: NPY002
    pyro.settings.set(**before["Pyro's settings"])
    pyro.clear_param_store()
    torch.distributions.Distribution.set_default_validate_args(before["torch's distribution validation"])
    torch.set_num_threads(before["the number of threads"])
    torch.set_grad_enabled(before["whether gradients are on"])
    assert not changed, f"the test changed {', '.join(changed)}"


@pytest.fixture
def pyro_store_put_back() -> Iterator[None]:
    """For tests that run Pyro's own SVI, which writes to the store of parameters."""
    with pyro.get_param_store().scope():
        yield


@pytest.fixture
def coarse_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports with coarse plots and few simulations: the time of a page is that of its pictures."""
    from pyro_vae.analysis.report import checks, latent, page

    for owner, name, value in (
        (page, "SHARP", 20),
        (checks, "SIMULATIONS", 20),
        (checks, "RANKED", 9),
        (latent, "MANIFOLD", 3),
    ):
        monkeypatch.setattr(owner, name, value)


@pytest.fixture
def data_root() -> Path:
    """Where the real data sets lie; skips where nobody says."""
    root = os.environ.get("PYRO_VAE_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("PYRO_VAE_DATA does not name the folder where data sets lie")
    return Path(root)


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``python *arguments`` in a fresh process and return what it printed."""

    def run(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, timeout=timeout, check=False
        )

    return run


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Typed:
    """The command line in the ``folder`` of a walk-through."""
    monkeypatch.chdir(folder)
    return Typed(capsys)
