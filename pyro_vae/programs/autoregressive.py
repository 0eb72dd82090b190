"""Tractable densities of x as Pyro programs: no latents, a guide that samples nothing, and log p(x) exact from one pass.

    p(x) = prod_d p(x_d | f_d(x_<d))        x_d | x_<d ~ likelihood(f_d(x_<d))

f is a network whose features of a place see the places before it alone (:mod:`pyro_vae.networks.causal`); any likelihood
describes a place by them: bernoulli on bits, categorical or discretized-logistic-mixture on levels, normal on numbers.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pydantic import AfterValidator, Field
from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_vae.errors import UserError
from pyro_vae.likelihoods.base import Likelihood
from pyro_vae.networks.causal import Causal
from pyro_vae.networks.dense import Widths
from pyro_vae.networks.heads import Head
from pyro_vae.networks.made import MADE
from pyro_vae.networks.pixel_cnn import GatedPixelCNN
from pyro_vae.networks.row_lstm import RowLSTM
from pyro_vae.registry import register

Shape = tuple[int, ...]
Family = Callable[[Shape, Shape], Likelihood]  # of the shapes of the features and of the event at one place
_WATCH = threading.local()


def _odd(kernel: int) -> int:
    if kernel % 2 == 0:
        raise ValueError("expected an odd number")
    return kernel


Channels = Annotated[int, Field(ge=1, le=10_000)]
Layers = Annotated[int, Field(ge=1, le=100)]
Kernel = Annotated[int, Field(ge=3, le=99), AfterValidator(_odd)]


class Autoregressive(nn.Module):
    """A density of x without latents.

    Args:
        nets: of each the features of every place; of several the density is the mean of theirs.
        likelihood: of one place, ``channels`` numbers.
        event_shape: of x.
    """

    latents = False  # whether prior, posterior and networks for them are declared
    spec: Any = None  # what it was declared by, for the record of a run
    trained = False

    def __init__(self, nets: Sequence[Causal], likelihood: Likelihood, event_shape: Shape) -> None:
        super().__init__()
        self.nets, self.likelihood, self.event_shape = nn.ModuleList(nets), likelihood, tuple(event_shape)

    @property
    def formulas(self) -> dict[str, str]:
        """What the program is in mathematics, part by part; z in the likelihood's are the features of a place."""
        return {"density": "p(x) = prod_d p(x_d | z_d), z_d = f_d(x_<d)", "likelihood": self.likelihood.formula}

    def model(self, x: Tensor) -> None:
        """p(x)."""
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("x", PlaceByPlace(self.nets, self.likelihood, self.event_shape), obs=x)

    def guide(self, x: Tensor) -> None:
        """Nothing: there are no latents."""

    def start_at(self, mean: Tensor, spread: float | None = None) -> None:
        """Start where every place has about the mean of the mean image ``(*event_shape)`` of the training data."""
        self.likelihood.start_at(mean.reshape(self.likelihood.event_shape[0], -1).mean(1), spread)


