"""As many draws as an image's error bar asks for.

What is reported must not depend on the decision to stop: an image that stops as soon as its *estimated* error is small has, more
often than not, missed its large weights, and both its log p(x) and its error come out too low. So a pilot of 250 draws
decides how many draws an image gets, and its numbers are then thrown away: what is reported is made of fresh draws alone,
whose number is known before the first is made.

The error of K draws falls as 1/sqrt(K): an image with an error of e nats after the pilot needs 250 (e / target)^2 draws. As e is
itself noisy, and mostly too low where Pareto k is high, that is multiplied by 1.2 + k, and rounded up to 250, 500, 1,000, 2,000,
...: images of one number are drawn together. Beside its pilot an image so gets 1.7 times (k near 0) to 4.4 times (k near 0.5) the
draws that would just do, and its error comes down to the target in 99 % to 73 % of cases, to 1.5 times the target in 100 % to
92 %. It is not drawn anew where it does not: that would bring the bias back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_vae.evaluation.estimators import Estimate
from pyro_vae.evaluation.weights import Reduced, in_place

PILOT = 250  # draws: fewer tell neither their error nor their tail
MARGIN = 1.2  # on the number of draws, beside Pareto k


def adaptive(pilot: Reduced, fresh: Callable[[Tensor, int], Reduced], num_samples: int, target_se: float) -> Reduced:
    """What fresh draws say of every image of a block, of as many as its pilot asks for.

    Args:
        pilot: of all images of the block; nothing of it is reported.
        fresh: the places of some images in the block, and how many draws: what these say.
        num_samples: draws of an image at most.
        target_se: standard error of log p(x) that is small enough, in nats.
    """
    numbers = chosen(pilot.estimate, int(pilot.draws[0]), num_samples, target_se)
    groups = [(torch.nonzero(numbers == number)[:, 0], int(number)) for number in numbers.unique()]
    return in_place([(rows, fresh(rows, number)) for rows, number in groups])


def chosen(pilot: Estimate, draws: int, num_samples: int, target_se: float) -> Tensor:
    """Draws of each image ``(batch,)``, int64, after a pilot of ``draws``: all where its error is not finite."""
    margin = MARGIN + pilot.khat.nan_to_num(0.0).clamp(min=0.0)
    doublings = torch.log2(margin * (pilot.mc_se / target_se).square()).ceil().clamp(min=0)
    needed = draws * torch.exp2(doublings)
    few = needed < num_samples  # false where it is not finite
    return torch.where(few, needed, torch.full_like(needed, num_samples)).long()
