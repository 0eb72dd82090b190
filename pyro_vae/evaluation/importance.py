"""Importance-weighted log-likelihood of any Program.

    log p(x) = log E_{z ~ q(z|x)} [ p(x, z) / q(z | x) ]  >=  E log (1/K) sum_k p(x, z_k) / q(z_k | x)

Burda, Grosse & Salakhutdinov 2016, Importance Weighted Autoencoders, https://arxiv.org/abs/1509.00519.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_vae.capture import CaptureWarning
from pyro_vae.errors import UserError, tell, warn
from pyro_vae.evaluation import consistency
from pyro_vae.evaluation.adaptive import PILOT, adaptive
from pyro_vae.evaluation.blind import discrete_sites, require_weights
from pyro_vae.evaluation.consistency import latents_have_densities
from pyro_vae.evaluation.draws import Draws
from pyro_vae.evaluation.enumeration import number_of_joint, summed
from pyro_vae.evaluation.estimators import GROUPS
from pyro_vae.evaluation.every_row import look_for_points
from pyro_vae.evaluation.interval import FEWEST
from pyro_vae.evaluation.methods import ImportanceSampling
from pyro_vae.evaluation.proven import blind_spots, proven
from pyro_vae.evaluation.result import LogLikelihood, UnreliableEstimateWarning
from pyro_vae.evaluation.rounding import measured
from pyro_vae.evaluation.shared import shared_terms
from pyro_vae.evaluation.subsets import of_columns
from pyro_vae.evaluation.weights import joined, reduced
from pyro_vae.precision import products, require_precision
from pyro_vae.programs.columns import layout_of, packed
from pyro_vae.programs.door import admitted, door
from pyro_vae.programs.states import joint_states
from pyro_vae.programs.strata import strata_of
from pyro_vae.programs.trace import Program, device_of, dtype_of, latent_sites, to_program
from pyro_vae.programs.walk import Walk, at_once
from pyro_vae.seeding import digest

WORTH_COMPILING = 10_000_000  # draws: what a graph saves on them is about what it takes to compile it


@door(records=True)
def log_likelihood(
    program: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    of: Any = None,
    given: Any = None,
    common: bool = False,
    num_samples: int = 5000,
    target_se: float | None = None,
    seed: int = 0,
    chunk_size: int | None = None,
    compile: str = "auto",
    precision: str = "full",
    noise: str = "random",
    streams: str = "place",
    progress: Callable[[int], None] | None = None,
) -> LogLikelihood:
    """Log p(x) of every row of x, by importance sampling from the guide.

    The work is cut into fixed blocks of images and samples, each seeded from (seed, first image, first sample): a row's
    estimate depends on its place in x (but see ``streams``), and on nothing that was drawn before. Dropout is off. Where a
    process group is joined (``torchrun``), every process calls this alike, computes its share of the blocks and gets the whole
    result. A block that finds no memory is drawn anew with half as many samples, or images, at once.

    Where all latents are discrete and have at most 1,024 joint values, log p(x) is summed over these instead of drawn: it is
    exact (``states`` in the result), its error 0, and Pareto k -inf. Other discrete latents, and a guide of a support within
    the model's, have states that no draw tells of: the result warns of them, with what to do.

    Of a record it is log p of what is present: missing columns that the guide draws are latents (discrete ones of few states are
    summed over in every weight), and others are left out. With ``of`` and ``given`` it is log p(x_A | x_B) of the columns named,
    a :class:`~pyro_vae.evaluation.subsets.ConditionalLogLikelihood`, whose error says how it was computed.

    Args:
        program: any Program, on its device.
        x: data ``(N, *event)`` as the program sees it (binarized, if its likelihood is); or a :class:`pyro_vae.Record`, or dict
            of tensors.
        y: what a conditional program is conditioned on, ``(N, ...)``.
        of: of a record, the names of the columns whose log p is asked for; others are missing. By default all.
        given: names of columns that are conditioned on.
        common: of log p(x_A | x_B), whether both of its terms are made of the draws of the guide that is given x_B
            (:mod:`pyro_vae.evaluation.shared`): a smaller error where x_A adds little to what x_B says. Each has its own else.
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
        streams: what a row's noise is seeded by, beside ``seed``: its ``place`` in x, or its ``content``, the bytes of its x and
            y: then it is the same wherever, and beside whatever, the row stands, and rows are drawn one by one, which takes
            longer where K is small.
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
    how = ImportanceSampling(num_samples, target_se, seed, chunk_size, compile, precision, noise, streams)
    traces, layout = admitted(), layout_of(program, x)
    if of is not None or given is not None:
        options = {**vars(how), "progress": progress}
        shared = _sharing(how, progress) if common else None
        return of_columns(log_likelihood, program, x, y, layout, of, given, options.pop("seed"), shared, **options)
    if common:
        raise UserError("common draws are of log p(x_A | x_B) of a record: name the columns, of= and given=")
    if streams == "content" and layout is not None and any(column.missing == "no" for column in layout.columns):
        # as beside rows in which something is missing, where what is given is among the states that are summed over
        whole = packed(program, layout.unpacked(x), whole=True)
        return log_likelihood(program, whole, y, progress=progress, **vars(how))
    require_weights(traces)
    require_precision(precision, device_of(program), dtype_of(program))
    latents = latent_sites(traces.model)
    states = (joint_states(latents) if latents else {}) if layout is None or not layout.read else None
    each = 1 if layout is None or not layout.states or states else len(next(iter(layout.states.values())))
    if each > 1 and noise == "sobol":
        raise UserError("sobol noise is not made where discrete latents are summed over: use noise='random'")
    against = [] if states is not None else blind_spots(program, x, y, traces, len(x) * num_samples)
    proof = None if states is not None else proven(program, x, y, traces, len(x) * num_samples)
    fewest = num_samples if target_se is None else min(num_samples, PILOT)  # draws that an image gets at the least
    images, samples = block_shape(x, fewest, chunk_size, each)
    if streams == "content":
        images = 1
    strata = strata_of(traces.guide) if each == 1 else 1
    strata = strata if fewest >= FEWEST * strata else 1  # of fewer of each component the error would not be known
    compiled = wants_compiling(how, len(x), device_of(program))
    draws = Draws(program, how, samples, compiled=compiled, strata=strata)
    walk = Walk(program, x, y, rows=images, draws=draws.samples, shared=True, progress=progress)
    for block in walk:
        with block, products(precision):
            if states is not None:
                walk.keep(summed(program, block.x, block.y, states, walk.draws, num_samples, precision))
            elif target_se is not None and num_samples > PILOT:
                walk.keep(adaptive(draws, block, walk.draws, num_samples, target_se))
            else:
                walk.keep(reduced(draws(block, num_samples, walk.draws), draws.length, draws.strata > 1))
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
    rounding = found.pop("rounding")
    result = LogLikelihood(
        **found,
        target_se=target_se,
        num_samples=num_samples,
        seed=seed,
        chunk_size=walk.rows * walk.draws,
        precision=precision,
        rounding_error=measured(program, x, y, traces, precision, seed, num_samples),
        noise=noise,
        strata=draws.strata,
        states=None if states is None else number_of_joint(states),
        blind_spots=against,
        proof=proof,
        shared=alike(to_program(program, x), y) if streams == "content" else None,
    )
    if latents_have_densities(traces):
        count = result.draws if result.draws is not None else torch.full_like(rounding, num_samples)
        if noise == "sobol":  # whose randomisations alone are independent, and rows share them
            count = torch.full_like(rounding, GROUPS / len(x))
        own = slice(None) if result.shared is None else result.shared.unique()  # rows with noise of their own
        claims = consistency.of_kl(result.kl[own], count[own], rounding[own])
        result = replace(result, forbidden=consistency.forbidden(claims))
    consistency.tell(result.forbidden)
    tell(result.warnings, UnreliableEstimateWarning)
    return result


