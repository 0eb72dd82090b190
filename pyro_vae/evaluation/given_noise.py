"""Normal and uniform random numbers as an input: written down as they are drawn, or read from what is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_vae.errors import UserError

NORMAL = {torch.Tensor.normal_, torch.randn, torch.randn_like, torch.normal}
UNIFORM = {torch.Tensor.uniform_, torch.rand, torch.rand_like}
OTHER = {
    torch.bernoulli, torch.multinomial, torch.poisson, torch.binomial, torch._standard_gamma, torch._sample_dirichlet,
    torch.Tensor.bernoulli_, torch.Tensor.exponential_, torch.Tensor.geometric_, torch.Tensor.cauchy_, torch.Tensor.log_normal_,
    torch.Tensor.multinomial, torch.Tensor.bernoulli, torch.randint, torch.randperm,
}  # fmt: skip


class GivenNoise(TorchFunctionMode):
    """While entered, standard normal and uniform numbers are read from ``noise``, in the order in which they are drawn.

    With None they are drawn, and ``drawn`` holds them afterwards.

    Raises:
        UserError: random numbers of another kind, or not of a standard law.
    """

    def __init__(self, noise: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.noise, self.drawn = noise, list[Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Random functions as said; every other as it is."""
        kwargs = kwargs or {}
        if func in OTHER:
            raise UserError(
                f"the guide draws by {getattr(func, '__name__', func)}, and only normal and uniform numbers can be an input: "
                "choose a guide that is reparameterized by these"
            )
        if func not in NORMAL | UNIFORM:
            return func(*args, **kwargs)
        scaled = func is torch.normal or (
            func in (torch.Tensor.normal_, torch.Tensor.uniform_) and (len(args) > 1 or kwargs.keys() - {"generator"})
        )
        if scaled:
            raise UserError(
                "random numbers that are an input are standard ones: draw them so, then shift and scale them"
            )
        if self.noise is None:
            found = func(*args, **kwargs)
            self.drawn.append(found.detach().clone())
            return found
        place = len(self.drawn)
        self.drawn.append(self.noise[place])
        like = args[0] if func in (torch.Tensor.normal_, torch.Tensor.uniform_) else None
        return self.noise[place] if like is None else like.copy_(self.noise[place])
