"""Importance-weighted log-likelihood of any Program.

    log p(x) = log E_{z ~ q(z|x)} [ p(x, z) / q(z | x) ]  >=  E log (1/K) sum_k p(x, z_k) / q(z_k | x)

Burda, Grosse & Salakhutdinov 2016, Importance Weighted Autoencoders, https://arxiv.org/abs/1509.00519.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_vae.capture import Captured, CaptureWarning, Uncapturable, capture
from pyro_vae.errors import UserError, nearest
from pyro_vae.evaluation import consistency
from pyro_vae.evaluation.adaptive import PILOT, adaptive
from pyro_vae.evaluation.blind import blind_spots, discrete_sites, require_weights
from pyro_vae.evaluation.chunks import Chunks
from pyro_vae.evaluation.consistency import latents_have_densities
from pyro_vae.evaluation.enumeration import summed
from pyro_vae.evaluation.quasi import NOISES, SobolNoise, length_of
from pyro_vae.evaluation.result import LogLikelihood, UnreliableEstimateWarning
from pyro_vae.evaluation.rounding import IMAGES, rounding_error
from pyro_vae.evaluation.shares import everyones, own_share
from pyro_vae.evaluation.weights import Reduced, Weighed, reduced, weigh
from pyro_vae.precision import products, require_precision
from pyro_vae.programs.contract import admit
from pyro_vae.programs.functional import OfProgram
from pyro_vae.programs.states import joint_states
from pyro_vae.programs.trace import Program, device_of, dtype_of, evaluating, latent_sites, to_program, y_to_program
from pyro_vae.seeding import derive_seed, seeded
from pyro_vae.signatures import checked

# Decoder outputs held at once, in elements: 4 MB in float32, so that a block of activations stays near the cache.
BLOCK_ELEMENTS = 2**20
WORTH_COMPILING = 10_000_000  # draws: what a graph saves on them is about what it takes to compile it


@checked
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
    if num_samples < 1:
        raise UserError(f"expected num_samples of at least 1, got {num_samples}")
    if target_se is not None and not target_se > 0:
        raise UserError(f"expected a target error (target_se, --target-error) above 0, got {target_se}")
    traces = admit(program, x, y)
    require_weights(traces)
    states = joint_states(latent_sites(traces.model))
    images, samples = block_shape(x, num_samples if target_se is None else min(num_samples, PILOT), chunk_size)
    if noise not in NOISES:
        raise UserError(f"unknown noise {noise!r}: {nearest(noise, NOISES)}")
    if noise == "sobol" and target_se is not None:
        raise UserError(
            "target_se needs random noise: the error of Sobol noise is known when all randomisations are drawn"
        )
    device = device_of(program)
    require_precision(precision, device, dtype_of(program))
    one_shape = target_se is None  # images that get as many draws are not as many
    compiled = one_shape and wants_compiling(compile, len(x) * num_samples, device)
    length = length_of(num_samples) if noise == "sobol" else None
    if noise == "sobol":
        if compile == "on":
            warnings.warn("evaluating uncompiled: Sobol noise is not made in graphs", CaptureWarning, stacklevel=3)
        compiled = False
    draw = _Passes(program, samples, precision, compiled=compiled)
    fitting = Chunks(images, samples)
    blocks: dict[int, list[Reduced]] = {}
    for first in own_share(range(0, len(x), images)):
        rows = slice(first, first + images)
        block, block_y = to_program(program, x[rows]), y_to_program(program, y, rows)
        with evaluating(program), products(precision):

            def reduce(x: Tensor, y: Tensor | None, at: int, samples: int, first: int = first) -> Reduced:
                if states is not None:
                    return summed(program, x, y, states, samples, num_samples, precision)
                return _block(draw, x, y, num_samples, samples, seed, first + at, target_se, length)

            blocks[first] = fitting.over(reduce, block, block_y)
        if progress is not None:
            progress(len(block))
    shares = everyones((blocks, fitting.images * fitting.samples))
    blocks = {first: found for share, _ in shares for first, found in share.items()}
    parts = [part for first in sorted(blocks) for part in blocks[first]]
    error = None
    if precision != "full":
        few = y_to_program(program, y, slice(0, IMAGES))
        error = rounding_error(program, to_program(program, x[:IMAGES]), few, precision, seed)
    names = ("log_likelihood", "bias", "mc_se", "ess", "khat", "interval")
    columns: dict[str, Any] = {name: torch.cat([getattr(part.estimate, name) for part in parts]) for name in names}
    if states is None and discrete_sites(traces):
        columns["khat"] = torch.full_like(columns["khat"], math.nan)  # it would see the states alone that were drawn
    result = LogLikelihood(
        **columns,
        reconstruction=torch.cat([part.reconstruction for part in parts]),
        kl=torch.cat([part.kl for part in parts]),
        draws=None if one_shape or states is not None else torch.cat([part.draws for part in parts]),
        target_se=target_se,
        num_samples=num_samples,
        seed=seed,
        chunk_size=min(size for _, size in shares),
        precision=precision,
        rounding_error=error,
        noise=noise,
        states=None if states is None else len(next(iter(states.values()))),
        blind_spots=[] if states is not None else blind_spots(traces),
    )
    result = _held_to_theory(result, kl_is_one=latents_have_densities(traces))
    consistency.warn(result.forbidden)
    for message in result.warnings:
        warnings.warn(message, UnreliableEstimateWarning, stacklevel=3)
    return result


def _held_to_theory(result: LogLikelihood, *, kl_is_one: bool) -> LogLikelihood:
    corrected = result.log_likelihood - result.bias
    claims = consistency.of_likelihood(result.elbo, corrected, result.kl if kl_is_one else None)
    return replace(result, forbidden=consistency.forbidden(claims))


def block_shape(x: Tensor, num_samples: int, chunk_size: int | None = None) -> tuple[int, int]:
    """Images and samples in one pass; all samples of an image are drawn before the next block of images begins."""
    if chunk_size is None:
        chunk_size = max(64, BLOCK_ELEMENTS // max(1, math.prod(x.shape[1:])))
    if chunk_size < 1:
        raise UserError(f"expected chunk_size of at least 1, got {chunk_size}")
    passes = math.ceil(num_samples / chunk_size)
    samples = math.ceil(num_samples / passes)
    return max(1, min(len(x), chunk_size // samples)), samples


def wants_compiling(choice: str, num_draws: int, device: torch.device) -> bool:
    """Whether to compile a pass: as asked, or where the number of draws repays the time it takes."""
    if choice not in ("auto", "on", "off"):
        raise UserError(f"expected compile to be auto, on or off, got {choice!r}")
    return choice == "on" or (choice == "auto" and device.type in ("cpu", "cuda") and num_draws >= WORTH_COMPILING)


class _Passes:
    """Draws of a fixed number of samples, by one compiled graph where that is wanted and can be."""

    def __init__(self, program: Program, samples: int, precision: str, *, compiled: bool) -> None:
        self.program, self.samples, self.precision, self.wanted = program, samples, precision, compiled
        self.bound = OfProgram(program, weigh)
        self.graph: Captured | None = None
        self.leaves: list[Tensor] = []  # the program's tensors

    def __call__(self, x: Tensor, y: Tensor | None, num_samples: int) -> Weighed:
        """What :func:`weigh` returns; a last pass of another shape is not worth a graph of its own."""
        if self.wanted and self.graph is None:
            self._compile(x, y)
        if self.graph is not None and (changed := self._stale()) is not None:
            self.graph = None
            warnings.warn(
                f"evaluating goes on uncompiled: {changed} while the program was evaluated",
                CaptureWarning,
                stacklevel=6,
            )
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
            warnings.warn(f"evaluating uncompiled: {error}", CaptureWarning, stacklevel=6)


def _block(
    draw: _Passes,
    x: Tensor,
    y: Tensor | None,
    num_samples: int,
    samples: int,
    seed: int,
    first_image: int,
    target_se: float | None,
    length: int | None,
) -> Reduced:
    """What is reported of one block of images, ``samples`` draws of each in one pass."""

    def drawn(rows: Tensor, seeds: Callable[[int], int], first_sample: int, number: int) -> Weighed:
        whole = len(rows) == len(x)
        some_x, some_y = (x, y) if whole else (x[rows], None if y is None else y[rows])
        even = SobolNoise(seed, first_image, first_sample, number, length) if length else nullcontext()
        with seeded(seeds(first_sample), x.device), even:
            return draw(some_x, some_y, number)

    every = torch.arange(len(x))
    if target_se is None or num_samples <= PILOT:
        of_all = lambda first: derive_seed("importance weights", seed, first_image, first)  # noqa: E731
        return reduced(partial(drawn, every, of_all), num_samples, samples, length or 1)

    def fresh(rows: Tensor, number: int) -> Reduced:
        # images that get another number are in the same block, and draw other noise
        seeds = lambda first: derive_seed("importance weights: after a pilot", seed, first_image, number, first)  # noqa: E731
        room = samples * len(x) // len(rows)  # a pass of fewer images takes more draws
        return reduced(partial(drawn, rows, seeds), number, room)

    of_pilot = lambda first: derive_seed("importance weights: pilot", seed, first_image, first)  # noqa: E731
    return adaptive(reduced(partial(drawn, every, of_pilot), PILOT, samples), fresh, num_samples, target_se)
