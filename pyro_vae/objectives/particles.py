"""Several joint draws of all latents per image, and their log-weights with chosen gradients.

**Scales.** What ``poutine.scale`` says of a site multiplies its log-density in the loss, in every objective alike: so it is in
Pyro's own ELBO. An objective that weighs draws by p(x, z) / q(z | x) has weights without scales, and takes one scale that is
the same for all sites of model and guide, as a weight of the row; others it refuses. (Importance weights of an evaluation are
never scaled.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from pyro_vae.errors import UserError
from pyro_vae.programs.functional import OfProgram
from pyro_vae.programs.scoring import require_scored_anew
from pyro_vae.programs.strata import InStrata
from pyro_vae.programs.trace import (
    Program,
    Traced,
    Traces,
    is_random,
    isolated,
    latent_sites,
    latent_values,
    log_probs,
    run,
    sum_log_prob,
)


@dataclass(frozen=True)
class Particles:
    """Draws of the guide for one minibatch, on which the model is run once; log-densities are ``(num_particles, batch)``.

    Attributes:
        drawn: the guide's run.
        again: makes it once more on these draws, with the same dropout and buffers, no gradient reaching its parameters.
    """

    program: Program
    x: Tensor
    y: Tensor | None
    num: int
    drawn: Traced
    again: Callable[[], Traced]

    @cached_property
    def latents(self) -> dict[str, Tensor]:
        """The latents where the model takes them."""
        return {name: z.view_as(z) for name, z in latent_values(self.drawn).items()}

    @cached_property
    def traces(self) -> Traces:
        """The guide's draws, and the model on them."""
        with isolated():
            return Traces(run(self.program.model, self.x, self.y, num_samples=self.num, at=self.latents), self.drawn)

    def log_joint(self) -> Tensor:
        """Log p(x, z), with gradients to z and to the model's parameters."""
        with isolated():
            terms = Traces(self.traces.model).terms(self.num, len(self.x))
        return terms.log_likelihood + terms.log_prior

    def log_guide(self, *, parameters: bool = True) -> Tensor:
        """Log q(z | x), with gradients to z, and to the guide's parameters or not."""
        with isolated():
            return sum_log_prob(self.drawn if parameters else self.again(), self.num, len(self.x))

    def log_weight(self, *, guide_parameters: bool = True) -> Tensor:
        """Log p(x, z) - log q(z | x), each site by its scale, with gradients to the parameters of q or not."""
        guide, model = self.drawn if guide_parameters else self.again(), self.traces.model
        with isolated():
            model, guide = (log_probs(traced, scale=True) for traced in (model, guide))
        return self.total(model.values()) - self.total(guide.values())

    def total(self, log_probs: Iterable[Tensor]) -> Tensor:
        """The log-densities of some sites added up."""
        return sum(log_probs, self.x.new_zeros(())).expand(self.num, len(self.x))

    def row_scale(self, objective: str) -> Tensor | float:
        """The one scale of all sites of the guide and of the model: a number, or ``(batch,)``.

        Raises:
            UserError: sites are scaled differently; ``objective`` is the name of the one that cannot take it.
        """
        traces = (self.traces.model, self.drawn)
        scales = [(name, site["scale"]) for traced in traces for name, site in traced.nodes.items() if is_random(site)]
        (first_name, first), *others = scales
        for name, scale in others:
            if not _same(first, scale, self.x):
                raise UserError(
                    f"the objective {objective!r} weighs draws by p(x, z) / q(z | x), and the sites {first_name!r} and {name!r} "
                    "have different scales (poutine.scale): give all sites of model and guide one scale, or use elbo"
                )
        if not isinstance(first, Tensor):
            return float(first)
        return first.to(self.x.device, self.x.dtype).expand(1, len(self.x))[0]


def draw(
    program: Program,
    x: Tensor,
    y: Tensor | None,
    num: int,
    *,
    reparameterized: str | None = None,
    again: bool = False,
    stratified: bool = True,
) -> Particles:
    """Draw ``num`` particles per image; ``again``, to score the guide without gradients to its parameters.

    Mixtures draw from their components by turns, but where an estimate needs particles that are independent of each other.
    ``reparameterized`` names the objective that needs z to be differentiable; without, no gradient passes z.
    """
    if again or reparameterized is None:  # of draws that no gradient passes
        require_scored_anew(program)
    sites = _Sites(gradients=reparameterized is not None)
    noise, bound = _Noise(sites), OfProgram(program, lambda p: run(p.guide, x, y, num_samples=num, at=drawn))
    buffers = bound.copied() if again else {}
    with isolated(), noise if again else nullcontext(), sites, InStrata() if stratified else nullcontext():
        drawn = run(program.guide, x, y, num_samples=num)
    if reparameterized is not None:
        for name, site in latent_sites(drawn).items():
            if not site["fn"].has_rsample:
                raise UserError(
                    f"the objective {reparameterized!r} differentiates through the draws, and the guide's site {name!r} is not "
                    "reparameterized; use elbo or wake-sleep"
                )

    def scored() -> Traced:
        noise.again = True
        with isolated(), noise, sites:
            return bound.stopped(buffers=buffers)

    return Particles(program, x, y, num, drawn, scored)


class _Sites(Messenger):
    """Knows whether a site is being drawn; and lets no gradient pass through what it draws, where that is not wanted."""

    def __init__(self, gradients: bool) -> None:
        super().__init__()
        self.gradients, self.inside = gradients, False

    def _pyro_sample(self, msg: Any) -> None:
        self.inside = True

    def _pyro_post_sample(self, msg: Any) -> None:
        self.inside = False
        if not self.gradients and is_random(msg):
            msg["value"] = msg["value"].detach()


class _Noise(TorchDispatchMode):
    """What a run draws outside of its sites (dropout): kept in the first run, and given again in the second.

    With another mask than that which drew z, log q(z) is the density of another law, and the bound lies above log p(x).
    """

    def __init__(self, sites: _Sites) -> None:
        super().__init__()
        self.sites, self.again = sites, False
        self.kept: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Random operations outside of sites kept or given again; every other as it is."""
        kwargs = kwargs or {}
        if self.sites.inside or torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if not self.again:
            drawn = func(*args, **kwargs)
            self.kept.append((func, tree_map_only(Tensor, torch.clone, drawn)))
            return drawn
        if not self.kept or self.kept[0][0] is not func:
            raise UserError("the guide draws other noise outside of its sites when it is run again: use elbo or iwae")
        drawn = self.kept.pop(0)[1]
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        return kwargs.get("out", args[0]).copy_(drawn) if writes else drawn


def _same(a: Any, b: Any, x: Tensor) -> bool:
    """Whether two scales are the same for every row of x."""
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return float(a) == float(b)
    return torch.equal(*(torch.as_tensor(s, device=x.device, dtype=x.dtype).expand(1, len(x)) for s in (a, b)))
