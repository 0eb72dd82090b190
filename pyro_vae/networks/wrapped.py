"""A user's own ``nn.Module`` as a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_vae.errors import UserError
from pyro_vae.networks.base import Network, Shape


class Wrapped(Network):
    """Any module of one leading axis, ``(n, *in_shape) -> (n, *out_shape)``, made to take any leading axes.

    The shape of its features is found by applying it once to zeros, in evaluation mode and without gradients.
    """

    def __init__(self, in_shape: Shape, module: nn.Module) -> None:
        training = module.training
        like = next(module.parameters(), torch.empty(0))
        try:
            with torch.no_grad():
                y = module.eval()(torch.zeros(2, *in_shape, dtype=like.dtype, device=like.device))
        except Exception as error:
            raise UserError(
                f"the network {type(module).__name__} does not take a batch of shape {(2, *in_shape)}: {error}"
            ) from error
        finally:
            module.train(training)
        if not isinstance(y, Tensor) or y.dim() < 2 or y.shape[0] != 2:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise UserError(f"the network {type(module).__name__} must return one tensor (n, *features), not {got}")
        super().__init__(in_shape, tuple(y.shape[1:]))
        self.module = module

    def features(self, x: Tensor) -> Tensor:
        """The module's own output."""
        return self.module(x)
