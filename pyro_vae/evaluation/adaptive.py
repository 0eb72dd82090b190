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

import torch
from torch import Tensor

from pyro_vae.evaluation.draws import Draws
from pyro_vae.evaluation.estimators import Estimate
from pyro_vae.evaluation.weights import Reduced, joined, reduced
from pyro_vae.programs.walk import Block
from pyro_vae.seeding import derive_seed

PILOT = 250  # draws: fewer tell neither their error nor their tail
MARGIN = 1.2  # on the number of draws, beside Pareto k


def adaptive(draws: Draws, block: Block, at_once: int, num_samples: int, target_se: float) -> Reduced:
    """What fresh draws say of every image of a block, of as many as its pilot asks for; nothing of the pilot is reported.

    Args:
        draws: how to draw.
        block: the images.
        at_once: draws of all images of the block in one pass; of fewer images, more.
        num_samples: draws of an image at most.
        target_se: standard error of log p(x) that is small enough, in nats.
    """
    place = draws.place(block)
    of_pilot = lambda first: derive_seed("importance weights: pilot", draws.seed, place, first)  # noqa: E731
    pilot = reduced(draws(block, PILOT, at_once, seeds=of_pilot), draws.length, draws.strata > 1)
    numbers = chosen(pilot, PILOT, num_samples, target_se)
    places, parts = [], []
    for number in numbers.unique().tolist():
        rows = torch.nonzero(numbers == number)[:, 0]

        def seeds(first: int, number: int = number) -> int:
            """Images that get another number are in the same block, and draw other noise."""
            return derive_seed("importance weights: after a pilot", draws.seed, place, number, first)

        places.append(rows)
        drawn = draws(block, number, at_once * len(block) // len(rows), seeds=seeds, rows=rows)
        parts.append(reduced(drawn, draws.length, draws.strata > 1))
    return Reduced(**joined(parts, torch.cat(places).argsort()))


def chosen(pilot: Estimate, draws: int, num_samples: int, target_se: float) -> Tensor:
    """Draws of each image ``(batch,)``, int64, after a pilot of ``draws``: all where its error is not finite."""
    margin = MARGIN + pilot.khat.nan_to_num(0.0).clamp(min=0.0)
    doublings = torch.log2(margin * (pilot.mc_se / target_se).square()).ceil().clamp(min=0)
    needed = draws * torch.exp2(doublings)
    few = needed < num_samples  # false where it is not finite
    return torch.where(few, needed, torch.full_like(needed, num_samples)).long()
