"""What is asked of Inductor beyond its public function saves time and changes nothing; where it cannot be had, all goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_captured import needs_compiler
from torch import Tensor

from pyro_vae import inductor
from pyro_vae.capture import capture
from pyro_vae.seeding import generator

pytestmark = needs_compiler
SIZE = 64


def layers(shift: int) -> Callable[..., Any]:
    """Products with activations between them, so that each activation is a kernel of its own; others for each ``shift``."""

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        for k, w in enumerate(weights):
            x = (torch.tanh, torch.sin, torch.sigmoid)[k % 3](x @ w) + k + shift
        return x

    return function


def tensors() -> list[Tensor]:
    """For any of :func:`layers`."""
    return [torch.randn(SIZE, SIZE, generator=generator(k)) / 8 for k in range(5)]


def libraries(cache: Path) -> list[Path]:
    """Those of kernels; the empty one, which has the headers compiled, is none."""
    return sorted(so for so in cache.rglob("*.main.so") if "kernel() {}" not in so.with_suffix(".cpp").read_text())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of compiled code."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path


def check(shift: int) -> None:
    """Compiled as in torch."""
    args = tensors()
    assert torch.allclose(capture(layers(shift), tuple(args))(*args), layers(shift)(*args), atol=1e-5)


@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_kernels_share_a_library_for_each_process_of_the_compiler(cache: Path, threads: int) -> None:
    from torch._inductor import config

    with config.patch(compile_threads=threads):
        check(threads)
    assert len(libraries(cache)) == threads


@pytest.mark.slow
def test_kernels_that_cannot_share_one_are_compiled_alone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor._Kernels, "fits", staticmethod(lambda source: False))
    check(3)
    assert len(libraries(cache)) == 4


@pytest.mark.slow
def test_kernels_are_compiled_alone_where_it_fails_together(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "BINDING", ("there_is_no_such_header.h",))
    check(4)
    assert len(libraries(cache)) == 4


@pytest.mark.parametrize(
    ("source", "fits"),
    [
        (f'{inductor.PREFIX}\nextern "C" void kernel(float* x) {{\n#pragma omp parallel\n{{}} }}', True),
        (f'{inductor.PREFIX}\n#include <vector>\nextern "C" void kernel(float* x) {{}}', False),
        (f'{inductor.PREFIX}\n#define TWO 2\nextern "C" void kernel(float* x) {{}}', False),
        (f"{inductor.PREFIX}\nvoid kernel(float* x);\nvoid kernel(float* x) {{}}", False),
    ],
)
def test_what_can_stand_beside_other_kernels(source: str, fits: bool) -> None:
    assert inductor._Kernels.fits(source) is fits


def test_torch_without_such_insides_compiles_all_the_same(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that cannot be fetched ahead, a trial that fails, layers that hide what they hold."""
    from torch._inductor import codecache, cpu_vec_isa

    def broken() -> None:
        raise RuntimeError("a trial that fails")

    monkeypatch.setattr(codecache, "triton_key", lambda: "a key")
    monkeypatch.setattr(inductor, "inspect", SimpleNamespace(unwrap=lambda function: function))
    with monkeypatch.context() as during:
        during.setattr(cpu_vec_isa, "valid_vec_isa_list", broken)
        inductor.begin_trial.__wrapped__().join()
    check(5)


def test_a_graph_that_changes_its_arguments_is_called_directly() -> None:
    """By the code that was generated, constants of the graph in front, and with what it is given anew each time."""
    shift = torch.arange(SIZE) / SIZE

    def step(total: Tensor, x: Tensor) -> list[Tensor]:
        total.add_((x + shift).square())
        return []

    total, x = torch.zeros(SIZE), torch.ones(SIZE)
    graph = capture(step, (total, x))
    assert graph.flat.__qualname__.startswith("_generated")
    for k in range(3):
        graph(total, k * x)
    assert torch.allclose(total, torch.stack([(k + shift).square() for k in range(3)]).sum(0), atol=1e-5)


def test_a_graph_with_outputs_is_called_through_its_layers() -> None:
    """They give back what an output is a view of."""
    x = torch.randn(SIZE, generator=generator(0))
    graph = capture(lambda a: [a.view(8, 8), a * 2], (x,))
    assert not graph.flat.__qualname__.startswith("_generated")
    view, double = graph(x)
    assert view.data_ptr() == x.data_ptr()
    assert torch.equal(double, 2 * x)
