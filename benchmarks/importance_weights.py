"""Importance weighting at the floor: samples per second of ours, of Pyro's, of pythae's and of the arithmetic alone; peak memory.

    python benchmarks/importance_weights.py [--samples 5000] [--images 20] [--rounds 7] [--no-memory] [--whole 10000]

MNIST-shaped data through a 50-200-200-784 decoder (tanh), encoder 784-200-200, in float32. Every round times each contestant
once, one after the other, Pyro also in a process of its own where nothing of ours is set, so that a busy machine slows all of
them: medians are of rounds, ratios are medians of the ratios within rounds. The floor is what no evaluation can leave out: the
decoder's matrix products with their activations, a softplus of every logit and its sum, at the fastest of a few chunk sizes.
pythae (``pip install --no-deps pythae``) is left out where it is not installed. ``--whole`` also times one call of
``pv.log_likelihood`` on so many images, compiling included. The table goes to benchmarks/results/importance_weights.md, the
figures to importance_weights.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pyro.infer.importance import vectorized_importance_weights
from torch import Tensor, nn
from turns import Turn, Worker, cores, serve

import pyro_vae as pv
from pyro_vae.capture import Uncapturable, capture
from pyro_vae.evaluation.estimators import estimate
from pyro_vae.evaluation.importance import block_shape
from pyro_vae.evaluation.result import UnreliableEstimateWarning
from pyro_vae.evaluation.weights import weigh
from pyro_vae.programs.functional import OfProgram
from pyro_vae.programs.trace import evaluating
from pyro_vae.seeding import generator

RESULTS = Path(__file__).parent / "results"
LATENTS, HIDDEN, SHAPE = 50, [200, 200], (1, 28, 28)
FLOOR_CHUNKS = (500, 1250, 5000)
PYRO_CHUNKS = (500, 1250, 5000)
MEMORY_IMAGES, MEMORY_SAMPLES, BUDGET_MB = 20, (100, 1000, 10_000, 100_000), 512
OURS, COMPILED, FLOOR, PYTHAE = "pv.log_likelihood", "its compiled pass", "floor", "pythae"
PYRO, PYRO_HERE = "Pyro", "Pyro, freed memory kept"
Contestant = Callable[[], Any]


def program() -> nn.Module:
    """The untrained VAE; what an evaluation costs does not depend on its weights."""
    nets = {"name": "mlp", "hidden": HIDDEN, "activation": "tanh"}
    return pv.build("mlp", "diagonal", SHAPE, latent_dim=LATENTS, decoder=nets, encoder=nets)


def observations(num_images: int) -> Tensor:
    """Binary pixels, a fifth of them on."""
    return (torch.rand(num_images, *SHAPE, generator=generator(0)) < 0.2).float()


def compiled(vae: nn.Module, x: Tensor, num_samples: int) -> Contestant | None:
    """All passes of :func:`log_likelihood` by one graph, compiled beforehand; None where it cannot be."""
    images, samples = block_shape(x, num_samples)
    bound = OfProgram(vae, weigh)

    def function(tensors: dict[str, Tensor], block: Tensor) -> Any:
        return bound.at(tensors, block, None, samples)

    try:
        graph = capture(function, (bound.tensors(), x[:images]))
    except Uncapturable as error:
        print(f"no compiled pass: {error}", file=sys.stderr)
        return None

    def run() -> None:
        for first in range(0, len(x), images):
            parts = [graph(bound.tensors(), x[first : first + images])[0] for _ in range(0, num_samples, samples)]
            estimate(torch.cat(parts))

    return run


def floor(num_draws: int, chunk: int) -> Contestant:
    """The matrix products, the activations, softplus and its sum, into memory that is there already."""
    sizes = [LATENTS, *HIDDEN, 784]
    weights = [torch.randn(a, b, generator=generator(i)) / a**0.5 for i, (a, b) in enumerate(itertools.pairwise(sizes))]
    z = torch.randn(chunk, LATENTS, generator=generator(9))
    outs = [torch.empty(chunk, b) for b in sizes[1:]]

    def run() -> None:
        with torch.no_grad():
            for _ in range(0, num_draws, chunk):
                h = z
                for weight, out in zip(weights[:-1], outs[:-1], strict=True):
                    h = torch.mm(h, weight, out=out).tanh_()
                torch.nn.functional.softplus(torch.mm(h, weights[-1], out=outs[-1])).sum(-1)

    return run


def pyro_weights(vae: nn.Module, x: Tensor, num_samples: int, chunk: int, around: Callable[[], Any]) -> Contestant:
    """Pyro's ``vectorized_importance_weights``, image by image."""

    def run() -> None:
        with around():
            for i in range(len(x)):
                for _ in range(0, num_samples, chunk):
                    vectorized_importance_weights(
                        vae.model, vae.guide, x[i : i + 1], num_samples=chunk, max_plate_nesting=1, normalized=False
                    )

    return run


