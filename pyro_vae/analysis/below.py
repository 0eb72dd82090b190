"""Where the layers below go when an upper one is moved: what traversals and manifolds of a hierarchy are drawn at."""

from __future__ import annotations

from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.programs.latents import point_of, prior_trace
from pyro_vae.programs.trace import Program, device_of, evaluating, is_random, isolated, latent_values
from pyro_vae.seeding import derive_seed, seeded


def followed(
    program: Program,
    given: dict[str, Tensor],
    y: Tensor | None = None,
    *,
    start: dict[str, Tensor] | None = None,
    event_shape: tuple[int, ...],
) -> dict[str, Tensor]:
    """All latents ``(N, *latent)`` of a model by name, where some are given and the others follow.

    Those left out are at their mean under the model, given what is above them. With ``start``, they are moved from there by what
    that mean moves, z + E p(z | given) - E p(z | start), so that nothing moves where nothing was; latents that are not free to
    take any number stay.

    Args:
        program: any Program.
        given: latents ``(N, *latent)`` by name, or some of them.
        y: what a conditional program is conditioned on, ``(N, ...)``.
        start: all latents ``(N, *latent)`` by name.
        event_shape: of one datum.
    """
    rows = len(next(iter(given.values())))

    def run(handler: _Following) -> dict[str, Tensor]:
        with evaluating(program), isolated(), seeded(derive_seed("layers below"), device_of(program)):
            return latent_values(prior_trace(program, rows, y, event_shape, at=handler))

    if start is None:
        return run(_Following(given))
    at_start = _Following(start)
    run(at_start)
    return run(_Following(given, start, at_start.means))


class _Following(Messenger):
    """Put latents where they are given, and others at their means, or as far from a start as these are from ``before``."""

    def __init__(
        self, given: dict[str, Tensor], start: dict[str, Tensor] | None = None, before: dict[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.given, self.start, self.before = given, start, before
        self.means: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if not is_random(msg) or msg["is_observed"]:
            return
        name, mean = msg["name"], point_of(msg["fn"])
        self.means[name] = mean
        if name in self.given:
            value = self.given[name].to(mean)
        elif self.start is None or self.before is None:
            value = mean
        else:
            value = self.start[name].to(mean)
            value = value + (mean - self.before[name]) if _is_real(msg["fn"].support) else value
        msg["value"], msg["done"] = value, True


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real