class PlaceByPlace(dist.TorchDistribution):
    """x whose places are drawn in turn, each given those before; of several networks, the mean of their densities.

    Args:
        nets: the networks.
        likelihood: the distribution of one place ``(channels,)``, by its features.
        event_shape: of x, channels first.
        batch_shape: of copies.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, nets: Any, likelihood: Likelihood, event_shape: Shape, batch_shape: Shape = ()) -> None:
        self.nets, self.likelihood = nets, likelihood
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=False)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """That of the likelihood at every place."""
        return constraints.independent(self.likelihood.support, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> PlaceByPlace:
        """Copies."""
        return PlaceByPlace(self.nets, self.likelihood, tuple(self.event_shape), tuple(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log p(x), ``(*leading,)``: one pass of each network."""
        leading = value.shape[: value.dim() - len(self.event_shape)]
        channels = self.likelihood.event_shape[0]
        values = value.reshape(-1, channels, self.event_shape.numel() // channels).transpose(1, 2)
        each = [self.likelihood(net(values)).log_prob(values).sum(-1) for net in self.nets]
        total = each[0] if len(each) == 1 else torch.stack(each).logsumexp(0) - math.log(len(each))
        return total.reshape(leading).expand(torch.broadcast_shapes(leading, self.batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws ``(*sample_shape, *batch_shape, *event_shape)``; of several networks, each by one that is drawn for it."""
        shape, own = torch.Size(sample_shape) + self.batch_shape, next(self.likelihood.parameters())
        which = torch.randint(len(self.nets), (shape.numel(),), device=own.device) if len(self.nets) > 1 else None
        channels = self.likelihood.event_shape[0]
        found = own.new_zeros(shape.numel(), self.event_shape.numel() // channels, channels)
        for number, net in enumerate(self.nets):
            rows = slice(None) if which is None else (which == number).nonzero().squeeze(1)
            values = torch.zeros_like(found[rows])
            if not len(values):
                continue
            kept = net.begin(values)
            for step, place in enumerate(net.order):
                values[:, place] = self.likelihood(net.at(values, kept, step)).sample()
                if (watch := getattr(_WATCH, "watch", None)) is not None:
                    watch((step + 1 + number * len(net.order)) / (len(net.order) * len(self.nets)))
            found[rows] = values
        return found.transpose(1, 2).reshape(shape + self.event_shape)


@contextmanager
def watched(watch: Callable[[float], None] | None) -> Iterator[None]:
    """While entered, ``watch``, if there is one, is told by this thread's draws, after every place, what part of them is done."""
    before = getattr(_WATCH, "watch", None)
    _WATCH.watch = watch
    try:
        yield
    finally:
        _WATCH.watch = before


@register("programs", "made")
class MaskedAutoencoder(Autoregressive):
    """MADE: one masked dense network for every conditional; several orders and masks, that share weights, as a mixture.

    Germain et al. 2015, https://arxiv.org/abs/1502.03509, for bits. The mean of the densities of ``masks`` networks is one
    itself, and is what is trained and evaluated: the paper averages in evaluation alone.

    Args:
        hidden: widths of the hidden layers.
        direct: whether entries reach the outputs also by a linear map.
        masks: how many draws of connectivity, each a pass.
        shuffle: whether each has an order of its own too, and not that of x.
        features: numbers that the likelihood reads at an entry; as many as levels for a categorical one.
    """

    def __init__(
        self,
        event_shape: Shape,
        likelihood: Family,
        *,
        hidden: Widths = (1000,),
        direct: bool = True,
        masks: Annotated[int, Field(ge=1, le=128)] = 1,
        shuffle: bool = False,
        features: Annotated[int, Field(ge=1, le=65_536)] = 1,
    ) -> None:
        dim = math.prod(event_shape)
        nets = [MADE(dim, features, hidden, direct=direct, shuffle=shuffle)]
        nets += [MADE(dim, features, hidden, shuffle=shuffle, number=n, like=nets[0]) for n in range(1, masks)]
        super().__init__(nets, likelihood((features,), (1,)), event_shape)
        for head in self.likelihood.modules():
            if isinstance(head, Head):  # outputs have weights and biases of their own
                nn.init.eye_(head.map.weight)


class _OfPixels(Autoregressive):
    """What convolves over images ``(C, H, W)``, or ``(H, W)``; ``(D,)`` is a row."""

    network: ClassVar[Callable[..., Causal]]

    def __init__(self, event_shape: Shape, likelihood: Family, features: int, **options: Any) -> None:
        if len(event_shape) > 3:
            raise UserError(f"pixels of images (C, H, W) are drawn in turn, and events have shape {tuple(event_shape)}")
        channels, height, width = (*(1,) * (3 - len(event_shape)), *event_shape)
        net = type(self).network((channels, height, width), features, **options)
        super().__init__([net], likelihood((features,), (channels,)), event_shape)


@register("programs", "pixelcnn")
class PixelCNN(_OfPixels):
    """Gated convolutions in two stacks over the pixels before: all conditionals in one pass, a draw pixel by pixel.

    van den Oord et al. 2016, https://arxiv.org/abs/1606.05328. Colours of one pixel are independent given the pixels before it.

    Args:
        channels: of each stack.
        layers: their number.
        kernel: width of the convolutions, odd.
        features: numbers that the likelihood reads at a pixel.
    """

    network = GatedPixelCNN

    def __init__(
        self,
        event_shape: Shape,
        likelihood: Family,
        *,
        channels: Channels = 32,
        layers: Layers = 6,
        kernel: Kernel = 5,
        features: Channels = 32,
    ) -> None:
        super().__init__(event_shape, likelihood, features, channels=channels, layers=layers, kernel=kernel)


@register("programs", "pixelrnn")
class PixelRNN(_OfPixels):
    """Row LSTMs over the pixels before: every row in turn, and so a step as many times slower as there are rows.

    van den Oord, Kalchbrenner & Kavukcuoglu 2016, https://arxiv.org/abs/1601.06759. Colours of one pixel are independent
    given the pixels before it.

    Args:
        channels: of the states.
        layers: their number.
        kernel: width of the convolutions, odd.
        features: numbers that the likelihood reads at a pixel.
    """

    network = RowLSTM

    def __init__(
        self,
        event_shape: Shape,
        likelihood: Family,
        *,
        channels: Channels = 32,
        layers: Layers = 3,
        kernel: Kernel = 3,
        features: Channels = 32,
    ) -> None:
        super().__init__(event_shape, likelihood, features, channels=channels, layers=layers, kernel=kernel)
