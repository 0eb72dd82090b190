"""A compiled step follows the plain one: the same parameters after 200 steps in float64, for every block that can be captured.

What cannot be is named, with the reason, in docs/compiled.md; ``PYRO_VAE_WRITE_DOCS=1 pytest tests/test_captured.py`` writes it
anew. On a CPU a compiled step draws the numbers that a plain one draws, coins excepted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from small import digits, small
from test_extremes import partner
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_vae as pv
from pyro_vae import capture, inductor, registry
from pyro_vae.capture import CaptureWarning
from pyro_vae.data import preparation
from pyro_vae.errors import UserError
from pyro_vae.seeding import generator, seeded

DOCS = Path(__file__).resolve().parent.parent / "docs" / "compiled.md"
STEPS, LIMIT = 200, 1e-8
CHANGES = """
## What changes while it runs

A graph stands for the program as it was recorded. What was read while recording (attributes of its modules and of the
objective, modes, hooks, `requires_grad`, globals and closures of your functions) is compared before every epoch. A
program that a callback has changed is recorded anew, with one line that names the change; where it changes again and
again, training goes on in plain steps, with one line. A program with hooks of yours, or that changes its own numbers as
it runs, is not compiled. State in C code or in files is not seen.
"""
KINDS = ("priors", "posteriors", "likelihoods", "encoders", "decoders", "objectives")
BLOCKS = [
    pytest.param(kind, name, marks=pytest.mark.slow, id=f"{kind}-{name}")  # one is compiled below in the fast suite too
    for kind in KINDS
    for name in registry.names(kind)
]
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="Inductor needs a C++ compiler"
)
_found: dict[tuple[str, str], str] = {}


def declared(kind: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What to build and how to train, so that a block is in use."""
    blocks: dict[str, Any] = {"latent_dim": 3, "encoder": "mlp:hidden=[16]", "decoder": "mlp:hidden=[16]"}
    training: dict[str, Any] = {}
    if kind == "objectives":
        training["objective"] = name
        if name == "enumerated-elbo":
            blocks |= {"prior": "categorical", "posterior": "categorical", "latent_dim": 3}
    else:
        blocks[kind.removesuffix("s")] = {"name": name, **small(kind, name)}
    if kind == "posteriors":
        other = partner(name)
        blocks["prior"] = {"name": other, **small("priors", other)}
    if kind == "priors":
        support = registry.get("priors", name).support  # type: ignore[attr-defined]  # None: the guide's
        supports = {q: registry.get("posteriors", q).support for q in registry.names("posteriors")}  # type: ignore[attr-defined]
        same = [q for q, own in supports.items() if repr(own) == repr(support)]
        other = "diagonal-normal" if support is None or "diagonal-normal" in same else same[0]
        blocks["posterior"] = {"name": other, **small("posteriors", other)}
    return blocks, training


def observations(blocks: dict[str, Any]) -> torch.Tensor:
    """Two hundred rows that the likelihood takes, images where a network wants them."""
    nets = {b["name"] for k, b in blocks.items() if k in ("encoder", "decoder") and isinstance(b, dict)}
    shape = (1, 28, 28) if any("conv" in name for name in nets) else (1, 4, 4)
    rows = torch.rand(200, *shape, generator=generator(0), dtype=torch.float64)
    likelihood = blocks.get("likelihood", {"name": "bernoulli"})
    kind = registry.get("likelihoods", likelihood["name"]).data  # type: ignore[attr-defined]
    if kind == "binary":
        return rows.round()
    if kind == "count":
        return (rows * 4).round()
    if kind == "lattice" or "levels" in likelihood:
        top = likelihood.get("levels", 256) - 1
        return (rows * top).round() / top
    return rows * 0.9 + 0.05


