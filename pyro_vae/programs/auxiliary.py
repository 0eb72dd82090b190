"""Sites that only the guide has: what they may be.

    E_q[log p(x, z) - log q(a) - log q(z | a)]  =  log p(x) + H(a | z, x) - KL(q(z | x) || p(z | x))

With a stochastic site a that the model lacks this is no lower bound, and importance weights have another mean than p(x): a model
of a is missing (Agakov & Barber 2004, https://doi.org/10.1007/978-3-540-30499-9_86; Ranganath, Tran & Blei 2016,
https://arxiv.org/abs/1511.02386). One use needs none: z = f(a) with f invertible, written as a ``Delta`` at f(a) whose
``log_density`` is -log |det df/da|; then q(z) = q(a) exp(log_density), and all is right.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import biject_to, identity_transform

from pyro_vae.errors import ProgramError
from pyro_vae.programs.supports import is_discrete
from pyro_vae.programs.trace import (
    Traced,
    Traces,
    factors,
    innermost,
    latent_sites,
    run,
    site_log_prob,
)

MOST_ELEMENTS = 512  # of a Jacobian that is computed to hold a Delta's log_density against
TOLERANCE = 0.02  # nats, and relative, by which the two may differ: they are computed in different ways

REMEDY = (
    "let the model sample it too, from a reverse model r({0} | z, x) of your choice: it is then a latent like any other, and "
    "log p(x) is right for every r"
)


def is_delta(site: dict[str, Any]) -> bool:
    """Whether a site is a point mass."""
    return isinstance(innermost(site["fn"]), Delta)


def check_auxiliary(program: Any, traces: Traces, x: Tensor, y: Tensor | None) -> None:
    """:class:`ProgramError` for sites of the guide that make its density other than what their log-densities add up to.

    To be called inside of :func:`~pyro_vae.programs.trace.isolated`.
    """
    guide, model = latent_sites(traces.guide), latent_sites(traces.model)
    own = {n: s for n, s in guide.items() if n not in model and not is_delta(s)}
    deltas = {n: s for n, s in guide.items() if n in model and is_delta(s)}
    if not own:
        if found := factors(traces.guide):
            raise ProgramError(
                f"guide: the pyro.factor {found[0]!r} makes q(z | x) no density; leave it out, or write it into the model"
            )
        return
    name = next(iter(own))
    discrete = [n for n, s in own.items() if is_discrete(s["fn"])]
    if discrete or not deltas:
        name = (discrete or [name])[0]
        raise ProgramError(
            f"guide: the auxiliary site {name!r} is random, and the model has no site for it: what would be reported is no bound "
            f"of log p(x); {REMEDY.format(name)}"
        )
    elements = sum(math.prod(s["fn"].event_shape) for s in own.values())
    targets = {n: _freedom(model[n]["fn"]) for n in deltas}
    if elements != sum(targets.values()):
        raise ProgramError(
            f"guide: the auxiliary sites {', '.join(own)} have {elements} elements, and the Delta sites {', '.join(deltas)} that "
            f"are made of them {sum(targets.values())}: only as many can be a change of variables; {REMEDY.format(name)}"
        )
    _check_jacobian(program, traces, x, y, list(own), list(deltas))


def _freedom(fn: Any) -> int:
    """The number of free elements of a latent: one less than all on a simplex."""
    return int(_free(fn).inverse_shape(fn.event_shape).numel())


def _free(fn: Any) -> Any:
    """The bijection from the real line to where a latent lives; the identity where torch has none."""
    try:
        return biject_to(fn.support)
    except NotImplementedError:
        return identity_transform


def free_values(fn: Any, value: Tensor) -> Tensor:
    """A latent's values on the real line."""
    found: Tensor = _free(fn).inv(value)
    if found.shape[:2] != value.shape[:2]:
        raise NotImplementedError("a support with bounds by draw")
    return found


def log_det(fn: Any, value: Tensor) -> Tensor:
    """The log-determinant of the way back from there."""
    transform, at = _free(fn), free_values(fn, value)
    found: Tensor = transform.log_abs_det_jacobian(at, transform(at))
    return found


def _check_jacobian(
    program: Any, traces: Traces, x: Tensor, y: Tensor | None, own: list[str], deltas: list[str]
) -> None:
    """Hold the Deltas' log-densities to -log |det dz/da|, at one draw of each row; where that cannot be, to vary."""
    drawn = latent_sites(traces.guide)
    if not all(bool((drawn[n]["value"][0] != drawn[n]["value"][-1]).any()) for n in deltas):
        raise ProgramError(
            f"guide: the Delta site {deltas[0]!r} is the same whatever its auxiliary site {own[0]!r} is; {REMEDY.format(own[0])}"
        )
    names, sizes = [n for n in drawn if n not in deltas], [math.prod(drawn[n]["fn"].event_shape) for n in own]
    if sum(sizes) > MOST_ELEMENTS:
        return
    model, rows = latent_sites(traces.model), len(x)
    fixed = {n: drawn[n]["value"][:1].detach().expand(1, rows, *drawn[n]["fn"].event_shape) for n in names}

    def at_draw(flat: Tensor) -> Traced:
        parts = flat.split(sizes, -1)
        own_values = {n: p.reshape(1, rows, *drawn[n]["fn"].event_shape) for n, p in zip(own, parts, strict=True)}
        return run(program.guide, x, y, num_samples=1, at={**fixed, **own_values})

    at = torch.cat([fixed[n].reshape(rows, -1) for n in own], -1)
    try:
        with torch.enable_grad():
            at = at.requires_grad_(True)
            traced = at_draw(at)
            # on the real line: a simplex has one element less than it shows
            free = torch.cat(
                [free_values(model[n]["fn"], traced.nodes[n]["value"]).reshape(rows, -1) for n in deltas], -1
            )
            # rows stand for themselves: one derivative of a sum over rows is that of every row
            found = [torch.autograd.grad(one.sum(), at, retain_graph=True)[0] for one in free.unbind(-1)]
        jacobian = torch.stack(found, 1).detach()
        given = sum(site_log_prob(traced.nodes[n]).detach() for n in [*deltas, *factors(traced)])
        back = sum(log_det(model[n]["fn"], traced.nodes[n]["value"].detach()).reshape(rows, -1).sum(-1) for n in deltas)
    except (RuntimeError, NotImplementedError):  # a map without derivatives
        return
    expected = (-torch.linalg.slogdet(jacobian.double()).logabsdet - back).flatten()
    stated = torch.as_tensor(given).double().expand(1, rows)[0]
    off = torch.isfinite(stated + expected) & ~((stated - expected).abs() <= TOLERANCE * (1 + expected.abs()))
    if bool(off.any()):
        raise ProgramError(
            f"guide: the Delta {deltas[0]!r} is made of the auxiliary site {own[0]!r} with log_density "
            f"{float(stated[off][0]):.4g}, where minus the log-determinant of its derivative, {float(expected[off][0]):.4g}, was "
            "expected: pass that as log_density"
        )
