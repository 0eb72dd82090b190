"""Importance-weighted log-likelihood of any Program.

    log p(x) = log E_{z ~ q(z|x)} [ p(x, z) / q(z | x) ]  >=  E log (1/K) sum_k p(x, z_k) / q(z_k | x)

Burda, Grosse & Salakhutdinov 2016, Importance Weighted Autoencoders, https://arxiv.org/abs/1509.00519.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from pyro_vae.capture import Captured, CaptureWarning, Uncapturable, capture
from pyro_vae.errors import warn
from pyro_vae.evaluation import consistency
from pyro_vae.evaluation.adaptive import PILOT, adaptive
from pyro_vae.evaluation.blind import blind_spots, discrete_sites, require_weights
from pyro_vae.evaluation.consistency import latents_have_densities
from pyro_vae.evaluation.enumeration import summed
from pyro_vae.evaluation.every_row import look_for_points
from pyro_vae.evaluation.methods import ImportanceSampling
from pyro_vae.evaluation.proof import proven
from pyro_vae.evaluation.quasi import SobolNoise, length_of
from pyro_vae.evaluation.result import LogLikelihood, UnreliableEstimateWarning
from pyro_vae.evaluation.rounding import rounding_error
from pyro_vae.evaluation.weights import Weighed, joined, reduced, weigh
from pyro_vae.precision import products, require_precision
from pyro_vae.programs.door import admitted, door
from pyro_vae.programs.functional import OfProgram
from pyro_vae.programs.states import joint_states
from pyro_vae.programs.trace import Program, device_of, dtype_of, latent_sites
from pyro_vae.programs.walk import Block, Walk, at_once, spans
from pyro_vae.seeding import derive_seed, seeded

WORTH_COMPILING = 10_000_000  # draws: what a graph saves on them is about what it takes to compile it


@door()
def log_likelihood(
    program: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    num_samples: int = 5000,
    target_se: float | None = None,
    seed: int = 0,
    chunk_size: int | None = None,
    compile: str = "auto",
    precision: str = "full",
    noise: str = "random",
    progress: Callable[[int], None] | None = None,
) -> LogLikelihood:
    """Log p(x) of every row of x, by importance sampling from the guide.

    The work is cut into fixed blocks of images and samples, each seeded from (seed, first image, first sample): a
    row's estimate depends on its place in x, and on nothing that was drawn before. Dropout is off. Where a process group is
    joined (``torchrun``), every process calls this alike, computes its share of the blocks and gets the whole result. A block
    that finds no memory is drawn anew with half as many samples, or images, at once.

    Where all latents are discrete and have at most 1,024 joint values, log p(x) is summed over these instead of drawn: it is
    exact (``states`` in the result), its error 0, and Pareto k -inf. Other discrete latents, and a guide of a support within
    the model's, have states that no draw tells of: the result warns of them, with what to do.

    Args:
        program: any Program, on its device.
        x: data ``(N, *event)`` as the program sees it (binarized, if its likelihood is).
        y: what a conditional program is conditioned on, ``(N, ...)``.
        num_samples: K, joint draws of all latents per image.
        target_se: nats; a pilot of 250 draws decides how many draws of its own an image gets for a standard error of about
            that (250, 500, 1,000, ..., at most K), which stand in the result's ``draws``. Only these are reported, so that the
            estimate is as right as with a number fixed in advance; the error comes down to the target for most images
            (:mod:`pyro_vae.evaluation.adaptive`). By default all get K.
        seed: of the draws; torch's generators are put back.
        chunk_size: images times samples in one pass, recorded in the result; by default so many that the observed
            site holds about a million elements.
        compile: ``on`` compiles a pass into one graph, ``auto`` does from 10 million draws on, ``off`` never does; the law of
            the estimate is the same, and on a CPU the random numbers too.
        precision: ``full``, or for speed ``tf32`` or ``bf16`` products (:mod:`pyro_vae.precision`); what they cost in nats,
            against float64 on 16 of the images, stands in the result.
        noise: of the guide's normal and uniform draws: ``random``, or ``sobol`` for 16 randomisations of a Sobol sequence, from
            which the error is found (:mod:`pyro_vae.evaluation.quasi`); a smaller error, most so where latents are few;
            uncompiled, and not to be had together with ``target_se``.
        progress: called with the number of images after every block.

    Returns:
        The per-image estimates and their diagnostics.

    Raises:
        UserError: x outside the likelihood's support (grey values under a Bernoulli), NaN that the program has no density for, no
            rows; a program that breaks the contract; a guide with a site of no density (a Delta, a point estimate).

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.build("ppca", "linear", (3,), latent_dim=2)
        >>> result = pv.log_likelihood(vae, torch.zeros(4, 3), num_samples=100)
        >>> result.log_likelihood.shape, result.num_samples
        (torch.Size([4]), 100)
    """
    how = ImportanceSampling(num_samples, target_se, seed, chunk_size, compile, precision, noise)
    traces = admitted()
    require_weights(traces)
    require_precision(precision, device_of(program), dtype_of(program))
    states = joint_states(latent_sites(traces.model))
    against = [] if states is not None else blind_spots(program, x, y, traces, len(x) * num_samples)
    proof = None if states is not None else proven(program, x, y, traces)
    images, samples = block_shape(x, num_samples if target_se is None else min(num_samples, PILOT), chunk_size)
    draws = Draws(program, how, samples, compiled=wants_compiling(how, len(x), device_of(program)))
    walk = Walk(program, x, y, rows=images, draws=samples, shared=True, progress=progress)
    for block in walk:
        with block, products(precision):
            if states is not None:
                walk.keep(summed(program, block.x, block.y, states, walk.draws, num_samples, precision))
            elif target_se is not None and num_samples > PILOT:
                walk.keep(adaptive(draws, block, walk.draws, num_samples, target_se))
            else:
                walk.keep(reduced(draws(block, num_samples, walk.draws), draws.length or 1))
    found = joined(walk.gathered())
    if states is None and discrete_sites(traces):
        found["khat"] = torch.full_like(found["khat"], math.nan)  # it would see the states alone that were drawn
    if proof is not None and bool((equal := torch.isneginf(found["khat"])).any()):
        some = equal.to(x.device)
        points = look_for_points(program, x[some], None if y is None else y[equal.to(y.device)])
        against += [line for line in points if not any("all one number" in known for known in against)]
        if not proof.reaches:  # of a guide that is exact, or misses the same in all draws
            found["khat"][equal] = math.nan
    if target_se is None or states is not None:
        del found["draws"]  # all got num_samples
    result = LogLikelihood(
        **found,
        target_se=target_se,
        num_samples=num_samples,
        seed=seed,
        chunk_size=walk.rows * walk.draws,
        precision=precision,
        rounding_error=None if precision == "full" else rounding_error(program, x, y, precision, seed),
        noise=noise,
        states=None if states is None else len(next(iter(states.values()))),
        blind_spots=against,
        proof=proof,
    )
    kl = result.kl if latents_have_densities(traces) else None
    claims = consistency.of_likelihood(result.elbo, result.log_likelihood - result.bias, kl)
    result = replace(result, forbidden=consistency.forbidden(claims))
    consistency.tell(result.forbidden)
    for message in result.warnings:
        warn(message, UnreliableEstimateWarning)
    return result


def block_shape(x: Tensor, num_samples: int, chunk_size: int | None = None) -> tuple[int, int]:
    """Images and samples in one pass; all samples of an image are drawn before the next block of images begins."""
    if chunk_size is None:
        chunk_size = at_once("importance weights", math.prod(x.shape[1:]), 64)
    passes = math.ceil(num_samples / chunk_size)
    samples = math.ceil(num_samples / passes)
    return max(1, min(len(x), chunk_size // samples)), samples


def wants_compiling(how: ImportanceSampling, num_rows: int, device: torch.device) -> bool:
    """Whether to compile a pass: as asked, or where the number of draws repays the time it takes."""
    if how.noise == "sobol" and how.compile == "on":
        warn("evaluating uncompiled: Sobol noise is not made in graphs", CaptureWarning)
    if (
        how.noise == "sobol" or how.target_se is not None
    ):  # with a target, images that get as many draws are not as many
        return False
    worth = device.type in ("cpu", "cuda") and num_rows * how.num_samples >= WORTH_COMPILING
    return how.compile == "on" or (how.compile == "auto" and worth)


class Draws:
    """Weights of draws from the guide, by one compiled graph of ``samples`` draws where that is wanted and can be.

    Attributes:
        seed: of the draws.
        length: draws in a row that depend on each other, where noise is Sobol's; None where they are independent.
    """

    def __init__(self, program: Program, how: ImportanceSampling, samples: int, *, compiled: bool = False) -> None:
        self.program, self.samples, self.precision, self.wanted = program, samples, how.precision, compiled
        self.seed = how.seed
        self.length = length_of(how.num_samples) if how.noise == "sobol" else None
        self.bound = OfProgram(program, weigh)
        self.graph: Captured | None = None
        self.leaves: list[Tensor] = []  # the program's tensors

    def __call__(
        self,
        block: Block,
        num_samples: int,
        at_once: int,
        *,
        seeds: Callable[[int], int] | None = None,
        rows: Tensor | None = None,
    ) -> list[Weighed]:
        """What :func:`weigh` returns of ``num_samples`` draws of a block, or of some of its ``rows``, in parts.

        Args:
            block: rows of data, which is entered.
            num_samples: draws of each row.
            at_once: of which in one pass.
            seeds: of a part, by its first draw.
            rows: their places in the block; None for all.
        """
        x, y = block.x, block.y
        if rows is not None and len(rows) < len(block):
            x, y = x[rows], None if y is None else y[rows]
        found = []
        for part in spans(num_samples, at_once):
            first, number = part.start, part.stop - part.start
            seed = derive_seed("importance weights", self.seed, block.first, first) if seeds is None else seeds(first)
            even = SobolNoise(self.seed, block.first, first, number, self.length) if self.length else nullcontext()
            with seeded(seed, x.device), even:
                found.append(self._pass(x, y, number))
        return found

    def _pass(self, x: Tensor, y: Tensor | None, num_samples: int) -> Weighed:
        """One pass, compiled where it can be; a last one of another shape is not worth a graph of its own."""
        if self.wanted and self.graph is None:
            self._compile(x, y)
        if self.graph is not None and (changed := self._stale()) is not None:
            self.graph = None
            warn(f"evaluating goes on uncompiled: {changed} while the program was evaluated", CaptureWarning)
        args = [*self.leaves, x] if y is None else [*self.leaves, x, y]
        if self.graph is not None and num_samples == self.samples and self.graph.fits(args):
            with torch.no_grad():
                log_weight, log_likelihood, kl, size = self.graph.flat(args)
            return log_weight, log_likelihood, kl, size
        return weigh(self.program, x, y, num_samples, self.precision)

    def _stale(self) -> str | None:
        """What has changed since the graph was recorded (``progress`` may have changed it), as a clause; None where nothing."""
        if self.graph is None or (changed := self.graph.stale()) is not None:
            return None if self.graph is None else changed
        now = list(self.bound.tensors().values())
        same = len(now) == len(self.leaves) and all(
            a.data_ptr() == b.data_ptr() and a.shape == b.shape for a, b in zip(now, self.leaves, strict=True)
        )
        return None if same else "a parameter or buffer was replaced"

    def _compile(self, x: Tensor, y: Tensor | None) -> None:
        self.wanted = False

        def function(tensors: dict[str, Tensor], x: Tensor, y: list[Tensor]) -> Weighed:
            return self.bound.at(tensors, x, y[0] if y else None, self.samples, self.precision)

        tensors = self.bound.tensors()
        self.leaves = list(tensors.values())
        try:
            self.graph = capture(function, (tensors, x, [] if y is None else [y]), self.bound.program)
        except Uncapturable as error:
            warn(f"evaluating uncompiled: {error}", CaptureWarning)