class CoinsFromUniforms(TorchDispatchMode):
    """Draws Bernoulli variables as Inductor does, by comparing a uniform one; torch has a kernel of its own, of the same law."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """That operation so, every other as it is."""
        if func is torch.ops.aten.bernoulli.default:
            return (torch.rand_like(args[0], dtype=torch.float32) < args[0]).to(args[0].dtype)
        return func(*args, **(kwargs or {}))


def trained(blocks: dict[str, Any], x: torch.Tensor, compile: str, **training: Any) -> dict[str, torch.Tensor]:
    """The parameters after 200 steps."""
    with seeded(0):
        vae = pv.build("mlp", "diagonal", tuple(x.shape[1:]), **blocks).double()
    with CoinsFromUniforms() if compile == "off" else contextlib.nullcontext():
        pv.fit(vae, x, **{"steps": STEPS, "batch_size": 20, "compile": compile, "seed": 1, **training})
    return {name: p.detach().clone() for name, p in vae.named_parameters()}


def compare(blocks: dict[str, Any], x: torch.Tensor, **training: Any) -> str:
    """The largest relative difference of a parameter tensor; or why the step cannot be captured."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = trained(blocks, x, "on", **training)
    told = [str(w.message) for w in caught if issubclass(w.category, CaptureWarning)]
    if told:
        return told[0].removeprefix("training uncompiled: ")
    plain = trained(blocks, x, "off", **training)
    worst = max(float((compiled[n] - p).norm() / p.norm().clamp(min=1e-300)) for n, p in plain.items())
    assert worst <= LIMIT
    return f"{worst:.0e}"


@needs_compiler
@pytest.mark.parametrize(("kind", "name"), BLOCKS)
def test_a_compiled_step_is_the_plain_step(kind: str, name: str) -> None:
    blocks, training = declared(kind, name)
    x = observations(blocks)
    try:
        _found[kind, name] = compare(blocks, x, **training)
    except UserError as error:
        pytest.fail(f"{kind} {name} cannot be built here: {error}")


