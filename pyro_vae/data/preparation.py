r"""From levels as stored to what a program sees: scaling, binarization, dequantization.

For a level :math:`k \in \{0, \dots, L-1\}` and :math:`u \sim U(0, 1)`,

- none: :math:`x = k / (L - 1)`;
- dynamic and static: :math:`x \sim \text{Bernoulli}(k / (L - 1))`, drawn anew each minibatch or once and for all;
- threshold: :math:`x = 1` where :math:`k / (L - 1) > 1/2`, else 0;
- uniform dequantization: :math:`x = (k + u) / L`, so that
  :math:`\log P(k) \ge \mathbb{E}_u \log p(x) - D \log L` for a density p.

References: Salakhutdinov & Murray, *On the quantitative analysis of deep belief networks*, 2008
(https://www.cs.toronto.edu/~rsalakhu/papers/dbn_ais.pdf), for binarization; Theis, van den Oord & Bethge,
*A note on the evaluation of generative models*, 2016 (https://arxiv.org/abs/1511.01844), for dequantization.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.names import BINARIZATIONS, DEQUANTIZATIONS, SPLITS
from pyro_vae.data.rows import Rows
from pyro_vae.errors import UserError, nearest

BLOCK = 1000
"""Rows that are drawn together, by one seed; the draw for a row depends on its block and on nothing else."""

# Separate streams of random numbers; any integers do, but changing one changes what was published with it.
DRAW_STREAM = 7001
STATIC_STREAM = 7002

# u lies on a grid of midpoints of 2**15 cells: with up to 256 levels, k + u is then exact in float32, so that x
# stays inside its own bin and strictly inside (0, 1). A plain uniform rounds up to the next level once in 2**17.
DEQUANTIZATION_CELLS = 2.0**15


def prepare(
    stored: Tensor,
    levels: int | None,
    binarization: str,
    dequantization: str,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The tensor that a program sees, from levels (or floats) as stored; fresh draws at each call; float32, or float64 as stored.

    Torch operations on the tensor's device only, with no decision that depends on values: `make_fx` can trace it.

    Args:
        stored: uint8 levels, or floats (which pass as they are), of any shape.
        levels: the number of levels, or None for floats.
        binarization: one of none, static (already drawn: passes), dynamic, threshold.
        dequantization: none or uniform.
        generator: draws from it; from torch's global generator of the device where None.
    """
    if levels is None:
        return stored if stored.dtype == torch.float64 else stored.to(torch.float32)
    x = stored.to(torch.float32)
    if binarization == "threshold":
        return (2.0 * x > levels - 1).to(torch.float32)  # in whole numbers: exact
    if binarization == "dynamic":
        return _bernoulli(x, levels, generator)
    if dequantization == "uniform":
        u = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32)
        return (x + (torch.floor(u * DEQUANTIZATION_CELLS) + 0.5) / DEQUANTIZATION_CELLS) / levels
    return x / (levels - 1)


def is_random(binarization: str, dequantization: str) -> bool:
    """Whether :func:`prepare` draws."""
    return binarization == "dynamic" or dequantization == "uniform"


def _bernoulli(x: Tensor, levels: int, generator: torch.Generator | None) -> Tensor:
    """Level 0 is never 1 and the highest level always is; every pixel's chance is on a grid of 2**-24."""
    p = x / (levels - 1)
    if generator is None and x.device.type == "cpu":
        return _below(p)
    return (torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32) < p).to(p.dtype)


