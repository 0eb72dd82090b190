"""The row LSTM of PixelRNN: a row at a time, its state from the row above and from the row so far."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from pyro_vae.networks.causal import Image
from pyro_vae.networks.masked_conv import MaskedConv
from pyro_vae.networks.pixel_cnn import Ahead, pointwise

FIRST = 7  # width of the convolution over x itself, which the LSTMs read


class _Layer(nn.Module):
    """(i, f, o, g) = K_s * h_above + K_i * (the row so far),   c = f c_above + i g,   h = o tanh(c)."""

    def __init__(self, channels: int, reach: int) -> None:
        super().__init__()
        self.to_state = Ahead(channels, 4 * channels, reach, strict=False)
        self.state = nn.Conv1d(channels, 4 * channels, 2 * reach + 1, padding=reach, bias=False)
        self.residual = nn.Conv2d(channels, channels, 1)

    def cell(self, gates: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
        i, f, o, g = gates.chunk(4, 1)
        c = (f + 1).sigmoid() * above + i.sigmoid() * g.tanh()  # at the start, what is above is remembered
        return o.sigmoid() * c.tanh(), c

    def forward(self, x: Tensor) -> Tensor:
        gates, rows = self.to_state(x), list[Tensor]()
        h = c = torch.zeros_like(x[:, :, 0])
        for row in range(x.shape[2]):
            h, c = self.cell(gates[:, :, row] + self.state(h), c)
            rows.append(h)
        return x + cast(Tensor, self.residual(torch.stack(rows, 2)))


class RowLSTM(Image):
    """A masked convolution over x, and layers of LSTMs that walk down the image: a pixel sees the triangle above it.

    Channels of one pixel see the pixels before it, and not each other. van den Oord, Kalchbrenner & Kavukcuoglu 2016, Pixel
    Recurrent Neural Networks, https://arxiv.org/abs/1601.06759.

    Args:
        size: channels, height and width of x.
        features: numbers at every pixel.
        channels: of the states.
        layers: of LSTMs.
        kernel: width of their convolutions, odd.
    """

    def __init__(self, size: tuple[int, int, int], features: int, *, channels: int, layers: int, kernel: int) -> None:
        super().__init__(size, features)
        self.first = MaskedConv(size[0], channels, FIRST, channels_of_x=1, own=False)
        self.layers = nn.ModuleList(_Layer(channels, kernel // 2) for _ in range(layers))
        self.out = nn.Sequential(nn.ReLU(), nn.Conv2d(channels, features, 1), nn.ReLU())

    @property
    def stack(self) -> list[_Layer]:
        """The layers."""
        return cast(list[_Layer], list(self.layers))

    def maps(self, x: Tensor) -> Tensor:
        """``(n, features, H, W)`` of ``(n, C, H, W)``."""
        h = self.first(x)
        for layer in self.stack:
            h = layer(h)
        return cast(Tensor, self.out(h))

    def begin(self, values: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
        """x with zeros around; of every layer the row so far with zeros in front, its states, cells, cells above and gates."""
        n, (c, height, width), pad = len(values), self.size, FIRST // 2
        kept = []
        for layer in self.stack:
            reach, channels = layer.to_state.pad[0], layer.state.in_channels
            sizes = [(channels, reach + width), *[(channels, width)] * 3, (4 * channels, width)]
            kept.append([values.new_zeros(n, *size) for size in sizes])
        return values.new_zeros(n, c, height + 2 * pad, width + 2 * pad), kept

    def at(self, values: Tensor, kept: tuple[Tensor, list[list[Tensor]]], step: int) -> Tensor:
        """What comes from the row above is computed when a row begins; a pixel costs each layer one product."""
        (row, column), (x, layers), pad = divmod(step, self.size[2]), kept, FIRST // 2
        if step:
            last, end = divmod(step - 1, self.size[2])
            x[:, :, last + pad, end + pad] = values[:, step - 1]
        h = self.first.at(x, row, column)
        for layer, (line, states, cells, above, gates) in zip(self.stack, layers, strict=True):
            if column == 0:
                line.zero_()
                above.copy_(cells)
                gates.copy_(layer.state(states))
            line[..., layer.to_state.pad[0] + column] = h
            new = layer.to_state.at(line, column) + gates[..., column]
            states[..., column], cells[..., column] = layer.cell(new, above[..., column])
            h = h + pointwise(layer.residual, states[..., column])
        return pointwise(self.out, h)