def fastest_pyro(vae: nn.Module, x: Tensor, num_samples: int, around: Callable[[], Any]) -> tuple[int, Contestant]:
    """Pyro at the chunk size that suits it best."""
    sizes = [c for c in PYRO_CHUNKS if c <= num_samples]
    return fastest({c: pyro_weights(vae, x, num_samples, c, around) for c in sizes})


def pyro_alone(num_images: int, num_samples: int) -> Callable[[Turn], Any]:
    """Pyro as it comes, in a process where nothing of ours is set."""

    def train(turn: Turn) -> None:
        chunk, run = fastest_pyro(program(), observations(num_images), num_samples, torch.no_grad)
        while not turn(float(chunk)):
            run()

    return train


def pythae_nll(x: Tensor, num_samples: int) -> Contestant | None:
    """pythae's ``get_nll`` with networks of the same sizes, at its own batch size; None where pythae is not installed."""
    try:
        from pythae.models import VAE, VAEConfig
        from pythae.models.base.base_utils import ModelOutput
        from pythae.models.nn import BaseDecoder, BaseEncoder
    except ImportError:
        return None

    def layers(sizes: list[int]) -> nn.Sequential:
        pairs = itertools.pairwise(sizes)
        return nn.Sequential(*(part for a, b in pairs for part in (nn.Linear(a, b), nn.Tanh())))

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers([784, *HIDDEN])
            self.mean, self.log_variance = nn.Linear(HIDDEN[-1], LATENTS), nn.Linear(HIDDEN[-1], LATENTS)

        def forward(self, x: Tensor) -> Any:
            h = self.layers(x.flatten(1))
            return ModelOutput(embedding=self.mean(h), log_covariance=self.log_variance(h))

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers([LATENTS, *HIDDEN])
            self.out = nn.Linear(HIDDEN[-1], 784)

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=torch.sigmoid(self.out(self.layers(z))).reshape(-1, *SHAPE))

    config = VAEConfig(input_dim=SHAPE, latent_dim=LATENTS, reconstruction_loss="bce")
    model = VAE(config, encoder=Encoder(), decoder=Decoder()).eval()

    def run() -> None:
        with torch.no_grad():
            model.get_nll(x, n_samples=num_samples)

    return run


def fastest(contestants: dict[int, Contestant]) -> tuple[int, Contestant]:
    """The chunk size that takes the least time, of two tries each after a warm-up, and what runs at it."""
    times = dict.fromkeys(contestants, float("inf"))
    for attempt in range(3):
        for size, run in contestants.items():
            seconds = timed(run)[0]
            if attempt:
                times[size] = min(times[size], seconds)
    best = min(times, key=lambda size: times[size])
    return best, contestants[best]


def timed(run: Contestant) -> tuple[float, float]:
    """Seconds on the clock and of all processors."""
    begin = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


def peak_memory(num_samples: int) -> dict[str, float]:
    """Of one evaluation of 20 images in a process of its own: MB above what program and data hold, and seconds."""
    here = str(Path(__file__).parent)
    script = f"import sys; sys.path.insert(0, {here!r}); import importance_weights as b; b.measure({num_samples})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(num_samples: int) -> None:
    """Print the growth of the peak resident set over an evaluation, in MB, as JSON."""
    warnings.simplefilter("ignore", UnreliableEstimateWarning)
    vae, x = program(), observations(MEMORY_IMAGES)
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    clear.write_text("5")  # the peak is now what is held now
    read = lambda key: next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key))  # noqa: E731
    before, begin = read("VmRSS:"), time.perf_counter()
    pv.log_likelihood(vae, x, num_samples=num_samples)
    print(json.dumps({"peak_mb": (read("VmHWM:") - before) / 1024, "seconds": time.perf_counter() - begin}))


