"""What every process of tests/test_distributed.py runs under torchrun (OUT [CASE ...]); the first prints one JSON object."""

from __future__ import annotations

import atexit
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import by_hand
import torch
from record_programs import M2, m2_data
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import registry
from pyro_vae.programs.columns import packed
from pyro_vae.programs.contract import admit
from pyro_vae.programs.trace import dtype_of
from pyro_vae.seeding import generator, seeded
from pyro_vae.training.distributed import ALONE, Ranks, join
from pyro_vae.training.fit import _objective
from pyro_vae.training.loop import Trainer
from pyro_vae.training.settings import Settings
from pyro_vae.training.source import make_source

BATCH = 8  # four rows for each of two processes: as many as there are latents, on purpose
GUIDES = {
    "diagonal": {"posterior": "diagonal-normal"},
    "low rank": {"posterior": "low-rank-normal"},
    "spline flow": {"posterior": "spline-flow:hidden=[8],layers=1"},
    "sphere": {"posterior": "power-spherical", "prior": "hypersphere-uniform"},
    "relaxed bits": {"posterior": "relaxed-bernoulli", "prior": "bernoulli"},
    "vamp": {"prior": "vamp:components=5"},
}


class Dropping(nn.Module):
    """A program with dropout, and a gamma latent whose draws depend on its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 8))
        self.decoder = nn.Linear(4, 6)

    def model(self, x: Tensor) -> None:
        import pyro
        import pyro.distributions as dist

        with pyro.plate("data", x.shape[0], dim=-1):
            one = x.new_ones(4)
            z = pyro.sample("z", dist.Gamma(one, one).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        import pyro
        import pyro.distributions as dist

        with pyro.plate("data", x.shape[0], dim=-1):
            a, b = (nn.functional.softplus(self.encoder(x)) + 0.1).chunk(2, -1)
            pyro.sample("z", dist.Gamma(a, b).to_event(1))


def gradients(program: Any, data: Any, objective: str, ranks: Ranks) -> dict[str, Tensor]:
    """The gradients of one step on the first minibatch."""
    settings = Settings(epochs=1, batch_size=BATCH, average=None, objective=objective)
    source = make_source(data, False, torch.device("cpu"), dtype_of(program))
    trainer = Trainer(program, source, settings, _objective(settings), torch.device("cpu"), None, ranks)
    program.train()
    order = torch.arange(BATCH)
    trainer._prepare(order)
    with seeded(5):
        trainer._gradients(trainer._batch(order))
        after = torch.rand(())  # the generators are where they would be
    found = {n: p.grad.clone() for n, p in program.named_parameters() if p.grad is not None}
    return {**found, "next random number": after.double()}


def cases() -> dict[str, tuple[Any, Any, str]]:
    x = torch.rand(40, 6, generator=generator(0), dtype=torch.float64)
    digits = pv.load_data("digits")
    found: dict[str, tuple[Any, Any, str]] = {}
    for name, blocks in GUIDES.items():
        small = {"encoder": "mlp:hidden=[8]", "decoder": "mlp:hidden=[8]", "latent_dim": 4, "likelihood": "normal"}
        found[name] = pv.build("mlp", "diagonal", (6,), **{**small, **blocks}).double(), x, "elbo"
    found["digits, binarized anew"] = pv.build("mlp", "diagonal", digits, latent_dim=4).double(), digits, "elbo"
    found["as many particles as rows"] = (
        pv.build("mlp", "diagonal", digits, latent_dim=4).double(),
        digits,
        "elbo:num_particles=4",
    )
    found["a user's two layers"] = by_hand.TwoLayers(6).double(), x, "elbo:num_particles=3"
    found["dropout and gamma"] = Dropping().double(), x, "elbo"
    few = M2(), m2_data(40)
    rows = packed(*few)
    admit(few[0], rows)  # which says what is summed over
    found["records with few labels"] = few[0], rows, "elbo:label_weight=2.0"
    for name in registry.names("objectives"):
        if getattr(registry.get("objectives", name), "compares_images", False):
            continue
        try:
            found[f"objective {name}"] = pv.build("mlp", "diagonal", digits, latent_dim=4).double(), digits, name
        except pv.UserError:
            continue
    return found


def no_threads_of_gloo() -> None:
    """After the group was left: one that is still there aborts the process if it lets go of a tensor too late."""
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
    if any("gloo" in name for name in names):
        print(f"threads left behind: {names}", file=sys.stderr, flush=True)
        os._exit(3)


def main() -> None:
    atexit.register(no_threads_of_gloo)  # before the group is joined, so that it runs after it is left
    torch.manual_seed(0)
    report: dict[str, Any] = {"gradients": {}}
    ranks = join()
    report["processes"] = ranks.size
    every = cases()
    for name in sys.argv[2:] or every:
        program, data, objective = every[name]
        try:
            want = gradients(program, data, objective, ALONE)
        except pv.UserError:
            continue  # an objective that this program cannot have
        have = gradients(program, data, objective, ranks)
        worst = max(float((want[n] - have[n]).abs().max()) for n in want) if set(want) == set(have) else None
        report["gradients"][name] = worst
    vae = pv.build("mlp", "diagonal", (6,), likelihood="normal", latent_dim=4)
    x = torch.rand(50, 6, generator=generator(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shared = pv.log_likelihood(vae, x, num_samples=30, chunk_size=90)
        annealed = pv.annealed_log_likelihood(vae, x[:4], num_chains=4, num_distributions=10, chunk_size=8)
        record = m2_data(20)
        few = pv.log_likelihood(M2(), record, num_samples=30, chunk_size=300)
        given = pv.log_likelihood(M2(), record, of="image", given="label", num_samples=30, common=True)
        bounds = pv.bidirectional(vae, 4, num_chains=4, num_distributions=10, chunk_size=8)
    report["annealed"], report["gap"] = annealed.log_likelihood.tolist(), bounds.gap.tolist()
    report["records"] = [few.log_likelihood.tolist(), given.log_likelihood.tolist(), given.mc_se.tolist()]
    report["log_likelihood"] = shared.log_likelihood.tolist()
    report["khat"] = shared.khat.tolist()
    run = pv.fit(vae, x, epochs=3, batch_size=10, seed=1, out=sys.argv[1])
    report["metrics"] = [m["train_loss"] for m in run.metrics]
    if ranks.first:
        print(json.dumps(report))


main()
