"""The log-densities of any Program with continuous latents, as functions of one flat real vector per chain and image.

    z = z(u),   log p(x, u) = log p(x, z(u)) + log |dz/du|,   u in R^D

Each latent site is mapped from the real line to its support by torch's bijection for that support
(``torch.distributions.biject_to``), at the moment the model reaches it: a support may depend on the latents before it.
Several sites are laid side by side in u, in the order in which the model samples them.

Where a support has an edge, a density that does not vanish there has a share of its mass closer to it than a number can be:
with Beta(0.1, 0.1) a tenth of the draws lie above 1 - 6e-8, the largest float32 below 1, and p(x) came out 0.6 nats too low
over eight latents. Such programs are run in float64 (1.4 % above 1 - 2e-16), and what then is left is measured, by
:meth:`Unconstrained.at_edge`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_vae.errors import UserError
from pyro_vae.evaluation.every_row import narrow_sites
from pyro_vae.programs.columns import Layout, layout_of
from pyro_vae.programs.contract import require_gradients, require_latents
from pyro_vae.programs.folding import bounds
from pyro_vae.programs.rows import DRAWS, ROWS
from pyro_vae.programs.summing import AsDrawn, counting, states_of
from pyro_vae.programs.supports import require_support
from pyro_vae.programs.trace import (
    Traced,
    Traces,
    evaluating,
    innermost,
    is_random,
    isolated,
    latent_sites,
    latent_values,
    run,
)
from pyro_vae.programs.values import refusal
from pyro_vae.seeding import ONE_THREAD, derive_seed, seeded

EDGE = 0.1  # nats of u that a step of 1 may miss by


class Unconstrained:
    """A program's log-densities at u, given the data; in float64 where a latent's support has an edge, and the program can be.

    Args:
        traces: what was found of a Program when it was examined.
        x: data ``(batch, *event)`` in the program's dtype and on its device.
        y: what a conditional program is conditioned on, ``(batch, ...)``.

    Attributes:
        dim: D, the length of u, summed over sites.
        sites: the latent sites' names, in the order of u.
        has_edge: whether a latent's support is less than the real line.

    Raises:
        UserError: a latent that is discrete, or on a set to which torch has no bijection; it is named.
    """

    def __init__(self, traces: Traces, x: Tensor, y: Tensor | None = None) -> None:
        program, self._traces = traces.program, traces
        require_gradients(program)
        require_latents(traces, "a Markov chain")
        self._narrow, layout = narrow_sites(traces), layout_of(program, x)
        if layout is not None and layout.read:
            raise UserError(
                f"missing entries of {layout.left_out()[0]!r} are read by later sites, and are drawn anew at every run: a Markov "
                "chain needs a density; give the guide a site for them, or use importance weighting"
            )
        self._states = states_of(program, x)
        moved = {n: s for n, s in latent_sites(traces.model).items() if n not in (self._states or ())}
        self.has_edge = any(has_edge(require_support(name, site["fn"])) for name, site in moved.items())
        wide = _in_double(program, x, y) if self.has_edge and x.dtype == torch.float32 else None
        self._given: tuple[Any, Tensor, Tensor | None] = program, x, y
        self._wide = wide is not None
        self.program: Any
        self.program, self.x, self.y = self._given if wide is None else wide
        self._shapes: dict[str, torch.Size] = {}
        for name, site in moved.items():
            # asked of the whole shape: a support may itself have values per chain and image
            whole = torch.Size((DRAWS, ROWS)) + site["fn"].event_shape
            self._shapes[name] = _transform(name, site["fn"]).inverse_shape(whole)[2:]
        if not self._shapes:
            raise UserError(f"the program {type(program).__name__} has no latents: its log p(x) needs no sampling")
            if self._states and any(
                bound.dim() > len(site["fn"].event_shape) for _, _, bound in bounds(site["fn"].support)
            ):
                raise UserError(
                    f"the support of the latent {name!r} may depend on discrete latents, which are summed over: use importance "
                    "weighting (--method iw)"
                )
        self._auxiliary = sorted(set(latent_sites(traces.guide)) - set(latent_sites(traces.model)))
        self.sites = list(self._shapes)
        self.dim = sum(math.prod(shape) for shape in self._shapes.values())
        self._given_dims = None if layout is None else _given_dims(layout, self.x, self._shapes)

    def of(self, keep: Tensor) -> Unconstrained:
        """The same for some of the images, by their numbers."""
        _, x, y = self._given
        return Unconstrained(self._traces, x[keep], None if y is None else y[keep])

    def on(self, x: Tensor, y: Tensor | None) -> Unconstrained:
        """The same for other rows, in the dtype and on the device of these, nothing being asked anew."""
        other = copy.copy(self)
        other.x, other.y, other._given = x, y, (self.program, x, y)
        return other

    @property
    def summed(self) -> bool:
        """Whether discrete latents are summed over."""
        return self._states is not None

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of each site's part of u, for one image, in the order of u."""
        return dict(self._shapes)

    @property
    def batch(self) -> int:
        """The number of images."""
        return self.x.shape[0]

    def densities(self, u: Tensor, *, guide: bool = False) -> Densities:
        """The log-densities at ``u`` ``(chains, batch, D)``, differentiable in u; the guide's only where asked for."""
        if self._states is not None:
            return self._summed(u, self._states, guide)
        with self._running():
            place = _Place(self._shapes, u.to(self.x.dtype))
            model = self._run("model", u.shape[0], place)
            traces = Traces(model)
            if guide:
                traces = Traces(model, self._run("guide", u.shape[0], latent_values(model)))
            terms = traces.terms(*u.shape[:2])
        log_guide = terms.log_guide if guide else None
        return self._proper(u, Densities(terms.log_prior, terms.log_likelihood, place.log_jacobian, log_guide))

    def _summed(self, u: Tensor, states: dict[str, Tensor], guide: bool) -> Densities:
        """The same, the discrete latents summed over."""
        size, chains = len(next(iter(states.values()))), len(u)
        values = {
            n: s.to(u.device)[:, None, None].expand(size, chains, self.batch, *s.shape[1:]).flatten(0, 1)
            for n, s in states.items()
        }
        with self._running():
            place = _Place(self._shapes, u.to(self.x.dtype).repeat(size, 1, 1), values)
            model = self._run("model", size * chains, place)
            traces = Traces(model)
            if guide:
                at = AsDrawn({**latent_values(model), **values})
                traces = Traces(model, self._run("guide", size * chains, at))
            terms = traces.terms(size * chains, self.batch)
            counts = counting(model, values, {n: s[0] for n, s in states.items()})

        def total(values: Tensor) -> Tensor:
            return torch.where(counts, values, -math.inf).reshape(size, chains, self.batch).logsumexp(0)

        log_prior = total(terms.log_prior)
        return self._proper(
            u,
            Densities(
                log_prior,
                total(terms.log_prior + terms.log_likelihood) - log_prior,
                place.log_jacobian[:chains],
                total(terms.log_guide) if guide else None,
            ),
        )

    def _proper(self, u: Tensor, found: Densities) -> Densities:
        """A normal density for what a record gives: u has no part in the model there, and chains are to stay somewhere."""
        if self._given_dims is None:
            return found
        more = -0.5 * (u.square() * self._given_dims).sum(-1)
        log_guide = None if found.log_guide is None else found.log_guide + more
        return replace(found, log_prior=found.log_prior + more, log_guide=log_guide)

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """The latents ``(chains, batch, *event)`` at ``u`` ``(chains, batch, D)``, by site, in the dtype of the x given."""
        program, x, y = self._given
        place = _Place(self._shapes, u.to(x.dtype), self._in_one_state(len(u)))
        with isolated():
            found = latent_values(run(program.model, x, y, num_samples=u.shape[0], at=place))
        return {name: found[name] for name in self._shapes}

    def at_edge(self, u: Tensor) -> Tensor:
        """At which ``u`` ``(chains, batch, D)`` latents cannot be told from others a step of 1 away: bool ``(chains, batch)``.

        They are nearer to the edge of their support than their numbers can be, which rounding, and the samplers themselves,
        put on the last number before it. Their share bounds by how much the density falls short of a mass of 1.
        """
        u = u.to(self.x.dtype)
        found = torch.zeros(u.shape[:2], dtype=torch.bool, device=u.device)
        for step in (-1.0, 1.0):
            with torch.no_grad(), self._running():
                model = self._run("model", u.shape[0], _Place(self._shapes, u + step, self._in_one_state(len(u))))
                again = self._flatten(model, u.shape[0])
            found |= ~((again - (u + step)).abs() < EDGE).all(-1)
        return found

    def unconstrain(self, values: dict[str, Tensor]) -> Tensor:
        """``u`` ``(chains, batch, D)`` of latents ``(chains, batch, *event)`` by site."""
        chains = next(iter(values.values())).shape[0]
        values = {name: value.to(self.x.dtype) for name, value in values.items()}
        with self._running():
            return self._flatten(self._run("model", chains, {**self._in_one_state(chains), **values}), chains)

    def _in_one_state(self, chains: int) -> dict[str, Tensor]:
        """Values ``(chains, batch, *event)`` of what is summed over, so that nothing is drawn: supports do not depend on them."""
        states = self._states or {}
        return {n: s[0].to(self.x.device).expand(chains, self.batch, *s.shape[1:]) for n, s in states.items()}

    def draw(self, num_chains: int, *, guide: bool = False) -> Tensor:
        """``u`` ``(num_chains, batch, D)`` drawn from the prior, or from the guide, with torch's generators."""
        with evaluating(self.program), self._running():
            drawn = latent_values(self._run("guide", num_chains)) if guide else None
            return self._flatten(self._run("model", num_chains, drawn), num_chains)

    def require_guide_density(self) -> None:
        """:class:`UserError` unless log q(z | x) can be evaluated at latents that the guide did not draw."""
        if self._auxiliary:
            raise UserError(
                f"the guide's auxiliary site {self._auxiliary[0]!r} has no density that could be summed out: anneal from the "
                "prior (start='prior')"
            )
        if self._narrow:
            raise UserError(f"{self._narrow[0]}, or anneal from the prior (start='prior')")
        try:
            with torch.no_grad(), seeded(derive_seed("guide density"), self.x.device):
                self.densities(self.draw(1, guide=True) + 0.1, guide=True)
        except (NotImplementedError, KeyError) as error:  # Pyro's flows without an inverse look a draw up, and miss
            raise UserError(
                f"the guide cannot score latents that it did not draw ({type(error).__name__}: {error}): "
                "anneal from the prior (start='prior')"
            ) from None

    def _flatten(self, model: Traced, chains: int) -> Tensor:
        parts = []
        for name, site in ((n, s) for n, s in latent_sites(model).items() if n in self._shapes):
            value = site["value"].expand(chains, self.batch, *site["fn"].event_shape)
            parts.append(_transform(name, site["fn"]).inv(value).reshape(chains, self.batch, -1))
        return torch.cat(parts, -1)

    def _run(self, part: str, chains: int, at: Any = None) -> Traced:
        return run(getattr(self.program, part), self.x, self.y, num_samples=chains, at=at)

    @contextmanager
    def _running(self) -> Iterator[None]:
        with isolated(), _double_by_default(self._wide):
            yield