def main() -> None:
    """Time, weigh, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pyro-alone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--whole", type=int, default=0, metavar="IMAGES")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    args = parser.parse_args()
    warnings.simplefilter("ignore", UnreliableEstimateWarning)
    if args.pyro_alone:
        serve(lambda: pyro_alone(args.images, args.samples))
        return

    vae, x, draws = program(), observations(args.images), args.images * args.samples
    floor_chunk, floor_run = fastest({c: floor(draws, c) for c in FLOOR_CHUNKS})
    pyro_chunk, pyro_run = fastest_pyro(vae, x, args.samples, lambda: evaluating(vae))
    settings = ["--pyro-alone", "--images", str(args.images), "--samples", str(args.samples)]
    pyro = Worker(Path(__file__), settings, {}, cores(torch.get_num_threads()))
    found = {
        OURS: lambda: pv.log_likelihood(vae, x, num_samples=args.samples, compile="off"),
        COMPILED: compiled(vae, x, args.samples),
        FLOOR: floor_run,
        PYRO_HERE: pyro_run,
        PYTHAE: pythae_nll(x, args.samples),
    }
    contestants = {name: run for name, run in found.items() if run is not None}
    for run in contestants.values():
        run()
    load_before = os.getloadavg()[0]
    rounds = []
    for _ in range(args.rounds):
        rounds.append({name: timed(run) for name, run in contestants.items()})
        turn = pyro.turn()
        rounds[-1][PYRO] = turn["seconds"], turn["cpu_seconds"]
    pyro.stop()
    names = [*contestants, PYRO]
    figures: dict[str, Any] = {
        "samples_per_second": {n: statistics.median(draws / r[n][0] for r in rounds) for n in names},
        "samples_per_cpu_second": {n: statistics.median(draws / r[n][1] for r in rounds) for n in names},
        "ratios": {
            f"{ours} / {other}": [statistics.median(r[other][i] / r[ours][i] for r in rounds) for i in (0, 1)]
            for ours in (OURS, COMPILED)
            if ours in contestants
            for other in (FLOOR, PYRO, PYRO_HERE, PYTHAE)
            if other in names
        },
        "floor_chunk": floor_chunk,
        "pyro_chunk": int(turn["loss"]),
        "pyro_here_chunk": pyro_chunk,
        "load_average": [load_before, os.getloadavg()[0]],
        **{k: v for k, v in vars(args).items() if k != "memory"},
        "seconds": rounds,
    }
    if args.whole:
        many = observations(args.whole)
        figures["whole_seconds"] = timed(lambda: pv.log_likelihood(vae, many, num_samples=args.samples))[0]
    if args.memory:
        figures["memory"] = {k: peak_memory(k) for k in MEMORY_SAMPLES}
    table = report(figures)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "importance_weights.json").write_text(json.dumps(figures, indent=2) + "\n")
    (RESULTS / "importance_weights.md").write_text(table + "\n")
    print(table)


def report(f: dict[str, Any]) -> str:
    """The tables as Markdown."""
    speed, cpu, ratios = f["samples_per_second"], f["samples_per_cpu_second"], f["ratios"]

    def ratio(ours: str, name: str) -> str:
        found = ratios.get(f"{ours} / {name}")
        return "" if found is None else f"{found[0]:.2f} ({found[1]:.2f})"

    lines = [
        f"{f['images']} MNIST-shaped images, K = {f['samples']:,}, decoder 50-200-200-784; medians of {f['rounds']} interleaved "
        "rounds; ratios are paired within a round, by the clock (and by CPU time).",
        "",
        f"| | samples per second | per CPU second | {OURS} is so many times as fast | {COMPILED} |",
        "|---|---|---|---|---|",
        *(f"| {n} | {speed[n]:,.0f} | {cpu[n]:,.0f} | {ratio(OURS, n)} | {ratio(COMPILED, n)} |" for n in speed),
        "",
        f"The floor is matrix products, activations and softplus alone, {f['floor_chunk']:,} draws at once; Pyro is its "
        f"`vectorized_importance_weights`, {f['pyro_chunk']:,} samples at once, in a process of its own as it comes, and with "
        f"our setting of the C library ({f['pyro_here_chunk']:,} at once); pythae is its `get_nll` at its own batch size.",
    ]
    if "whole_seconds" in f:
        lines += [
            "",
            f"`pv.log_likelihood` on {f['whole']:,} images: {f['whole_seconds'] / 60:.1f} minutes, compiling included.",
        ]
    if PYTHAE not in speed:
        lines += ["", "pythae is not installed."]
    if "memory" in f:
        lines += [
            "",
            f"Peak memory above model and data, {MEMORY_IMAGES} images (budget {BUDGET_MB} MB):",
            "",
            "| K | " + " | ".join(f"{int(k):,}" for k in f["memory"]) + " |",
            "|---|" + "---|" * len(f["memory"]),
            "| MB | " + " | ".join(f"{m['peak_mb']:.0f}" for m in f["memory"].values()) + " |",
        ]
    before, after = f["load_average"]
    lines += [
        "",
        f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} thread(s) used, load average {before:.1f} "
        f"before and {after:.1f} after: where it is above the threads used, other work disturbed the timings. PyTorch "
        f"{torch.__version__}, Python {platform.python_version()}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