def _sharing(how: ImportanceSampling, progress: Callable[[int], None] | None) -> Callable[..., Any]:
    """What estimates both terms of a conditional by the same draws; refuses what is not made for that."""
    plain = ImportanceSampling(how.num_samples, seed=how.seed, compile=how.compile)
    if how != plain or how.compile == "on" or how.num_samples < 2:
        raise UserError("common draws take num_samples, of at least 2, and seed alone: leave the other options out")
    return partial(shared_terms, num_samples=how.num_samples, seed=how.seed, progress=progress)


def block_shape(x: Tensor, num_samples: int, chunk_size: int | None = None, states: int = 1) -> tuple[int, int]:
    """Images and samples in one pass; all samples of an image are drawn before the next block of images begins.

    ``states`` is how often the model is run for each sample.
    """
    if chunk_size is None:
        chunk_size = at_once("importance weights", states * math.prod(x.shape[1:]), 64)
    passes = math.ceil(num_samples / chunk_size)
    samples = math.ceil(num_samples / passes)
    return max(1, min(len(x), chunk_size // samples)), samples


def alike(x: Tensor, y: Tensor | None) -> Tensor:
    """For each row the first one of the same content ``(N,)``: with it, it shares noise that content seeds."""
    first: dict[int, int] = {}
    rows = (digest(x[i : i + 1], None if y is None else y[i : i + 1]) for i in range(len(x)))
    return torch.tensor([first.setdefault(content, row) for row, content in enumerate(rows)])


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
