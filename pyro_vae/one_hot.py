"""One-hot values, scored by the linear form that a relaxed value can be put into."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_form(value: Tensor, logits: Tensor) -> Tensor:
    """sum_k value_k logits_k over the last axis, ``(*batch, D)`` of ``(*batch, D, K)``.

    Values ``(S, 1, D, K)`` that all rows share (the states of a mixture) are one matrix product with logits ``(N, D, K)``,
    ``(S, N, D)``; of logits that all rows share too, which an expanded axis tells, the sum is taken once, ``(S, 1, D)``.
    """
    for axis in range(logits.dim() - 2):
        logits = logits.narrow(axis, 0, 1) if logits.stride(axis) == 0 else logits
    rows = logits.shape[:-2]
    if value.dim() == 4 and value.shape[1] == 1 and rows[-1:].numel() > 1 and rows.numel() == rows[-1]:
        return torch.einsum("sdk,ndk->snd", value.squeeze(1), logits.reshape(logits.shape[-3:]))
    return (value * logits).sum(-1)