@needs_compiler
@pytest.mark.parametrize(
    "training",
    [
        {"optimizer": "adamw", "clip_norm": 1.0, "average": 0.99},
        {"schedule": "one-cycle", "objective": "elbo:warmup_steps=100", "lr": 0.003},
        {"optimizer": "adamw", "skip_gradients": 10.0, "clip_norm": 5.0},
    ],
    ids=["adamw, clipped, averaged", "one cycle, warmed up", "exploding steps left out"],
)
@pytest.mark.slow
def test_settings_of_training(training: dict[str, Any]) -> None:
    blocks, _ = declared("posteriors", "diagonal-normal")
    assert float(compare(blocks, observations(blocks), **training)) <= LIMIT


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("activation", ["silu", "relu", "tanh"])
def test_products_that_are_made_transposed(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers whose width is not whole vectors, with a batch that is."""
    net = {"name": "mlp", "hidden": [150, 130], "activation": activation}
    blocks: dict[str, Any] = {"encoder": net, "decoder": net, "latent_dim": 3}
    made: list[int] = []
    change = capture._whole_vectors

    def counting(graph: torch.fx.GraphModule) -> None:
        change(graph)
        made.append(sum("force_stride_order" in str(node.target) for node in graph.graph.nodes))

    monkeypatch.setattr(capture, "_whole_vectors", counting)
    compare(blocks, observations(blocks), batch_size=32)
    assert made == [8]  # activations and their gradients, of two layers in two networks


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "lanes"),
    [
        ((7, 45), None),
        *(pytest.param(s, n, marks=pytest.mark.slow) for s in ((20, 28, 28), (7, 45)) for n in (None, 0)),
    ],
    ids=str,
)
def test_pixels_are_binarized_alike(shape: tuple[int, ...], lanes: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The integers of a minibatch's random bits overflow on purpose: compiled as in torch, in whole vectors and without."""
    monkeypatch.setitem(inductor.ON_CPU, "cpp.simdlen", lanes)
    grey = torch.rand(shape, generator=generator(0))
    graph = capture.capture(lambda p: [preparation._below(p)], (grey,))
    with seeded(3):
        (compiled,) = graph(grey)
    with seeded(3):
        assert torch.equal(compiled, preparation._below(grey))


@needs_compiler
@pytest.mark.slow
def test_resuming_and_another_rate_compile_nothing_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries in Inductor's cache are those of the first time."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    x = digits().observed("train").double()

    def libraries(epochs: int, lr: float, out: str, **options: Any) -> list[Path]:
        vae = pv.build("mlp", "diagonal", tuple(x.shape[1:]), latent_dim=3, seed=0).double()
        pv.fit(vae, x, epochs=epochs, lr=lr, batch_size=50, compile="on", out=tmp_path / out, **options)
        return sorted(cache.rglob("*.so"))

    def stop(metrics: dict[str, Any]) -> bool:
        return bool(metrics["epoch"] == 2)

    first = libraries(3, 1e-3, "first", callback=stop)
    assert first
    assert libraries(3, 1e-3, "first", resume=True) == first
    assert libraries(2, 5e-4, "second") == first


@needs_compiler
def test_a_graph_draws_anew_and_in_the_same_law() -> None:
    """The mean of 40,000 normals drawn in 400 calls: within 4.4 standard errors of 0 (a false alarm in 1e-5)."""
    graph = capture.capture(lambda x: [torch.randn_like(x)], (torch.zeros(100),))
    with seeded(0):
        drawn = torch.stack([graph(torch.zeros(100))[0] for _ in range(400)])
    assert abs(float(drawn.mean())) * 200 < 4.4
    assert len(drawn.unique()) > 39_000


@pytest.mark.slow
@needs_compiler
def test_the_list_stands_in_the_docs() -> None:
    wanted = [(kind, name) for kind in KINDS for name in registry.names(kind)]
    if any(block not in _found for block in wanted):
        pytest.skip("needs the whole of this file in one run")
    refused = [(kind.removesuffix("s"), name) for kind, name in wanted if not _found[kind, name][0].isdigit()]
    lines = [f"| {kind} | {name} | {_found[kind + 's', name]} |" for kind, name in refused]
    others = "The others fall back to plain steps:\n\n| kind | block | why not |\n|---|---|---|\n" + "\n".join(lines)
    text = (
        "# What is compiled\n\nPrinted by `tests/test_captured.py`, which trains every block for 200 steps in float64, compiled "
        f"and not, with the same random numbers: {len(wanted) - len(refused)} of {len(wanted)} blocks end with the same "
        f"parameters to {LIMIT:.0e} of their norm. "
        + (others + "\n" if lines else "All optimizers but Adam and AdamW, and several processes, take plain steps.\n")
        + CHANGES
    )
    if os.environ.get("PYRO_VAE_WRITE_DOCS"):
        DOCS.write_text(text)
    assert DOCS.read_text() == text, "docs/compiled.md is stale: run this file with PYRO_VAE_WRITE_DOCS=1"


@needs_compiler
@pytest.mark.slow
def test_several_steps_in_one_launch_are_those_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded on a GPU is run one by one elsewhere: gathering, rates and counting on the device."""
    from pyro_vae.training.loop import Trainer

    blocks, _ = declared("posteriors", "diagonal-normal")
    x = observations(blocks)
    plain = trained(blocks, x, "off")
    monkeypatch.setattr(Trainer, "_launchable", lambda self: self.source.resident())
    launched = trained(blocks, x, "on")
    assert max(float((launched[n] - p).norm() / p.norm()) for n, p in plain.items()) <= LIMIT


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_one_launch_for_many_steps_on_a_gpu() -> None:
    """Between two logging points the host waits for nothing, and the losses follow the plain ones in law."""
    x = digits().observed("train")

    def train(compile: str) -> list[float]:
        vae = pv.build("mlp", "diagonal", tuple(x.shape[1:]), latent_dim=3, seed=0)
        run = pv.fit(vae, x, epochs=5, batch_size=20, compile=compile, device="cuda", seed=1)
        return [m["train_loss"] for m in run.metrics]

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            launched = train("on")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    synchronised = [w for w in caught if "synchroniz" in str(w.message)]
    assert len(synchronised) <= 5 * 40  # the reading of sums at ten logging points an epoch, seeds and copies
    assert launched == pytest.approx(train("off"), rel=0.05)
