"""A declared program takes the units of its training data at its first training, and keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyro_vae.data import Data
from pyro_vae.errors import warn
from pyro_vae.programs.columns import layout_of
from pyro_vae.programs.vae import VAE
from pyro_vae.seeding import generator
from pyro_vae.training.source import Source

BLOCK_ROWS = 8192
DATASET_ROWS = 2**17  # of data, evenly spaced, from which the units are found
FLAT = 1e-6  # of its mean: what varies by less is a constant column in float32
APART = 30.0  # ratio of two columns' standard deviations: the narrow one is a thousandth of the wide one's variance


class UnevenColumnsWarning(UserWarning):
    """A likelihood with one scale for all columns is put on columns of very different spreads."""


@contextmanager
def standardized(program: Any, data: Any, source: Source, setting: str, seed: int) -> Iterator[None]:
    """While data are admitted, let a declared program take their units; it is as it was before where they are refused.

    Real-valued data of event shape ``(D,)`` or ``(T, D)`` without levels have a mean and a scale for each of the D columns, or
    one scale for all where the likelihood has one (probabilistic PCA stays itself). A program that was trained before keeps
    what it had.
    """
    if not _takes(program, data, setting):
        yield
        return
    before = {n: t.clone() for n, t in program.state_dict().items()}
    bounds = getattr(program.prior, "bounds", None)
    try:
        _take(program, source, seed)
        yield
    except BaseException:
        program.likelihood.units = None
        program.load_state_dict(before)
        if bounds is not None:
            program.prior.bounds = bounds
        raise


def rows_of(data: Any) -> Any:
    """The training rows of a data set of ours; what else was given, as it is."""
    return data.train if isinstance(data, Data) else data


def _takes(program: Any, data: Any, setting: str) -> bool:
    if not isinstance(program, VAE) or program.trained or setting == "off":
        return False
    if layout_of(program, rows_of(data)) is not None:  # columns have units of their own
        return False
    levels = isinstance(data, Data) and data.levels is not None
    return not levels and program.likelihood.standardizes is not None and len(program.event_shape) in (1, 2)


def _take(program: VAE, source: Source, seed: int) -> None:
    by = program.likelihood.standardizes
    mean, variance = moments(source)
    if by is None or len(mean) != program.event_shape[-1]:  # data of another shape are refused when they are admitted
        return
    if by == "one":
        _warn_of_narrow_columns(mean, variance.sqrt())
    units = program.take_units(by)
    units.start_at(mean.to(units.loc), variance.to(units.loc))
    program.likelihood.start_at(torch.zeros(program.event_shape), 1.0)
    if program.prior.start_rows:
        places = torch.rand(program.prior.start_rows, generator=generator("pseudo-inputs in standard units", seed))
        rows, _ = source.batch((places * source.num_rows).long())
        program.prior.start_at(units(rows))


def _warn_of_narrow_columns(mean: Tensor, spread: Tensor) -> None:
    """Columns that one scale for all leaves to noise are the user's choice; that they are there is not."""
    varying = spread[spread > FLAT * mean.abs()]
    if len(varying) and float(varying.max()) > APART * float(varying.min()):
        warn(
            f"the columns' standard deviations go from {float(varying.min()):.2g} to {float(varying.max()):.3g}, and the "
            "likelihood has one scale for all of them: it describes the wide columns and leaves the narrow ones to noise; the "
            "option scale=per-pixel of the likelihood gives each its own",
            UnevenColumnsWarning,
        )


def moments(source: Source) -> tuple[Tensor, Tensor]:
    """The mean and the variance of every column of the training rows, finite entries alone: float64 ``(D,)`` on the CPU."""
    count = min(source.num_rows, DATASET_ROWS)
    total = mean = square = torch.zeros(())
    for rows in (torch.arange(count) * source.num_rows // count).split(BLOCK_ROWS):
        x = source.stored(rows)[0].cpu().double()
        x = x.reshape(-1, x.shape[-1])
        there = torch.isfinite(x)
        n = there.sum(0)
        own = x.where(there, 0.0).sum(0) / n.clamp(min=1)
        deviations = (x - own).where(there, 0.0).square().sum(0)
        # of two parts together (Chan, Golub & LeVeque 1979): nothing large cancels
        step = own - mean
        square = square + deviations + step.square() * total * n / (total + n).clamp(min=1)
        mean = mean + step * n / (total + n).clamp(min=1)
        total = total + n
    return mean, square / total.clamp(min=1)
