"""Who trains a VAE in benchmarks/training.py: the same networks, objective, data and Adam, in PyTorch.

Run by that script, one process each: ``python contestants.py NAME SIZE DEVICE ROWS THREADS``. Those in JAX are in
contestants_jax.py, those of deeper models in contestants_deep.py. An epoch visits every row once in a new order, gathering each
minibatch from the data in memory.
"""

from __future__ import annotations

import itertools
import math
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from turns import LeftOut, Turn, serve

LR, MIN_SCALE, SHAPE, PIXELS = 1e-3, 1e-6, (1, 28, 28), 784


@dataclass(frozen=True)
class Size:
    """One of the sizes that are compared: encoder 784-hidden-2 latents, decoder latents-hidden reversed-784."""

    batch: int
    hidden: tuple[int, ...]
    latents: int
    gated: bool = False
    particles: int = 1
    only_on: str | None = None

    @property
    def label(self) -> str:
        """How a table names it."""
        nets = "-".join(map(str, [PIXELS, *self.hidden, self.latents, *self.hidden[::-1], PIXELS]))
        what = f"gated, IWAE K = {self.particles}" if self.gated else "tanh, ELBO"
        return f"batch {self.batch:,}, {nets}, {what}"

    @property
    def encoder(self) -> list[tuple[int, int]]:
        """Fan-in and fan-out of its hidden layers."""
        return list(itertools.pairwise([PIXELS, *self.hidden]))

    @property
    def decoder(self) -> list[tuple[int, int]]:
        """Likewise."""
        return list(itertools.pairwise([self.latents, *self.hidden[::-1]]))

    def products(self) -> list[tuple[int, int, int, bool]]:
        """Every layer as (rows, fan-in, fan-out, whether a gradient flows on to its input); gate and value are one."""
        twice = 2 if self.gated else 1
        rows = self.batch * self.particles
        layers = [(self.batch, i, twice * o, i != PIXELS) for i, o in self.encoder]
        layers.append((self.batch, self.hidden[-1], 2 * self.latents, True))
        layers += [(rows, i, twice * o, True) for i, o in self.decoder]
        return [*layers, (rows, self.hidden[0], PIXELS, True)]


SIZES = {
    "20": Size(20, (200,), 50),
    "100": Size(100, (200,), 50, only_on="cuda"),
    "128": Size(128, (400,), 50),
    "mnist": Size(128, (500, 500), 40, only_on="whole_run.py"),  # of `pyro-vae train mnist`
    "1024": Size(1024, (300, 300), 40, gated=True, particles=5),
}


