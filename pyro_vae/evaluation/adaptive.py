"""As many draws as an image's error bar asks for.

The draws of an image are doubled until the standard error of its log p(x) is small enough, or there are as many as may be.
Stopping looks at the draws that it keeps, so that a lucky start ends early: few looks (ten for 250 to 100,000 draws) keep
that effect far below the error that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from pyro_vae.evaluation.estimators import Estimate, estimate
from pyro_vae.evaluation.weights import Weighed

FIRST_DRAWS = 250  # too few for a tail to be judged by would stop at chance

Draw = Callable[[Tensor, int, int], Weighed]  # which images of the block, from which draw on, how many: their weights


def adaptive(
    draw: Draw, batch: int, num_samples: int, samples: int, target_se: float, first_look: int, length: int = 1
) -> tuple[Estimate, Tensor, Tensor, Tensor]:
    """Estimates of ``batch`` images, the sums of log p(x | z) and of log q(z | x) - log p(z), and the draws of each.

    Args:
        draw: draws for some images.
        batch: images.
        num_samples: draws of an image at most.
        samples: draws in one pass.
        target_se: standard error of log p(x) that is small enough, in nats.
        first_look: draws before the error is looked at.
        length: draws in a row that depend on each other.
    """
    found = {f.name: torch.zeros(batch, dtype=torch.float64) for f in fields(Estimate)}
    sums = torch.zeros(2, batch, dtype=torch.float64)
    draws = torch.zeros(batch, dtype=torch.int64)
    active = torch.arange(batch)
    parts: list[Tensor] = []
    sizes: list[Tensor] = []
    done, until = 0, min(first_look, num_samples)
    while True:
        while done < until:
            number = min(samples, until - done)
            part = draw(active, done, number)
            parts.append(part[0])
            sums[:, active] += torch.stack([p.double().cpu() for p in part[1:3]])
            sizes.append(part[3])
            done += number
        log_weight, size = torch.cat(parts), torch.stack(sizes).amax(0)
        result = estimate(log_weight, size, length)
        for name, values in found.items():
            values[active] = getattr(result, name)
        draws[active] = done
        more = ~(result.mc_se <= target_se)
        if done >= num_samples or not bool(more.any()):
            return Estimate(**found), sums[0], sums[1], draws
        keep = more.to(log_weight.device)
        active, parts, sizes = active[more], [log_weight[:, keep]], [size[keep]]
        until = min(2 * done, num_samples)
