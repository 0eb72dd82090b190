"""Chains along the path from prior (or guide) to posterior, and back.

Forward, with u_0 ~ f_0 and u_t from u_(t-1) by a transition that leaves f_(b_t) invariant, for 0 = b_0 < ... < b_T = 1,

    log w = sum_t (b_t - b_(t-1)) tilt(u_(t-1)),      E[w] = p(x)

and backward, from u_(T-1) ~ f_1 exactly by the reversed transitions, E[1 / w] = 1 / p(x) of the same sum.

Neal 2001, Annealed importance sampling, https://arxiv.org/abs/physics/9803008; the two directions: Grosse, Ghahramani & Adams
2015, https://arxiv.org/abs/1511.02543; on decoders: Wu, Burda, Salakhutdinov & Grosse 2017, https://arxiv.org/abs/1611.04273.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_vae.evaluation.hmc import StepSizes, adapt, transition
from pyro_vae.evaluation.methods import Annealing, rows_of_chains
from pyro_vae.evaluation.path import Path
from pyro_vae.evaluation.unconstrained import Unconstrained
from pyro_vae.programs.door import admitted, door
from pyro_vae.programs.trace import Program, device_of
from pyro_vae.programs.walk import Block, Walk
from pyro_vae.seeding import derive_seed, generator

Progress = Callable[[float], None]

WARM_UP = 20  # transitions at the hot end before the step sizes are recorded
RATE = 0.5  # of the adaptation: nats of step size per unit of acceptance
SMOOTHING = 5  # recorded step sizes averaged over so many neighbours


class Checkpoint(Protocol):
    """Where unfinished work is kept: tensors by name beside a state of plain numbers and text."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was last saved, or None."""

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Replace what was saved."""


@dataclass(frozen=True)
class Weights:
    """What the chains return, on the CPU in float64.

    Attributes:
        log_weight: forward log-weights ``(num_chains, N)``, in nats.
        reverse_log_weight: the same sums along the reverse chains, or None.
        acceptance: mean acceptance probability of the forward transitions ``(N,)``; of the reverse ones,
            ``reverse_acceptance``.
        step_size: at the posterior ``(N,)``, in units of u.
        edge: share of the draws that chains start from that numbers cannot tell from the edge of their support, ``(N,)``.
        chunk_size: images times chains in one batch.
    """

    log_weight: Tensor
    acceptance: Tensor
    step_size: Tensor
    reverse_log_weight: Tensor | None
    reverse_acceptance: Tensor | None
    edge: Tensor
    chunk_size: int


@door(scored=False, gradients=True, records=True)
def run(
    program: Program,
    x: Tensor,
    y: Tensor | None,
    how: Annealing,
    *,
    exact: dict[str, Tensor] | None = None,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
    save_every: float = 30.0,
) -> Weights:
    """Anneal every image of x, block by block: a preliminary run for the step sizes, the run itself, and back if asked.

    Every transition draws from a generator of its own, seeded from (seed, first image of the block, transition): work that
    was interrupted goes on to the same bits. Where a process group is joined (``torchrun``), every process calls this alike,
    anneals its share of the blocks and gets the whole result.

    Args:
        program: any Program with continuous latents.
        x: data ``(N, *event)``, and y ``(N, ...)`` for a conditional program.
        how: to anneal.
        exact: latents ``(N, *latent)`` by site, an exact draw from the posterior of each image: then the reverse chains
            run too.
        progress: called with images' worth of work done, a fraction at a time; adds up to N.
        checkpoint: where to keep and find unfinished work.
        save_every: seconds between two saves.
    """
    work = _Work(checkpoint, _fingerprint(program, x, y, how, exact), save_every)
    walk = Walk(
        program, x, y, rows=rows_of_chains(x, device_of(program), how.num_chains, how.chunk_size), draws=how.num_chains,
        whole=True, shared=True, begin=work.images, progress=progress,
    )  # fmt: skip
    walk.rows = work.block_images or walk.rows
    for block in walk:
        with block:
            work.begin_block(walk.rows)
            _block(how, block, exact, work)
    walk.keep(work.done)
    shares = [share for share in walk.gathered() if share]
    done = {name: torch.cat([share[name] for share in shares], -1) for name in shares[0]}
    return Weights(
        log_weight=done["forward.log_weight"],
        acceptance=done["forward.acceptance"],
        step_size=done["step_size"],
        reverse_log_weight=done.get("reverse.log_weight"),
        reverse_acceptance=done.get("reverse.acceptance"),
        edge=done["edge"],
        chunk_size=walk.rows * how.num_chains,
    )


def _block(how: Annealing, block: Block, exact: dict[str, Tensor] | None, work: _Work) -> None:
    """Adapt, go forward and, from exact draws, back; results are filed with ``work``."""
    density = Unconstrained(admitted(), block.x, block.y)
    path, exact_u = Path(density, how.num_chains, how.start), None
    if exact is not None:
        values = {name: value[block.rows].unsqueeze(0).to(block.x.device) for name, value in exact.items()}
        exact_u = density.unconstrain(values).expand(how.num_chains, -1, -1)
    total = WARM_UP + how.num_preliminary + how.num_distributions * (1 if exact is None else 2)
    report = lambda transitions: block.report(transitions / total)  # noqa: E731
    log_step = work.now.get("log_step")
    if log_step is None:
        log_step = _preliminary(path, how, block.first, report)
        work.now["log_step"] = log_step
    else:
        report(WARM_UP + how.num_preliminary)
        log_step = log_step.to(path.density.x)
    sizes = StepSizes(log_step)
    for phase, u in (("forward", None), ("reverse", exact_u)):
        if phase == "reverse" and u is None:
            continue
        if f"{phase}.log_weight" in work.now:
            report(how.num_distributions)
            continue
        log_weight, acceptance = _sweep(path, how, sizes, block.first, phase, u, work, report)
        work.now |= {f"{phase}.log_weight": log_weight.cpu(), f"{phase}.acceptance": acceptance.cpu()}
    step_size = sizes.at(torch.ones(1))[0].cpu().double()
    results = {"step_size": step_size, "edge": path.edge.cpu()}
    work.finish_block({**{k: v for k, v in work.now.items() if "." in k}, **results})


def _preliminary(path: Path, how: Annealing, first: int, report: Progress) -> Tensor:
    """Log step sizes ``(M, batch)`` at equally spaced positions, adapted while a short run cools."""
    u = path.draw(derive_seed("annealing: start of the adaptation", how.seed, first))
    positions = torch.linspace(0, 1, how.num_preliminary, dtype=torch.float64)
    betas = how.betas(positions).to(u)
    point = path(u)
    log_step = torch.full_like(u[0, :, 0], -0.25 * math.log(u.shape[-1]))
    table = []
    for t in range(-WARM_UP, len(betas)):
        random = generator("annealing: adaptation", how.seed, first, t + WARM_UP, device=u.device)
        point, probability = transition(path, point, betas[max(t, 0)], log_step.exp(), how.num_leapfrog, random)
        log_step = adapt(log_step, probability, how.target_accept, RATE)
        if t >= 0:
            table.append(log_step)
        report(1)
    wide = torch.stack(table).T.unsqueeze(1)
    padded = torch.nn.functional.pad(wide, (SMOOTHING // 2, SMOOTHING // 2), mode="replicate")
    return torch.nn.functional.avg_pool1d(padded, SMOOTHING, stride=1).squeeze(1).T.contiguous()


def _sweep(
    path: Path,
    how: Annealing,
    sizes: StepSizes,
    first: int,
    phase: str,
    exact: Tensor | None,
    work: _Work,
    report: Progress,
) -> tuple[Tensor, Tensor]:
    """Log-weights ``(chains, batch)`` and mean acceptance ``(batch,)`` of one direction, in float64."""
    last = how.num_distributions + 1
    positions = torch.linspace(0, 1, last + 1, dtype=torch.float64)
    u = path.draw(derive_seed("annealing: start", how.seed, first)) if exact is None else exact.contiguous()
    wide = torch.float64 if u.device.type != "mps" else torch.float32
    betas = how.betas(positions).to(u.dtype)
    # rise[t - 1] = b_t - b_(t-1), of the very numbers that the transitions use
    rise, betas = betas.double().diff().to(wide).to(u.device), betas.to(u.device)
    step_sizes = sizes.at(positions)
    log_weight = torch.zeros(u.shape[:2], dtype=wide, device=u.device)
    accepted = torch.zeros_like(log_weight[0])
    begin = work.step
    if begin:
        u = work.now["u"].to(u)
        log_weight, accepted = work.now["log_weight"].to(u.device), work.now["accepted"].to(u.device)
        report(begin)
    point = path(u)
    for done in range(begin, last):
        t = done + 1 if phase == "forward" else last - done
        log_weight = log_weight + rise[t - 1] * point.tilt.to(wide)
        target = t if phase == "forward" else t - 1
        if done == last - 1:
            break
        random = generator(f"annealing: {phase}", how.seed, first, done, device=u.device)
        point, probability = transition(path, point, betas[target], step_sizes[target], how.num_leapfrog, random)
        accepted = accepted + probability.mean(0)
        report(1)
        work.keep(done + 1, u=point.u, log_weight=log_weight, accepted=accepted)
    work.step = 0
    return log_weight, accepted / how.num_distributions


@dataclass
class _Work:
    """What is finished, what is under way, and when to save it."""

    checkpoint: Checkpoint | None
    fingerprint: str
    save_every: float
    images: int = 0  # finished
    block_images: int = 0  # in one block; 0 before there was one
    step: int = 0
    done: dict[str, Tensor] = field(default_factory=dict)
    now: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._saved = time.monotonic()
        found = self.checkpoint.load() if self.checkpoint is not None else None
        if found is None or found[1].get("fingerprint") != self.fingerprint:
            return
        tensors, state = found
        self.images, self.block_images, self.step = (int(state[name]) for name in ("images", "block_images", "step"))
        self.done = {k.removeprefix("done."): v for k, v in tensors.items() if k.startswith("done.")}
        self.now = {k.removeprefix("now."): v for k, v in tensors.items() if k.startswith("now.")}

    def begin_block(self, images: int) -> None:
        """What is kept of a larger block, which found no memory, is of no use."""
        if images != self.block_images:
            self.block_images, self.step, self.now = images, 0, {}

    def keep(self, step: int, **tensors: Tensor) -> None:
        """Save the chains where they stand, if it is time."""
        if self.checkpoint is not None and time.monotonic() - self._saved >= self.save_every:
            self.step = step
            self.now |= tensors
            self._save()

    def finish_block(self, results: dict[str, Tensor]) -> None:
        """File a block's results ``(..., batch)`` behind those before it."""
        self.done = {
            k: torch.cat([self.done[k], v.double()], -1) if k in self.done else v.double() for k, v in results.items()
        }
        self.images, self.step, self.now = len(self.done["step_size"]), 0, {}
        if self.checkpoint is not None:
            self._save()

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        tensors = {f"done.{k}": v for k, v in self.done.items()} | {f"now.{k}": v for k, v in self.now.items()}
        plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        counts = {"images": self.images, "block_images": self.block_images, "step": self.step}
        self.checkpoint.save(plain, {"fingerprint": self.fingerprint, **counts})
        self._saved = time.monotonic()


def _fingerprint(program: Any, x: Tensor, y: Tensor | None, how: Annealing, exact: Any) -> str:
    """What the chains depend on, in one line: work of another program, data or settings is not gone on with."""
    digest = hashlib.sha256(repr(sorted(asdict(how).items())).encode())
    tensors = [x, *([] if y is None else [y]), *(exact or {}).values(), *program.state_dict().values()]
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
