"""A diagonal normal on the unconstrained latents, free for each image: what any program with continuous latents can have."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import IndependentTransform, biject_to

from pyro_vae.errors import UserError
from pyro_vae.evaluation.unconstrained import Unconstrained, split_by_site
from pyro_vae.programs.masks import counted
from pyro_vae.programs.supports import is_discrete, require_support
from pyro_vae.programs.trace import Traces, arguments, is_random, isolated, latent_sites, run, sum_log_prob

DIAGONAL_NORMAL = "diagonal normals on the unconstrained latents"
MOMENT_DRAWS = 256


class FreeNormals:
    """z = z(u), u ~ N(loc, exp(log_scale)^2), one pair for every image and number of u; at first the moments of the guide.

    An element of a latent that the model masks is no part of p(x, z), and is left out of q as well.

    Attributes:
        parameters: loc and log_scale, leaf tensors ``(batch, D)``.
        family: in words.

    Raises:
        UserError: a latent that is discrete, or on a set to which torch has no bijection; it is named.
    """

    def __init__(self, traces: Traces, x: Tensor, y: Tensor | None = None) -> None:
        for name, site in latent_sites(traces.model).items():
            if is_discrete(site["fn"]):
                raise UserError(
                    f"inference gaps climb the ELBO along its gradient in the latents, and {name!r} is discrete: they are "
                    "known for continuous latents alone"
                )
        self.family = DIAGONAL_NORMAL
        self._program, self._args, self._batch = traces.program, arguments(x, y), len(x)
        self._density = Unconstrained(traces, x, y)
        u = self._density.draw(MOMENT_DRAWS, guide=True).to(x.dtype)  # made in float64 where a support has an edge
        self._loc = u.mean(0).clone().requires_grad_(True)
        self._log_scale = u.std(0).clamp(min=1e-4).log().clone().requires_grad_(True)
        self.parameters = [self._loc, self._log_scale]

    def log_weights(self, num_samples: int) -> Tensor:
        """log p(x, z) - log q(z), ``(num_samples, batch)``, of reparameterized draws."""
        noise = torch.randn(num_samples, *self._loc.shape, dtype=self._loc.dtype, device=self._loc.device)
        place = _Place(self._density.shapes, self._loc, self._log_scale, noise)
        with isolated():
            model = run(self._program.model, *self._args, num_samples=num_samples, at=place)
        return sum_log_prob(model, num_samples, self._batch) - place.log_q


class _Place(Messenger):
    """Draw every latent site by its part of the normal, and add up log q of what counts."""

    def __init__(self, shapes: dict[str, torch.Size], loc: Tensor, log_scale: Tensor, noise: Tensor) -> None:
        super().__init__()
        self._u = split_by_site(shapes, loc + log_scale.exp() * noise)
        self._log_q = split_by_site(shapes, -0.5 * noise.square() - log_scale - 0.5 * math.log(2 * math.pi))
        self.log_q = noise.new_zeros(noise.shape[:-1])

    def _pyro_sample(self, msg: Any) -> None:
        if not is_random(msg) or msg["is_observed"]:
            return
        u, log_q = self._u[msg["name"]], self._log_q[msg["name"]]
        transform: Any = biject_to(require_support(msg["name"], msg["fn"]))
        value = transform(u)
        counts, rows = counted(msg), (*self.log_q.shape, -1)
        if counts is not None:
            counts = counts.to(value.device).expand(value.shape)
        inner = transform
        while isinstance(inner, IndependentTransform):
            inner = inner.base_transform
        if inner.domain.event_dim == inner.codomain.event_dim == 0:  # one number of u for each of z
            terms = (log_q - inner.log_abs_det_jacobian(u, value)).reshape(rows)
            counts = None if counts is None else counts.reshape(rows)
        else:
            log_det = transform.log_abs_det_jacobian(u, value)
            terms = log_q.reshape(rows).sum(-1, keepdim=True) - log_det.reshape(rows).sum(-1, keepdim=True)
            counts = None if counts is None else counts.reshape(rows).any(-1, keepdim=True)
        self.log_q = self.log_q + (terms if counts is None else terms.where(counts, 0.0)).sum(-1)
        msg["value"], msg["done"] = value, True