def binary_images(rows: int) -> np.ndarray:
    """Binary pixels with ten independent causes, float32 ``(rows, 784)``: the same in every process."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((10, PIXELS), dtype=np.float32)
    images = np.empty((rows, PIXELS), np.float32)
    for first in range(0, rows, 1000):
        part = images[first : first + 1000]
        logits = rng.standard_normal((len(part), 10), dtype=np.float32) @ weight - 2
        part[:] = rng.random(part.shape, dtype=np.float32) < 1 / (1 + np.exp(-logits))
    return images


def ours(size: Size, device: str, rows: int, compile: str) -> Callable[[Turn], Any]:
    """``pv.fit`` itself: an epoch is a turn, and its callback waits for the next."""
    import torch

    import pyro_vae as pv
    from pyro_vae.capture import CaptureWarning

    warnings.simplefilter("error", CaptureWarning)
    nets = {"name": "gated-mlp"} if size.gated else {"name": "mlp", "activation": "tanh"}
    encoder, decoder = {**nets, "hidden": list(size.hidden)}, {**nets, "hidden": list(size.hidden[::-1])}
    vae = pv.build("mlp", "diagonal", SHAPE, latent_dim=size.latents, encoder=encoder, decoder=decoder)
    x = torch.from_numpy(binary_images(rows)).reshape(-1, *SHAPE)
    objective = f"iwae:num_particles={size.particles}" if size.particles > 1 else "elbo"
    settings: dict[str, Any] = {"lr": LR, "schedule": "constant", "average": None, "objective": objective}

    def train(turn: Turn) -> None:
        try:
            pv.fit(
                vae, x, epochs=1_000_000, batch_size=size.batch, device=device, compile=compile, seed=0,
                callback=lambda metrics: turn(metrics["train_loss"]), **settings,
            )  # fmt: skip
        except CaptureWarning as warning:
            raise LeftOut(str(warning)) from warning

    return train


def modules(size: Size) -> tuple[Any, Any]:
    """Encoder and decoder as one writes them in PyTorch, begun as ours are."""
    import torch
    from torch import nn

    def linear(fan_in: int, fan_out: int) -> nn.Linear:
        layer = nn.Linear(fan_in, fan_out)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer

    class Gate(nn.Module):
        def __init__(self, fan_in: int, fan_out: int) -> None:
            super().__init__()
            self.value, self.gate = linear(fan_in, fan_out), linear(fan_in, fan_out)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.value(x) * self.gate(x).sigmoid()

    def hidden(layers: list[tuple[int, int]]) -> list[nn.Module]:
        if size.gated:
            return [Gate(i, o) for i, o in layers]
        return [part for i, o in layers for part in (linear(i, o), nn.Tanh())]

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = nn.Sequential(*hidden(size.encoder)), linear(size.hidden[-1], 2 * size.latents)
            with torch.no_grad():
                self.head.bias[size.latents :] = math.log(math.expm1(1.0))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            loc, raw = self.head(self.layers(x)).chunk(2, -1)
            return loc, nn.functional.softplus(raw) + MIN_SCALE

    decoder = nn.Sequential(*hidden(size.decoder), linear(size.hidden[0], PIXELS))
    return Encoder(), decoder


def by_hand(size: Size, device: str, rows: int, compile: bool) -> Callable[[Turn], Any]:
    """The loop that one writes, with fused Adam; the loss under ``torch.compile`` or not."""
    import torch
    import torch.nn.functional as F

    encoder, decoder = (m.to(device) for m in modules(size))
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=LR, fused=True)
    data = torch.from_numpy(binary_images(rows)).to(device)

    def objective(x: torch.Tensor) -> torch.Tensor:
        loc, scale = encoder(x)
        noise = torch.randn(size.particles, *loc.shape, device=x.device)
        z = loc + scale * noise
        log_p_x = -F.softplus((1 - 2 * x) * decoder(z)).sum(-1)
        log_weight = log_p_x + (0.5 * (noise.square() - z.square()) + scale.log()).sum(-1)
        return (
            -(log_weight.logsumexp(0) - math.log(size.particles)).mean() if size.particles > 1 else -log_weight.mean()
        )

    loss_of = objective
    if compile:
        loss_of = torch.compile(objective, mode="reduce-overhead" if device == "cuda" else "default")

    def train(turn: Turn) -> None:
        while True:
            total = torch.zeros((), device=device)
            order = torch.randperm(rows, device=device).split(size.batch)
            for batch in order:
                loss = loss_of(data[batch])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total += loss.detach()
            if turn(float(total) / len(order)):
                return

    return train


def pyro_svi(size: Size, device: str, rows: int, jit: bool) -> Callable[[Turn], Any]:
    """Pyro's own ``SVI.step``, its validation off; ``RenyiELBO`` with alpha = 0 is its IWAE."""
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import SVI, JitTrace_ELBO, RenyiELBO, Trace_ELBO

    if jit and size.particles > 1:
        raise LeftOut("Pyro has no jit form of its importance-weighted bound")
    pyro.enable_validation(False)
    encoder, decoder = (m.to(device) for m in modules(size))

    def model(x: torch.Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(x.new_zeros(size.latents), x.new_ones(size.latents)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(*encoder(x)).to_event(1))

    if size.particles > 1:
        elbo: Any = RenyiELBO(alpha=0, num_particles=size.particles, max_plate_nesting=1, vectorize_particles=True)
    else:
        elbo = JitTrace_ELBO(ignore_jit_warnings=True) if jit else Trace_ELBO()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": LR}), elbo)
    data = torch.from_numpy(binary_images(rows)).to(device)

    def train(turn: Turn) -> None:
        while True:
            order = torch.randperm(rows, device=device).split(size.batch)
            total = sum(svi.step(data[batch]) for batch in order)
            if turn(float(total) / rows):
                return

    return train


def pythae_trainer(size: Size, device: str, rows: int) -> Callable[[Turn], Any]:
    """pythae's ``BaseTrainer.train_step``, which is an epoch, of its ``VAE`` or ``IWAE``."""
    import torch
    from pythae.data.datasets import BaseDataset
    from pythae.models import IWAE, VAE, IWAEConfig, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    encoder, decoder = modules(size)

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = encoder.layers, encoder.head
            torch.nn.init.zeros_(self.head.bias)  # log-variances: scales begin at 1

        def forward(self, x: torch.Tensor) -> Any:
            loc, log_variance = self.head(self.layers(x.flatten(1))).chunk(2, -1)
            return ModelOutput(embedding=loc, log_covariance=log_variance)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = decoder

        def forward(self, z: torch.Tensor) -> Any:
            return ModelOutput(reconstruction=self.layers(z).sigmoid().reshape(-1, *SHAPE))

    about: dict[str, Any] = {"input_dim": SHAPE, "latent_dim": size.latents, "reconstruction_loss": "bce"}
    if size.particles > 1:
        model = IWAE(IWAEConfig(number_samples=size.particles, **about), encoder=Encoder(), decoder=Decoder())
    else:
        model = VAE(VAEConfig(**about), encoder=Encoder(), decoder=Decoder())
    x = torch.from_numpy(binary_images(rows)).reshape(-1, *SHAPE)
    folder = tempfile.TemporaryDirectory()
    trainer = BaseTrainer(
        model,
        BaseDataset(x, torch.zeros(rows)),
        training_config=BaseTrainerConfig(
            output_dir=folder.name,
            per_device_train_batch_size=size.batch,
            learning_rate=LR,
            no_cuda=device == "cpu",
        ),
    )
    trainer.prepare_training()

    def train(turn: Turn) -> None:
        with folder:
            for epoch in itertools.count(1):
                if turn(trainer.train_step(epoch)):
                    return

    return train


def torch_floor(size: Size, device: str, rows: int) -> Callable[[Turn], Any]:
    """The matrix products of every layer and of both its gradients, into memory that is there already; nothing else."""
    import torch

    parts = []
    for n, i, o, flows in size.products():
        x, dy, w = (torch.randn(*s, device=device) for s in ((n, i), (n, o), (i, o)))
        parts.append((x, dy, w, torch.empty_like(dy), torch.empty_like(w), torch.empty_like(x) if flows else None))

    def step() -> None:
        for x, dy, w, y, dw, dx in parts:
            torch.mm(x, w, out=y)
            torch.mm(x.T, dy, out=dw)
            if dx is not None:
                torch.mm(dy, w.T, out=dx)

    run: Callable[[], None] = step
    if device == "cuda":
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay

    def train(turn: Turn) -> None:
        with torch.no_grad():
            while True:
                for _ in range(rows // size.batch):
                    run()
                if device == "cuda":
                    torch.cuda.synchronize()
                if turn(None):
                    return

    return train


def make(name: str, size: Any, device: str, rows: int, threads: int) -> Callable[[Turn], Any]:
    """A contestant by name, in a process of that many threads."""
    of = CONTESTANTS
    if name in (NUMPYRO, FLOORS[1]):
        import contestants_jax

        of = contestants_jax.CONTESTANTS if isinstance(size, Size) else contestants_jax.DEEP
    else:
        import torch

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        if not isinstance(size, Size):
            import contestants_deep

            of = contestants_deep.CONTESTANTS
    if name not in of:
        raise LeftOut("it is not written for this model")
    return of[name](size, device, rows)


PLAIN, COMPILED = "pv.fit, plain", "pv.fit, compiled"
FLOORS = ("products, PyTorch", "products, XLA")
NUMPYRO = "NumPyro, jit over scan"
CONTESTANTS: dict[str, Callable[..., Callable[[Turn], Any]]] = {
    COMPILED: lambda *a: ours(*a, compile="on"),
    PLAIN: lambda *a: ours(*a, compile="off"),
    "Pyro SVI": lambda *a: pyro_svi(*a, jit=False),
    "Pyro SVI, jit": lambda *a: pyro_svi(*a, jit=True),
    "PyTorch by hand": lambda *a: by_hand(*a, compile=False),
    "PyTorch by hand, torch.compile": lambda *a: by_hand(*a, compile=True),
    "pythae trainer": pythae_trainer,
    FLOORS[0]: torch_floor,
}


if __name__ == "__main__":
    _, who, which, where, how_many, with_threads = sys.argv
    from contestants_deep import DEEP

    serve(lambda: make(who, {**SIZES, **DEEP}[which], where, int(how_many), int(with_threads)))
