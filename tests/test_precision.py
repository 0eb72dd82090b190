"""Products in fewer bits: asked for, measured, and refused where they cannot be had."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import conjugate
import pyro
import pyro.distributions as dist
import pytest
import torch
from small import digits, small_vae
from torch import Tensor

import pyro_vae as pv
from pyro_vae.analysis.mcmc import sample_chains
from pyro_vae.evaluation import importance
from pyro_vae.evaluation.ais import annealed_log_likelihood
from pyro_vae.evaluation.rounding import rounding_error
from pyro_vae.precision import no_denormals, products
from pyro_vae.seeding import seeded


@pytest.fixture(scope="module")
def trained() -> tuple[Any, torch.Tensor]:
    data = digits()
    with seeded(0):
        vae = small_vae(data)
    pv.fit(vae, data, epochs=2)
    return vae, data.observed("test", rows=torch.arange(20))


def log_likelihood(*args: Any, **options: Any) -> pv.LogLikelihood:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pv.log_likelihood(*args, **options)


def test_the_error_of_float32_is_rounding_and_that_of_bfloat16_is_larger(trained: Any) -> None:
    vae, x = trained
    full, half = (rounding_error(vae, x, None, precision, 0) for precision in ("full", "bf16"))
    assert full is not None
    assert half is not None
    assert full.shape == half.shape == (16,)
    assert float(full.abs().max()) < 1e-3
    assert 1e-4 < float(half.abs().max()) < 1.0


def test_what_it_cost_stands_in_the_result(trained: Any) -> None:
    vae, x = trained
    full = log_likelihood(vae, x, num_samples=200)
    half = log_likelihood(vae, x, num_samples=200, precision="bf16")
    assert full.rounding_error is not None
    assert "precision" not in full.summary()
    assert half.summary()["precision"] == "bf16"
    assert half.summary()["rounding_error"] == pytest.approx(float(half.rounding_error.mean()))  # type: ignore[union-attr]
    assert "products in bf16: against float64" in str(half)
    torch.testing.assert_close(half.log_likelihood, full.log_likelihood, atol=1.0, rtol=0.05)
    assert half.log_likelihood.tolist() != full.log_likelihood.tolist()


@pytest.mark.parametrize("compile", ["off", pytest.param("on", marks=pytest.mark.slow)])
def test_training_in_bfloat16_falls_as_far(compile: str) -> None:
    data = digits()

    def loss(precision: str) -> float:
        run = pv.fit(small_vae(data, seed=0), data, epochs=3, precision=precision, compile=compile)
        return float(run.metrics[-1]["train_loss"])

    full, half = loss("full"), loss("bf16")
    assert half != full
    assert half == pytest.approx(full, rel=0.02)


@pytest.mark.parametrize(
    ("precision", "message"),
    [("fp8", "unknown precision 'fp8'"), ("tf32", "'tf32' needs a CUDA device, not 'cpu'")],
)
def test_what_cannot_be_had_is_refused(trained: Any, precision: str, message: str) -> None:
    vae, x = trained
    with pytest.raises(pv.UserError, match=message):
        pv.log_likelihood(vae, x, num_samples=30, precision=precision)


def test_a_float64_program_has_its_own(trained: Any) -> None:
    vae = pv.build("ppca", "linear", (3,), latent_dim=2).double()
    with pytest.raises(pv.UserError, match="for float32 programs, and this one is float64"):
        pv.log_likelihood(vae, torch.zeros(4, 3), num_samples=30, precision="bf16")


def test_a_program_with_constants_of_its_own_cannot_be_measured() -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(3))
            self.constant = torch.eye(3)  # no buffer: .double() does not reach it

        def model(self, x: torch.Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1).to_event(1))
                pyro.sample("x", dist.Normal(z @ self.weight @ self.constant, 1).to_event(1), obs=x)

        def guide(self, x: torch.Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x @ self.weight, 1).to_event(1))

    result = log_likelihood(Own(), torch.zeros(4, 3), num_samples=50, precision="bf16")
    assert result.rounding_error is None
    assert "an unknown error" in str(result)


class Rounded(conjugate.LinearGaussian):
    """Whose weights keep two bits of their fraction while float32 products may round, as factors in tf32 keep ten."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.dtype, str, bool, bool]] = []

    def model(self, x: Tensor) -> None:
        rounds = torch.backends.cuda.matmul.allow_tf32
        self.seen.append((x.dtype, torch.get_float32_matmul_precision(), rounds, torch.backends.cudnn.allow_tf32))
        weight = self.weight.data
        if rounds and x.dtype == torch.float32:
            self.weight.data = self.coarse(weight)
        super().model(x)
        self.weight.data = weight

    @staticmethod
    def coarse(weight: Tensor) -> Tensor:
        return (weight * 4).round() / 4