@dataclass(frozen=True)
class Densities:
    """Log-densities at u, each ``(chains, batch)`` in nats.

    ``log_prior`` is log p(z) over the latent sites; ``log_likelihood`` everything else that the model scores, log p(x | z)
    and its factors; ``log_jacobian`` log |dz/du|; ``log_guide`` log q(z | x).
    """

    log_prior: Tensor
    log_likelihood: Tensor
    log_jacobian: Tensor
    log_guide: Tensor | None

    @property
    def log_joint(self) -> Tensor:
        """log p(x, u): the posterior density of u up to p(x)."""
        return self.log_prior + self.log_likelihood + self.log_jacobian


def _given_dims(layout: Layout, x: Tensor, shapes: dict[str, torch.Size]) -> Tensor:
    """Which numbers of u a record gives ``(batch, D)``."""
    present, parts = layout.unpacked(x).present, []
    for name, shape in shapes.items():
        part = torch.zeros(len(x), math.prod(shape), dtype=torch.bool, device=x.device)
        parts.append(part | present[name].reshape(len(x), -1) if name in layout.guided and name in present else part)
    return torch.cat(parts, 1)


def has_edge(support: Any) -> bool:
    """Whether a support is less than the real line, or a product of real lines."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is not constraints.real and not isinstance(support, type(constraints.real))


def _in_double(program: Any, x: Tensor, y: Tensor | None) -> tuple[Any, Tensor, Tensor | None] | None:
    """The program and its data in float64; None where the device, or tensors that are no parameters or buffers, forbid it."""
    if x.device.type == "mps":
        return None
    wide = copy.deepcopy(program).double()
    y = y.double() if y is not None and y.is_floating_point() else y
    with ONE_THREAD, _double_by_default(True):
        refused = refusal(wide, x[:1].double(), None if y is None else y[:1])
    return None if refused else (wide, x.double(), y)


@contextmanager
def _double_by_default(wide: bool) -> Iterator[None]:
    """While entered, what a program makes without saying a dtype is float64, if it runs in float64 though it was float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if wide else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def split_by_site(shapes: dict[str, torch.Size], u: Tensor) -> dict[str, Tensor]:
    """Each site's part ``(..., *shape)`` of ``u`` ``(..., D)``."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    parts = u.split(sizes, -1) if len(sizes) > 1 else [u]
    return {n: part.reshape(*u.shape[:-1], *shapes[n]) for n, part in zip(shapes, parts, strict=True)}


class _Place(Messenger):
    """Give every latent site its part of u, through the bijection to its support, and add up log |dz/du|."""

    def __init__(self, shapes: dict[str, torch.Size], u: Tensor, values: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        self._values = values or {}
        self._parts = split_by_site(shapes, u)
        self.log_jacobian = u.new_zeros(u.shape[:-1])

    def _pyro_sample(self, msg: Any) -> None:
        if not is_random(msg) or msg["is_observed"]:
            return
        if msg["name"] not in self._parts:  # discrete, and summed over; or drawn, where only others are asked for
            if msg["name"] in self._values:
                msg["value"], msg["done"] = self._values[msg["name"]], True
            return
        part = self._parts[msg["name"]]
        transform = _transform(msg["name"], msg["fn"])
        value = transform(part)
        log_det = transform.log_abs_det_jacobian(part, value)
        self.log_jacobian = self.log_jacobian + log_det.reshape(*self.log_jacobian.shape, -1).sum(-1)
        msg["value"], msg["done"] = value, True


def _transform(name: str, fn: Any) -> Any:
    support = require_support(name, fn)
    if support.is_discrete:
        raise UserError(
            f"the latent {name!r} is discrete ({type(innermost(fn)).__name__}), and annealing moves latents along gradients: "
            "use importance weighting (--method iw)"
        )
    try:
        return biject_to(support)
    except NotImplementedError:
        raise UserError(
            f"the latent {name!r} lives on {support}, to which torch has no bijection from the real line: use importance "
            "weighting (--method iw)"
        ) from None
