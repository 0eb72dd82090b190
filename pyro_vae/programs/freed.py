"""The guide with the parameters of its family free, one set per datum, in place of what its networks make of x.

A posterior of this library makes its parameters of features by linear maps (:meth:`Posterior.seams`). What these return for a
datum is taken for numbers of its own: every member of the family is then in reach, whatever the maps can reach from x.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.errors import UserError
from pyro_vae.posteriors.base import Posterior
from pyro_vae.programs.trace import Program, Traces, isolated, latent_sites, run, site_log_prob

SAME_FAMILY = "the guide's own family, its parameters free per image"
FEATURES_FREE = "the guide's own family, its features free per image"


class FreedGuide:
    """A program whose guide draws from a free member of its own family for each datum.

    Attributes:
        parameters: the free numbers, leaf tensors ``(batch, ...)``, at first what the guide makes of x.
        family: what is free, in words: the parameters, or the features where a posterior does not show its maps.
    """

    def __init__(
        self, program: Program, x: Tensor, y: Tensor | None, values: dict[nn.Module, list[tuple[Tensor, ...]]]
    ) -> None:
        self.program, self.x, self._y = program, x, y
        self._free = {
            module: [tuple(v.detach().clone().requires_grad_(True) for v in found) for found in calls]
            for module, calls in values.items()
        }
        everything = [v for calls in self._free.values() for found in calls for v in found]
        with torch.enable_grad():
            traces = self._traces(1)
            drawn = sum(s["value"].sum() + site_log_prob(s).sum() for s in latent_sites(traces.guide).values())
            grads = torch.autograd.grad(drawn, everything, allow_unused=True)
        used = [v for v, grad in zip(everything, grads, strict=True) if grad is not None]
        features = [v for module, calls in self._free.items() if isinstance(module, Posterior) for v in calls[0]]
        self.parameters = used
        self.family = FEATURES_FREE if any(v is f for v in used for f in features) else SAME_FAMILY

    def log_weights(self, num_samples: int) -> Tensor:
        """log p(x, z) - log q(z), ``(num_samples, batch)``, of reparameterized draws of the free members."""
        return self._traces(num_samples).terms(num_samples, len(self.x)).log_weight

    def _traces(self, num_samples: int) -> Traces:
        with isolated():
            with _replacing(self._free):
                guide = run(self.program.guide, self.x, self._y, num_samples=num_samples)
            return Traces(run(self.program.model, self.x, self._y, num_samples=num_samples, at=guide), guide)


def free_guide(program: Program, x: Tensor, y: Tensor | None = None) -> FreedGuide | None:
    """The guide's family freed at x, in torch's current mode of the program.

    None unless the guide draws each of its latents from one posterior of this library (a :class:`Posterior`), made of x alone:
    not of the latents before it, whose share in it would be lost.

    Raises:
        UserError: draws that are not reparameterized.
    """
    modules = program.modules() if isinstance(program, nn.Module) else ()
    posteriors = [module for module in modules if isinstance(module, Posterior)]
    within = {part for module in posteriors for part in module.modules() if part is not module}
    posteriors = [module for module in posteriors if module not in within]  # not the components of a mixture
    if not posteriors:
        return None
    calls: dict[nn.Module, list[tuple[Tensor, ...]]] = {}
    with torch.no_grad(), isolated():
        guide = getattr(program, "guide")  # noqa: B009  # Program and nn.Module at once
        draws = 3 if len(x) == 2 else 2  # or an axis of draws would pass for that of rows
        run(guide, x, y, num_samples=draws)  # a guide may keep what it worked out for this x, by calls of its posterior
        with _recording(posteriors, calls):
            drawn = run(guide, x, y, num_samples=draws)
    sites = latent_sites(drawn)
    used = [posterior for posterior in posteriors if posterior in calls]
    once = all(len(calls[posterior]) == 1 for posterior in used)
    found = [v for made in calls.values() for call in made for v in call]
    if not once or len(used) != len(sites) or not all(_by_row(v, len(x)) for v in found):
        return None
    for name, site in sites.items():
        if not site["fn"].has_rsample:
            raise UserError(
                f"the posterior of {name!r} is not reparameterized: no gradient of the ELBO leads to its family's best member"
            )
    return FreedGuide(program, x, y, calls)


def _by_row(value: Tensor, batch: int) -> bool:
    return value.dim() > 1 and len(value) == batch


@contextmanager
def _recording(posteriors: Sequence[Posterior], calls: dict[nn.Module, list[tuple[Tensor, ...]]]) -> Iterator[None]:
    """Note the features that posteriors are given, and what their maps return."""

    def given(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls.setdefault(module, []).append(tuple(args))

    def returned(module: nn.Module, args: Any, output: Any) -> None:
        calls.setdefault(module, []).append(output if isinstance(output, tuple) else (output,))

    with ExitStack() as stack:
        for posterior in posteriors:
            stack.callback(posterior.register_forward_pre_hook(given).remove)
            for seam in posterior.seams():
                stack.callback(seam.register_forward_hook(returned).remove)
        yield


@contextmanager
def _replacing(free: dict[nn.Module, list[tuple[Tensor, ...]]]) -> Iterator[None]:
    """Give posteriors these features, and let their maps return these values, call by call."""
    left = {module: iter(calls) for module, calls in free.items()}

    def given(module: nn.Module, args: Any) -> Any:
        return next(left[module])

    def returned(module: nn.Module, args: Any, output: Any) -> Any:
        found = next(left[module])
        return found if isinstance(output, tuple) else found[0]

    with ExitStack() as stack:
        for module in free:
            if isinstance(module, Posterior):
                stack.callback(module.register_forward_pre_hook(given).remove)
            else:
                stack.callback(module.register_forward_hook(returned).remove)
        yield
