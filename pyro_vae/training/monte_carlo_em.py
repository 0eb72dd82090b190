"""Monte Carlo EM: the model alone is trained, on latents that Markov chains keep drawing from its posterior."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from pyro_vae.errors import UserError
from pyro_vae.evaluation.graph import captured
from pyro_vae.evaluation.hmc import adapt, transition
from pyro_vae.evaluation.path import Point
from pyro_vae.evaluation.unconstrained import Unconstrained
from pyro_vae.programs import contract
from pyro_vae.programs.columns import layout_of
from pyro_vae.programs.functional import OfProgram
from pyro_vae.programs.trace import evaluating, to_program
from pyro_vae.seeding import derive_seed, seeded
from pyro_vae.signatures import checked
from pyro_vae.training.optimizers import make_optimizer, parse_optimizer

RATE = 0.1  # of the step size's adaptation, per transition


class MonteCarloEM:
    """E step: one HMC transition of each row's chain on p(z | x); M step: a few optimizer steps on log p(x, z) at its end.

    Every row keeps its chain, which starts at a draw of the prior, so that the bias of short trajectories fades as training
    goes on; the guide is neither used nor trained, and dropout is off. The step size is tuned to a share of acceptances. So the
    comparison of Kingma & Welling 2014 does, https://arxiv.org/abs/1312.6114, appendix E: 10 leapfrog steps, 90 % accepted,
    5 updates by Adagrad. Wei & Tanner 1990, https://doi.org/10.1080/01621459.1990.10474930.

    Args:
        program: any Program with continuous latents; its model's parameters are trained in place.
        x: data ``(N, *event)``; ``y`` what a conditional program is conditioned on.
        batch_size: rows of an iteration.
        num_leapfrog: leapfrog steps of a transition.
        updates: optimizer steps of an iteration, all on the latents of its transition.
        target_accept: the share of proposals to be accepted.
        optimizer: a name of ``torch.optim``, with options.
        lr: its learning rate.
        seed: of the chains and the order of rows; torch's generators are put back.

    Raises:
        UserError: latents that are discrete or summed over, records, and supports with an edge where the program is float32.

    Example:
        >>> import pyro_vae as pv
        >>> em = MonteCarloEM(pv.build("mlp", "diagonal", (1, 4, 4), latent_dim=2), torch.zeros(8, 1, 4, 4), batch_size=4)
        >>> sorted(em.run(epochs=1)[0])
        ['acceptance_rate', 'epoch', 'log_joint', 'step_size']
    """

    @checked
    def __init__(
        self,
        program: Any,
        x: Tensor,
        y: Tensor | None = None,
        *,
        batch_size: int = 100,
        num_leapfrog: int = 10,
        updates: int = 5,
        target_accept: float = 0.9,
        optimizer: Any = "adagrad",
        lr: float = 0.002,
        seed: int = 0,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("num_leapfrog", num_leapfrog), ("updates", updates)):
            if value < 1:
                raise UserError(f"MonteCarloEM: expected {name} of at least 1, got {value}")
        if not 0 < target_accept < 1:
            raise UserError(f"MonteCarloEM: expected target_accept between 0 and 1, got {target_accept}")
        self.program, self.seed, self.epoch = program, seed, 0
        self.num_leapfrog, self.updates, self.target_accept = num_leapfrog, updates, target_accept
        self.x, self.y = to_program(program, x), y
        density = Unconstrained(contract.admit(program, self.x, y), self.x, y)
        if density.program is not program:
            raise UserError(
                "MonteCarloEM: latents whose support has an edge need float64: program.double(), x.double()"
            )
        if layout_of(program, self.x) is not None or density.summed:
            raise UserError("MonteCarloEM: records and latents that are summed over are not built: use elbo")
        self.size = min(batch_size, len(x))
        with seeded(derive_seed("EM chains", seed), self.x.device):
            self.u = density.draw(1).detach()
        self.log_step = torch.full((), -1.0, dtype=self.u.dtype, device=self.u.device)
        self.posterior = _Posterior(density, self.size)
        named = dict(program.named_parameters())
        parameters = [
            named[name] for name in self.posterior.learned(self.u[:, : self.size], *self._rows(slice(self.size)))
        ]
        self.parameters = parameters
        self.optimizer = make_optimizer(parse_optimizer(optimizer), lr, parameters)

    def run(self, epochs: int = 1) -> list[dict[str, float]]:
        """So many epochs more; of each the mean log p(x, u) at the chains, their acceptance rate, and the step size."""
        return [self._epoch() for _ in range(epochs)]

    def latents(self) -> dict[str, Tensor]:
        """Where the chains stand, ``(N, *latent)`` by site."""
        with torch.no_grad():
            return {name: z[0] for name, z in self.posterior.density.constrain(self.u).items()}

    def state_dict(self) -> dict[str, Any]:
        """All that another trainer of the same program and data needs to go on to the bit."""
        state = {"program": self.program.state_dict(), "optimizer": self.optimizer.state_dict()}
        return copy.deepcopy({**state, "u": self.u, "log_step": self.log_step, "epoch": self.epoch})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        if state["u"].shape != self.u.shape:
            raise UserError(
                f"MonteCarloEM: the state's chains are {tuple(state['u'].shape)}, and here {tuple(self.u.shape)}"
            )
        state = copy.deepcopy(state)
        self.program.load_state_dict(state["program"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.u, self.log_step, self.epoch = state["u"], state["log_step"], state["epoch"]

    def _rows(self, rows: Any) -> tuple[Tensor, Tensor | None]:
        return self.x[rows], None if self.y is None else self.y[rows]

    def _epoch(self) -> dict[str, float]:
        device = self.u.device
        random = torch.Generator(device).manual_seed(derive_seed("EM epoch", self.seed, self.epoch))
        order = torch.randperm(len(self.x), generator=random, device=device)
        found = []
        # the last rows of an epoch that do not fill a minibatch wait for the next
        for rows in order.split(self.size):
            if len(rows) < self.size:
                continue
            path = self.posterior.on(*self._rows(rows))
            step, zero = self.log_step.exp().expand(self.size), torch.zeros_like(self.log_step)
            point, accepted = transition(path, path(self.u[:, rows]), zero, step, self.num_leapfrog, random)  # type: ignore[arg-type]
            self.u[:, rows] = point.u
            self.log_step = adapt(self.log_step, accepted.mean(1, keepdim=True), self.target_accept, RATE)[0]
            for _ in range(self.updates):
                log_joint, gradients = path.ascent(point.u)
                for parameter, gradient in zip(self.parameters, gradients, strict=True):
                    parameter.grad = -gradient
                self.optimizer.step()
            found.append(torch.stack([log_joint, accepted.mean()]))
        self.epoch += 1
        log_joint, rate = torch.stack(found).mean(0).tolist()
        if not math.isfinite(log_joint):
            raise UserError(f"MonteCarloEM: log p(x, z) is {log_joint} in epoch {self.epoch}: take a lower lr")
        return {
            "epoch": self.epoch,
            "log_joint": log_joint,
            "acceptance_rate": rate,
            "step_size": float(self.log_step.exp()),
        }


class _Posterior:
    """log p(x, u) of a block of rows, and its gradients in u and in the parameters, as graphs that serve any values of these."""

    def __init__(self, density: Unconstrained, size: int) -> None:
        self.density = density
        self.bound = OfProgram(density.program, lambda p, x, y, u: density.on(x, y).densities(u).log_joint)
        self.x, self.y = density.x[:size], None if density.y is None else density.y[:size]
        self.names: list[str] = []
        self._graphs: dict[str, Any] = {}

    def on(self, x: Tensor, y: Tensor | None) -> _Posterior:
        """The same for other rows."""
        self.x, self.y = x, y
        return self

    def learned(self, u: Tensor, x: Tensor, y: Tensor | None) -> list[str]:
        """The names of the parameters that log p(x, u) depends on."""
        named = {n: p for n, p in self.density.program.named_parameters() if p.requires_grad}
        with torch.enable_grad():
            total = self.bound.at(self.bound.tensors() | named, x, y, u).sum()
            grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
        self.names = [n for n, g in zip(named, grads, strict=True) if g is not None]
        return self.names

    def __call__(self, u: Tensor) -> Point:
        """The point at ``u`` ``(1, batch, D)``, of one temperature."""
        value, slope = self._run("point", u)
        return Point(u, value, torch.zeros_like(value), slope, torch.zeros_like(slope))

    def gradient(self, u: Tensor, beta: Tensor) -> Tensor:
        """The gradient in u; there is but one temperature."""
        return self._run("slope", u)[0]

    def ascent(self, u: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The mean of log p(x, u), and its gradients in the parameters that are learned."""
        value, *gradients = self._run("ascent", u)
        return value, tuple(gradients)

    def _run(self, what: str, u: Tensor) -> tuple[Tensor, ...]:
        tensors = self.bound.tensors()
        given = (u, self.x, *([] if self.y is None else [self.y]), *tensors.values())
        if what not in self._graphs:

            def function(u: Tensor, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
                y, values = (None, rest) if self.y is None else (rest[0], rest[1:])
                at = dict(zip(tensors, values, strict=True))
                return getattr(self, f"_{what}")(u, x, y, at)

            with evaluating(self.density.program):
                self._graphs[what] = captured(function, given, (0.9 * u, *given[1:]))
        with torch.no_grad(), evaluating(self.density.program):
            return self._graphs[what](*given)

    def _point(self, u: Tensor, x: Tensor, y: Tensor | None, at: dict[str, Tensor]) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            u = u.detach().requires_grad_(True)
            value = self.bound.at(at, x, y, u)
            return value.detach(), torch.autograd.grad(value.sum(), u)[0]

    def _slope(self, u: Tensor, x: Tensor, y: Tensor | None, at: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return self._point(u, x, y, at)[1:]

    def _ascent(self, u: Tensor, x: Tensor, y: Tensor | None, at: dict[str, Tensor]) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            learned = {n: at[n].detach().requires_grad_(True) for n in self.names}
            value = self.bound.at({**at, **learned}, x, y, u).mean()
            return value.detach(), *torch.autograd.grad(value, list(learned.values()))
