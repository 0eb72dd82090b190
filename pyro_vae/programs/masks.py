"""Which elements of a site's value count in its log-density."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_vae.programs.folding import ByRow


def counted(site: dict[str, Any]) -> Tensor | None:
    """A mask that broadcasts to ``(*batch, *event)`` of a site of a trace; None where every element counts.

    It joins what ``poutine.mask`` says of the site, by row, and what ``fn.mask(...)`` says in its distribution, by element where
    it stands under ``to_event``.

    Example:
        >>> import pyro.distributions as dist
        >>> fn = dist.Normal(torch.zeros(3), 1.0).mask(torch.tensor([True, False, True])).to_event(1)
        >>> counted({"fn": fn, "mask": torch.tensor([True, True])}).tolist()
        [[True, False, True], [True, False, True]]
    """
    masks = [] if site["mask"] is None else [(site["mask"], len(site["fn"].event_shape))]
    fn = site["fn"]
    if isinstance(fn, ByRow):
        inner = counted({"fn": fn.base_dist, "mask": None})
        masks += [] if inner is None else [(fn.outer(inner.expand(fn.base_dist.shape())), 0)]
        fn = None
    while fn is not None:
        if type(fn).__name__ in ("MaskedDistribution", "Clamped"):
            masks.append((fn._mask, len(fn.event_shape)))
        fn = getattr(fn, "base_dist", None)
    found: Tensor | None = None
    for mask, events in masks:
        mask = torch.as_tensor(mask, dtype=torch.bool)
        mask = mask.reshape((*mask.shape, *[1] * events))
        found = mask if found is None else found & mask
    return found


def unmasked(fn: Any) -> Any:
    """The distribution that was masked by ``fn.mask(...)``, also under ``to_event``; any other as it is."""
    if type(fn).__name__ == "MaskedDistribution":
        return unmasked(fn.base_dist.expand(fn.batch_shape))
    if isinstance(fn, ByRow):
        return fn.of(unmasked(fn.base_dist))
    if type(fn).__name__ == "Independent":
        inner = unmasked(fn.base_dist)
        return fn if inner is fn.base_dist else inner.to_event(fn.reinterpreted_batch_ndims)
    return fn


def unvalidated(fn: Any) -> Any:
    """A distribution that scores whatever it is asked: a guide may draw where the model cannot be, which is to be told."""
    fn = copy.copy(fn)
    fn._validate_args = False
    for name, part in vars(fn).items():
        if isinstance(part, Distribution):
            setattr(fn, name, unvalidated(part))
    return fn
