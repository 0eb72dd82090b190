"""Several joint draws of all latents per image, and their log-weights with chosen gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro
from pyro import poutine
from torch import Tensor

from pyro_vae.errors import UserError
from pyro_vae.programs.contract import SAMPLE_PLATE, Program, Traced, Traces, arguments, isolated, latent_sites
from pyro_vae.programs.functional import OfProgram


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

    def log_joint(self, *, latents: bool = True, parameters: bool = True) -> Tensor:
        """log p(x, z), with gradients to z or not, and to the model's parameters or not."""
        traced = self._run("model", latents, parameters)
        terms = Traces(traced, poutine.Trace()).terms(self.num, len(self.x))
        return terms.log_likelihood + terms.log_prior

    def log_guide(self, *, latents: bool = True, parameters: bool = True) -> Tensor:
        """log q(z | x), with gradients to z or not, and to the guide's parameters or not."""
        traced = self.drawn if latents and parameters else self._run("guide", latents, parameters)
        return Traces(poutine.Trace(), traced).terms(self.num, len(self.x)).log_guide

    def traces(self) -> Traces:
        """The guide's draws, and the model on them, with all gradients."""
        return Traces(self._run("model", True, True), self.drawn)

    def _run(self, part: str, latents: bool, parameters: bool) -> Traced:
        drawn = self.drawn if latents else _detached(self.drawn)

        def run(program: Any) -> Traced:
            with pyro.plate(SAMPLE_PLATE, self.num, dim=-2):
                replayed = poutine.replay(getattr(program, part), trace=drawn)
                return poutine.trace(replayed).get_trace(*arguments(self.x, self.y))

        with isolated():
            return run(self.program) if parameters else OfProgram(self.program, run).stopped()


def draw(program: Program, x: Tensor, y: Tensor | None, num: int, *, reparameterized: str | None = None) -> Particles:
    """Draw ``num`` particles per image; ``reparameterized`` names the objective that needs z to be differentiable."""
    with isolated(), pyro.plate(SAMPLE_PLATE, num, dim=-2):
        drawn = poutine.trace(program.guide).get_trace(*arguments(x, y))
    if reparameterized is not None:
        for name, site in latent_sites(drawn).items():
            if not site["fn"].has_rsample:
                raise UserError(
                    f"the objective {reparameterized!r} differentiates through the draws, and the guide's site {name!r} is not "
                    "reparameterized; use elbo or wake-sleep"
                )
    return Particles(program, x, y, num, drawn)


def _detached(traced: Traced) -> Traced:
    copy = traced.copy()
    for name, site in latent_sites(traced).items():
        copy.nodes[name] = {**site, "value": site["value"].detach()}
    return copy