def test_the_error_of_tf32_is_measured_where_products_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted rounding, whose effect on log p(x) is known; it was measured with the rounding switched off, and found 0."""
    monkeypatch.setattr(importance, "require_precision", lambda *a: None)  # no CUDA device is needed to set a flag
    x = conjugate.data()
    program = Rounded()
    proven = importance.proven

    def asked(*args: Any) -> Any:
        """The runs of the contract and of the proof, in full products, are not looked at."""
        found = proven(*args)
        program.seen.clear()
        return found

    monkeypatch.setattr(importance, "proven", asked)
    coarse = Rounded()
    coarse.weight.data = coarse.coarse(coarse.weight.data)
    planted = coarse.evidence(x) - program.evidence(x)
    assert float(planted.abs().min()) > 0.05
    result = log_likelihood(program.float(), x.float(), num_samples=500, precision="tf32")
    assert result.rounding_error is not None
    # the guide is nearly exact: estimates of either model are off by a few thousandths of a nat at most
    torch.testing.assert_close(result.rounding_error, planted, atol=0.02, rtol=0.02)
    estimates = [tuple(flags) for dtype, *flags in program.seen if dtype == torch.float32]
    assert set(estimates) == {("high", True, True)}


@pytest.mark.parametrize("method", ["importance", "annealing", "chains", "rounding"])
def test_full_products_are_full_whatever_torch_was_told(method: str) -> None:
    """A process that trains with ``torch.set_float32_matmul_precision`` rounds products, and torch those of convolutions."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    program, x = Rounded().float(), conjugate.data(2).float()
    try:
        if method == "importance":
            log_likelihood(program, x, num_samples=30)
        elif method == "annealing":
            annealed_log_likelihood(program, x, num_chains=8, num_distributions=100, num_leapfrog=3)
        elif method == "chains":
            sample_chains(program, x, num_samples=2, num_warmup=2)
        else:
            rounding_error(program, x, None, "bf16", 0)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert {tuple(flags) for _, *flags in program.seen} == {("highest", False, False)}


def test_a_precision_leaves_the_flags_as_they_were() -> None:
    backends: Any = torch.backends
    flags = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul]
    before = [flag.fp32_precision for flag in flags]
    try:
        flags[1].fp32_precision = "ieee"  # a state that torch's older flags have no word for
        for precision in ("full", "tf32", "bf16"):
            with products(precision), products("full"):
                assert {flag.fp32_precision for flag in flags} == {"ieee"}
            assert [flag.fp32_precision for flag in flags] == [before[0], "ieee", before[2]]
    finally:
        flags[1].fp32_precision = before[1]


def test_the_error_of_a_program_conditioned_on_floats_is_known() -> None:
    class Conditional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(3))

        def model(self, x: Tensor, y: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1).to_event(1))
                pyro.sample("x", dist.Normal((z + y) @ self.weight, 1).to_event(1), obs=x)

        def guide(self, x: Tensor, y: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal((x - y) @ self.weight / 2, 0.8).to_event(1))

    result = log_likelihood(Conditional(), torch.ones(4, 3), torch.ones(4, 3) / 3, num_samples=50, precision="bf16")
    assert result.rounding_error is not None
    assert 1e-5 < float(result.rounding_error.abs().max()) < 0.2


def test_a_refused_precision_leaves_no_run_behind(tmp_path: Path) -> None:
    with pytest.raises(pv.UserError, match="needs a CUDA device"):
        pv.fit(small_vae(digits()), digits(), epochs=1, precision="tf32", device="cpu", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_numbers_below_the_smallest_are_zero_in_every_thread_while_it_is_so() -> None:
    x = torch.full((2**22,), 1e-38)  # so many that all threads have a share

    def share_of_zeros() -> float:
        return float((x * 1e-2 == 0).double().mean())

    assert share_of_zeros() == 0
    with no_denormals():
        with no_denormals():
            pass
        assert share_of_zeros() == 1 or sys.platform != "linux"
    assert share_of_zeros() == 0


@pytest.mark.slow
def test_a_process_ends_though_it_is_still_so() -> None:
    code = (
        "import torch; from pyro_vae.precision import no_denormals; torch.set_num_threads(2); "
        "torch.rand(2**20).exp(); held = no_denormals(); held.__enter__()"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
