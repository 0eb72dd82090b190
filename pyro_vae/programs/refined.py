"""A VAE whose guide takes a few gradient steps per image from where the encoder put it: semi-amortized inference."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae.errors import UserError
from pyro_vae.programs.ascent import ascend
from pyro_vae.programs.vae import VAE
from pyro_vae.seeding import derive_seed, seeded

_ATEN = torch.ops.aten
_DRAWS = {
    _ATEN.normal_.default: _ATEN.normal_.default,
    _ATEN.randn.default: _ATEN.normal_.default,
    _ATEN.uniform_.default: _ATEN.uniform_.default,
    _ATEN.rand.default: _ATEN.uniform_.default,
}  # in place of which what is drawn


class _OneNoise(TorchDispatchMode):
    """While entered, normal and uniform draws ``(num_draws, batch, ...)`` are those of one row, for every row alike.

    What a row's ascent finds is then a function of the row, whatever other rows there are. Draws of other kinds stay as they are.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Draws of one row in place of those of all."""
        kwargs = kwargs or {}
        if func not in _DRAWS:
            return func(*args, **kwargs)
        target = args[0]
        if not isinstance(target, Tensor):
            target = torch.empty(target, dtype=kwargs.get("dtype"), device=kwargs.get("device"))
        if target.dim() < 2:
            return func(*args, **kwargs)
        one = target.new_empty((target.shape[0], 1, *target.shape[2:]))
        return target.copy_(_DRAWS[func](one, *args[1:]))


class Refined(nn.Module):
    """q(z | x) = posterior(h*), h* = encoder(x) after ``steps`` steps of Adam on the ELBO of this image.

    The features that the encoder hands to the posterior are freed, per image, and climb; the family stays what it is, so
    that refinement closes the amortization part of the inference gap and no other. The noise of the ascent has a seed of its
    own and is the same for every row: h* is a function of x, and importance weights under q stay unbiased. In training mode
    the step h* - h counts as a constant, so that the encoder is trained at the refined point, to first order. Kim et al.
    2018, Semi-Amortized Variational Autoencoders, https://arxiv.org/abs/1802.02550.

    The objective ``elbo`` and the functions of this library take it in the place of the VAE; with ``compile="off"``, for
    an ascent is no graph.

    Args:
        program: a VAE with a reparameterized posterior; its parameters are those of this program.
        steps: gradient steps per image.
        lr: the rate of Adam at the start; it falls to zero along a line.
        num_draws: draws of z per image and step.
        seed: of the noise of the ascent.

    Example:
        >>> import torch, pyro_vae as pv
        >>> from pyro_vae.programs.refined import Refined
        >>> vae = pv.build("ppca", "linear", (3,), latent_dim=2)
        >>> result = pv.log_likelihood(Refined(vae, steps=5), torch.zeros(4, 3), num_samples=100)
    """

    def __init__(self, program: VAE, *, steps: int = 20, lr: float = 0.05, num_draws: int = 8, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(program, VAE) or type(program).guide is not VAE.guide:
            raise UserError(
                f"expected a VAE of one layer, whose encoder's features can be refined; got {type(program).__name__}"
            )
        if min(steps, num_draws) < 1 or not 0 < lr < float("inf"):
            raise UserError(
                f"expected steps and num_draws of at least 1 and a positive lr, got {steps}, {num_draws}, {lr}"
            )
        self.program, self.steps, self.lr, self.num_draws, self.seed = program, steps, lr, num_draws, seed
        self.event_shape = program.event_shape
        self._last: tuple[list[Tensor], Any, Tensor] | None = None  # what the last features were found for, and they

    def model(self, x: Tensor) -> None:
        """p(z) p(x | z), the VAE's own."""
        self.program.model(x)

    def guide(self, x: Tensor) -> None:
        """q(z | x) at the refined features."""
        features = self.program.features(x)
        step = (self.refine(x) - features).detach()
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", self.program.posterior(features + step))

    def refine(self, x: Tensor) -> Tensor:
        """The features h* ``(batch, *feature_shape)``, without a gradient; kept for the next call with the same x and weights."""
        tensors = [x, *self.parameters()]
        state = (self.training, [t._version for t in tensors])
        if self._last is not None:
            for_tensors, for_state, found = self._last
            if for_state == state and all(a is b for a, b in zip(for_tensors, tensors, strict=True)):
                return found
        with seeded(derive_seed("refinement", self.seed), x.device), torch.enable_grad(), _OneNoise():
            found = self._climb(x)
        self._last = (tensors, state, found)
        return found

    def _climb(self, x: Tensor) -> Tensor:
        vae = self.program
        h = vae.features(x).detach().clone().requires_grad_(True)  # features may be x itself
        if not vae.posterior(h).has_rsample:
            raise UserError("the posterior is not reparameterized: its features cannot be refined by gradient steps")
        prior = vae.p(x)

        def elbo() -> Tensor:
            q = vae.posterior(h)
            z = q.rsample(torch.Size((self.num_draws,)))
            # without the score of q, where q can be scored at z anew: no noise is left where q is exact (Roeder et al. 2017)
            scored = vae.posterior(h.detach()) if vae.posterior.scoring == "cheap" else q
            log_weight = vae.likelihood(vae.decoder(z)).log_prob(x) + prior.log_prob(z) - scored.log_prob(z)
            total: Tensor = log_weight.mean(0).sum()
            return total

        ascend(elbo, [h], self.steps, self.lr)
        return h.detach()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}
