"""Several joint draws of all latents per image, and their log-weights with chosen gradients.

**Scales.** What ``poutine.scale`` says of a site multiplies its log-density in the loss, in every objective alike: so it is in
Pyro's own ELBO. An objective that weighs draws by p(x, z) / q(z | x) has weights without scales, and takes one scale that is
the same for all sites of model and guide, as a weight of the row; others it refuses. (Importance weights of an evaluation are
never scaled.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_vae.errors import UserError
from pyro_vae.programs.functional import OfProgram
from pyro_vae.programs.trace import (
    Program,
    Traced,
    Traces,
    is_random,
    isolated,
    latent_sites,
    log_probs,
    run,
    sum_log_prob,
)


@dataclass(frozen=True)
class Particles:
    """Draws of the guide for one minibatch; every method returns log-densities ``(num_particles, batch)``.

    The methods differ in what a gradient reaches: the latents z (and through them the guide that drew them, where they are
    reparameterized), and the parameters of the density that scores them.
    """

    program: Program
    x: Tensor
    y: Tensor | None
    num: int
    drawn: Traced
    models: list[Traced] = field(default_factory=list)  # the model on these draws, as often as it was run

    def log_joint(self, *, latents: bool = True, parameters: bool = True) -> Tensor:
        """log p(x, z), with gradients to z or not, and to the model's parameters or not."""
        traced = self._run("model", latents, parameters)
        terms = Traces(traced).terms(self.num, len(self.x))
        return terms.log_likelihood + terms.log_prior

    def log_guide(self, *, latents: bool = True, parameters: bool = True) -> Tensor:
        """log q(z | x), with gradients to z or not, and to the guide's parameters or not."""
        traced = self.drawn if latents and parameters else self._run("guide", latents, parameters)
        return sum_log_prob(traced, self.num, len(self.x))

    def row_scale(self, objective: str) -> Tensor | float:
        """The one scale of all sites of the guide and of the model, which was run: a number, or ``(batch,)``.

        Raises:
            UserError: sites are scaled differently; ``objective`` is the name of the one that cannot take it.
        """
        traces = (self.models[-1], self.drawn)
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

    def traces(self) -> Traces:
        """The guide's draws, and the model on them, with all gradients."""
        return Traces(self._run("model", True, True), self.drawn)

    def log_weight(self, *, guide_parameters: bool = True) -> Tensor:
        """log p(x, z) - log q(z | x), each site by its scale, with gradients to the parameters of q or not."""
        guide = self.drawn if guide_parameters else self._run("guide", True, False)
        model, guide = (log_probs(traced, scale=True) for traced in (self._run("model", True, True), guide))
        return self.total(model.values()) - self.total(guide.values())

    def total(self, log_probs: Iterable[Tensor]) -> Tensor:
        """The log-densities of some sites added up."""
        return sum(log_probs, self.x.new_zeros(())).expand(self.num, len(self.x))

    def _run(self, part: str, latents: bool, parameters: bool) -> Traced:
        drawn = self.drawn if latents else _detached(self.drawn)

        def of(program: Any) -> Traced:
            return run(getattr(program, part), self.x, self.y, num_samples=self.num, at=drawn)

        with isolated():
            traced = of(self.program) if parameters else OfProgram(self.program, of).stopped()
        if part == "model":
            self.models.append(traced)
        return traced


def draw(program: Program, x: Tensor, y: Tensor | None, num: int, *, reparameterized: str | None = None) -> Particles:
    """Draw ``num`` particles per image; ``reparameterized`` names the objective that needs z to be differentiable."""
    with isolated():
        drawn = run(program.guide, x, y, num_samples=num)
    if reparameterized is not None:
        for name, site in latent_sites(drawn).items():
            if not site["fn"].has_rsample:
                raise UserError(
                    f"the objective {reparameterized!r} differentiates through the draws, and the guide's site {name!r} is not "
                    "reparameterized; use elbo or wake-sleep"
                )
    return Particles(program, x, y, num, drawn)


def _same(a: Any, b: Any, x: Tensor) -> bool:
    """Whether two scales are the same for every row of x."""
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return float(a) == float(b)
    return torch.equal(*(torch.as_tensor(s, device=x.device, dtype=x.dtype).expand(1, len(x)) for s in (a, b)))


def _detached(traced: Traced) -> Traced:
    copy = traced.copy()
    for name, site in latent_sites(traced).items():
        copy.nodes[name] = {**site, "value": site["value"].detach()}
    return copy
