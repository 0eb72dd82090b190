"""The gated PixelCNN: convolutions over the rows above and over the row so far, without a blind spot."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from pyro_vae.networks.causal import Image


class Ahead(nn.Conv2d):
    """A convolution over what comes before a pixel, and itself: the rest, which a mask would hold at zero, is not multiplied.

    Args:
        inputs: channels.
        outputs: channels.
        reach: rows above, or columns before.
        wide: over rows, with as many columns on either side; else over the columns of the row so far.
        strict: without the pixel's own row (``wide``) or column.
        bias: whether there is one.
    """

    def __init__(
        self, inputs: int, outputs: int, reach: int, *, wide: bool = False, strict: bool, bias: bool = True
    ) -> None:
        length = reach if strict else reach + 1
        super().__init__(inputs, outputs, (length, 2 * reach + 1) if wide else (1, length), bias=bias)
        self.pad = (reach, reach, reach, 0) if wide else (reach, 0, 0, 0)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, outputs, H, W)`` of ``x`` ``(n, inputs, H, W)``."""
        h, w = x.shape[-2:]
        return super().forward(nn.functional.pad(x, self.pad))[..., :h, :w]

    def at(self, line: Tensor, column: int) -> Tensor:
        """The output ``(n, outputs)`` at one column of a row ``(n, inputs, reach + W)`` with zeros in front."""
        seen = line[..., column : column + self.kernel_size[1]]
        return nn.functional.linear(seen.flatten(1), self.weight.flatten(1), self.bias)

    def row(self, x: Tensor, row: int) -> Tensor:
        """The output ``(n, outputs, 1, W)`` of a wide one at one row of images ``(n, inputs, H, W)``."""
        left, right, above, _ = self.pad
        top = row - above
        seen = x[:, :, max(top, 0) : top + self.kernel_size[0]]
        return super().forward(nn.functional.pad(seen, (left, right, max(-top, 0), 0)))


def pointwise(layer: nn.Module, x: Tensor) -> Tensor:
    """A 1x1 convolution, or several, at one pixel: ``(n, outputs)`` of ``(n, inputs)``."""
    return cast(Tensor, layer(x[..., None, None]))[..., 0, 0]


def _gate(y: Tensor) -> Tensor:
    a, b = y.chunk(2, 1)
    return a.tanh() * b.sigmoid()


class _Layer(nn.Module):
    """v' = gate(V v), h' = h + R gate(H h + L V v): the vertical stack feeds the horizontal one, and not the reverse."""

    def __init__(self, inputs: int, channels: int, reach: int, *, first: bool) -> None:
        super().__init__()
        self.vertical = Ahead(inputs, 2 * channels, reach, wide=True, strict=first)
        self.horizontal = Ahead(inputs, 2 * channels, reach, strict=first, bias=False)
        self.link = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.residual = nn.Conv2d(channels, channels, 1)
        self.first = first

    def forward(self, v: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        above = self.vertical(v)
        out = self.residual(_gate(self.horizontal(h) + self.link(above)))
        return _gate(above), out if self.first else h + out


class GatedPixelCNN(Image):
    """Layers of two stacks: the vertical one sees the rows above, the horizontal one that and the row so far.

    Channels of one pixel see the pixels before it, and not each other. van den Oord et al. 2016, Conditional Image Generation
    with PixelCNN Decoders, https://arxiv.org/abs/1606.05328.

    Args:
        size: channels, height and width of x.
        features: numbers at every pixel.
        channels: of each stack.
        layers: their number; each sees ``kernel // 2`` rows and columns further.
        kernel: width of the convolutions, odd.
    """

    def __init__(self, size: tuple[int, int, int], features: int, *, channels: int, layers: int, kernel: int) -> None:
        super().__init__(size, features)
        inputs = [size[0], *[channels] * (layers - 1)]
        self.layers = nn.ModuleList(_Layer(i, channels, kernel // 2, first=n == 0) for n, i in enumerate(inputs))
        self.out = nn.Sequential(nn.ReLU(), nn.Conv2d(channels, features, 1), nn.ReLU())

    @property
    def stack(self) -> list[_Layer]:
        """The layers."""
        return cast(list[_Layer], list(self.layers))

    def maps(self, x: Tensor) -> Tensor:
        """``(n, features, H, W)`` of ``(n, C, H, W)``."""
        v = h = x
        for layer in self.stack:
            v, h = layer(v, h)
        return cast(Tensor, self.out(h))

    def begin(self, values: Tensor) -> list[list[Tensor]]:
        """Of every layer: rows that its vertical stack reads, the row so far of the other with zeros in front, and the link."""
        (_, h, w), n = self.size, len(values)

        def zeros(*shape: int) -> Tensor:
            return values.new_zeros(n, *shape)

        sizes = [(layer.vertical.in_channels, layer.horizontal.pad[0], layer.link.out_channels) for layer in self.stack]
        return [[zeros(inputs, h, w), zeros(inputs, reach + w), zeros(outputs, w)] for inputs, reach, outputs in sizes]

    def at(self, values: Tensor, kept: list[list[Tensor]], step: int) -> Tensor:
        """The vertical stack makes a row at once, when that begins; a pixel costs each layer one product."""
        row, column = divmod(step, self.size[2])
        x = self.image(values)
        if column == 0:
            self._begin_row(x, kept, row)
        else:
            kept[0][1][..., self.stack[0].horizontal.pad[0] + column - 1] = x[:, :, row, column - 1]
        h = x.new_zeros(())
        for n, (layer, (_, line, link)) in enumerate(zip(self.stack, kept, strict=True)):
            if n:
                line[..., layer.horizontal.pad[0] + column] = h
            gated = _gate(layer.horizontal.at(line, column) + link[..., column])
            h = h + pointwise(layer.residual, gated)
        return pointwise(self.out, h)

    def _begin_row(self, x: Tensor, kept: list[list[Tensor]], row: int) -> None:
        kept[0][0] = x
        for n, (layer, (v, line, link)) in enumerate(zip(self.stack, kept, strict=True)):
            above = layer.vertical.row(v, row)
            line.zero_()
            link.copy_(layer.link(above).squeeze(2))
            if n + 1 < len(kept):
                kept[n + 1][0][:, :, row] = _gate(above).squeeze(2)
