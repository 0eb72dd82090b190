"""What is made of a tensor is followed, whatever values there are, and seen to leave for the host."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_vae.programs.following import Following


@pytest.mark.parametrize(
    ("make", "reached", "left"),
    [
        (lambda a: torch.where(a > 100, 1.0, 0.0), True, False),
        (lambda a: a * 0, True, False),
        (lambda a: a.unsqueeze(0).expand(2, 3), True, False),
        (lambda a: torch.zeros(3).copy_(a), True, False),
        (lambda a: torch.zeros(a.shape, dtype=a.dtype), False, False),
        (lambda a: torch.tensor(a.sum().item()), False, True),
        (lambda a: torch.tensor(a.tolist()), False, True),
        (lambda a: torch.from_numpy(2 * a.numpy()), False, True),
        (lambda a: torch.as_tensor(1.0 * np.asarray(a)), False, True),
    ],
    ids=["limit", "times 0", "view", "in place", "shape alone", "item", "list", "numpy", "asarray"],
)
def test_what_is_made_of_a_tensor(make: Callable[[Tensor], Tensor], reached: bool, left: bool) -> None:
    source, following = torch.ones(3), Following()
    following.start(source)
    with following:
        made = make(source)
    assert following.reaches(made) == reached
    assert following.left == left
    assert not following.reaches(torch.ones(3))