def _below(p: Tensor) -> Tensor:
    """One where uniform variables are below ``p``, else zero; a CPU draws them several times faster than as many floats.

    Two pixels share 32 random bits: one compares them as they are, the other with their halves exchanged. Each of the two is
    uniform; they depend on each other only where the upper 16 bits do not decide, once in 2**16.
    """
    bits = _words(-(-p.numel() // 4), p.device).view(torch.int32)
    exchanged = (bits << 16) | ((bits >> 16) & 0xFFFF)
    threshold = torch.nn.functional.pad(p.flatten(), (0, 2 * len(bits) - p.numel())) * 2.0**32 - 2.0**31
    one, other = threshold.split(len(bits))
    below = [
        (draw & -256 < part).to(p.dtype) for draw, part in ((bits, one), (exchanged, other))
    ]  # 24 bits, as in a float
    return torch.cat(below)[: p.numel()].view(p.shape)


def _words(count: int, device: torch.device) -> Tensor:
    """So many words of 64 random bits, as integers: made side by side, where a generator makes one after the other.

    Word n of SplitMix64 (Steele, Lea & Flood 2014, Fast splittable pseudorandom number generators,
    https://doi.org/10.1145/2660193.2660195) with seed 0 is made from n alone. Here n is the place, xor 64 bits of torch's
    generator.
    """
    first = torch.randint(-(2**63), 2**63 - 1, (1,), device=device)
    # xor and not a sum: a multiple of the place itself would overflow along a loop, by which a C++ compiler cuts the loop short
    z = torch.arange(count, device=device).bitwise_xor_(first).mul_(-0x61C8864680B583EB)
    z.bitwise_xor_((z >> 30).bitwise_and_(0x3FFFFFFFF)).mul_(-0x40A7B892E31B1A47)  # shifts bring zeros in, not the sign
    z.bitwise_xor_((z >> 27).bitwise_and_(0x1FFFFFFFFF)).mul_(-0x6B2FB644ECCEEE15)
    return z.bitwise_xor_((z >> 31).bitwise_and_(0x1FFFFFFFF))


def block_generator(seed: int, split: str, block: int) -> torch.Generator:
    """The private generator of one block of rows of one split."""
    return published_generator(DRAW_STREAM, seed, SPLITS.index(split), block)


def published_generator(*parts: int) -> torch.Generator:
    """The generator of what results were published with: which draw of binarized data, which subset of a split.

    Not by :func:`~pyro_vae.seeding.derive_seed`: these draws are part of a data set, and stay what they were. Every stream has
    a number and a length of its own.
    """
    state = np.random.SeedSequence([int(p) & 0xFFFFFFFFFFFFFFFF for p in parts]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed((int(state[0]) << 31) ^ int(state[1]))


def binarize_once(stored: Rows, levels: int, split: str) -> Tensor:
    """Levels 0 and 1 as uint8, drawn from grey levels with a fixed seed, block by block.

    The result is in memory also where ``stored`` is memory-mapped: a draw that holds must be kept.
    """
    drawn = torch.empty(tuple(stored.shape), dtype=torch.uint8)
    for block, start in enumerate(range(0, len(stored), BLOCK)):
        private = published_generator(STATIC_STREAM, SPLITS.index(split), block)
        grey = stored[start : start + BLOCK].to(torch.float32)
        drawn[start : start + BLOCK] = _bernoulli(grey, levels, private).to(torch.uint8)
    return drawn


def check_preparation(name: str, levels: int | None, binarization: str, dequantization: str) -> None:
    """Refuse what cannot be done to data with these levels.

    Raises:
        UserError: an unknown kind, binarization of floats or of binary data, dequantization of anything but levels.
    """
    if binarization not in BINARIZATIONS:
        raise UserError(f"binarization {binarization!r} is unknown: {nearest(str(binarization), BINARIZATIONS)}")
    if dequantization not in DEQUANTIZATIONS:
        raise UserError(
            f"dequantization {dequantization!r} is unknown: {nearest(str(dequantization), DEQUANTIZATIONS)}"
        )
    if binarization != "none" and levels is None:
        raise UserError(
            f"binarization {binarization!r} needs grey levels, and {name} holds floats, which have none: "
            "use binarization 'none', or save values of 0 to 1 as grey levels, np.rint(255 * x).astype(np.uint8)"
        )
    if binarization in ("dynamic", "threshold") and levels == 2:
        raise UserError(f"binarization {binarization!r} of {name}: it is binary already; use 'static'")
    if dequantization != "none" and (levels is None or levels <= 2):
        what = "holds floats" if levels is None else "is binary"
        raise UserError(
            f"dequantization {dequantization!r} needs more than two levels, and {name} {what}: "
            "use dequantization 'none'"
        )
    if dequantization != "none" and binarization != "none":
        raise UserError(
            f"dequantization {dequantization!r} and binarization {binarization!r} exclude each other ({name}): "
            "set one of them to 'none'"
        )
