"""Masked convolutions over x: every output sees the pixels before its own, and nothing after."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Image = tuple[int, int, int]


class MaskedConv(nn.Conv2d):
    """A convolution whose output at a pixel sees the pixels before it in raster order, and of its own what comes before.

    Inputs and outputs belong to the channels of x in turn. At its own pixel, an output of channel c sees
    the inputs of channels below c (``own=False``, mask A) or up to c (``own=True``, mask B).
    """

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, *, channels_of_x: int, own: bool) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        below, above = torch.arange(inputs) % channels_of_x, torch.arange(outputs) % channels_of_x
        centre = (above[:, None] >= below) if own else (above[:, None] > below)
        rows, columns = torch.arange(kernel)[:, None], torch.arange(kernel)
        before = (rows < kernel // 2) | ((rows == kernel // 2) & (columns < kernel // 2))
        mask = before.float().expand(outputs, inputs, kernel, kernel).clone()
        mask[:, :, kernel // 2, kernel // 2] = centre.float()
        self.register_buffer("mask", mask, persistent=False)

    def masked(self) -> Tensor:
        """The weight with zeros where the mask is."""
        return self.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        """``(n, outputs, H, W)`` of ``x`` ``(n, inputs, H, W)``."""
        return nn.functional.conv2d(x, self.masked(), self.bias, padding=self.padding)

    def at(self, padded: Tensor, row: int, column: int) -> Tensor:
        """The output ``(n, outputs)`` at one pixel, of an input padded by ``kernel // 2`` on all sides."""
        kernel = self.kernel_size[0]
        patch = padded[:, :, row : row + kernel // 2 + 1, column : column + kernel]
        weight = self.masked()[:, :, : kernel // 2 + 1]  # the rows below are masked
        return nn.functional.linear(patch.flatten(1), weight.flatten(1), self.bias)


class PixelNet(nn.Module):
    """A residual stack of masked convolutions: one with mask A, ``layers`` with mask B, and a 1x1 one to the outputs.

    Maps made of z are added before every layer through 1x1 convolutions of their own. The last layer starts at zero, so that
    the outputs start independent of x. Van den Oord, Kalchbrenner & Kavukcuoglu 2016, https://arxiv.org/abs/1601.06759.

    A stack of masks sees most of the pixels before, not all: a wedge above and to the right stays blind (van den Oord et al.
    2016, https://arxiv.org/abs/1606.05328). The density is exact all the same.

    Args:
        image: channels, height and width of x.
        channels: of the hidden layers, at least as many as x has.
        layers: the number of hidden layers with mask B.
        kernel: an odd width of the convolutions.
        maps: channels of the maps made of z.
    """

    def __init__(self, image: Image, *, channels: int, layers: int, kernel: int, maps: int) -> None:
        super().__init__()
        self.image, self.channels, c = image, channels, image[0]
        self.first = MaskedConv(c, channels, kernel, channels_of_x=c, own=False)
        self.hidden = nn.ModuleList(
            MaskedConv(channels, channels, kernel, channels_of_x=c, own=True) for _ in range(layers)
        )
        self.last = MaskedConv(channels, c, 1, channels_of_x=c, own=True)
        self.context = nn.ModuleList(nn.Conv2d(maps, channels, 1, bias=False) for _ in range(layers + 1))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, maps: Tensor) -> Tensor:
        """``(*leading, C, H, W)`` of x ``(*, C, H, W)`` and maps ``(*, maps, H, W)``, whose leading axes broadcast.

        What depends on x alone is computed once per x.
        """
        h = _each(self.first, x) + _each(self.context[0], maps)
        for layer, context in zip(self.hidden, self.context[1:], strict=True):
            h = h + _each(layer, nn.functional.silu(h)) + _each(context, maps)
        return _each(self.last, nn.functional.silu(h))

    @torch.no_grad()
    def sample(self, logits: Tensor, maps: Tensor) -> Tensor:
        """Binary images ``(n, C, H, W)`` with log-odds ``logits`` + the net's output, pixel by pixel.

        Every pixel costs one evaluation of each layer at that pixel alone: what the layers made of the pixels before is kept.

        Args:
            logits: ``(n, C, H, W)``.
            maps: ``(n, maps, H, W)``.
        """
        (c, height, width), n = self.image, len(logits)
        half = self.first.kernel_size[0] // 2
        context = [layer(maps) for layer in self.context]

        def padded(channels: int) -> Tensor:
            return logits.new_zeros(n, channels, height + 2 * half, width + 2 * half)

        x, kept = padded(c), [padded(self.channels) for _ in self.hidden]
        uniform = torch.rand_like(logits)
        for row in range(height):
            for column in range(width):
                for channel in range(c):
                    h = self.first.at(x, row, column) + context[0][:, :, row, column]
                    for layer, seen, added in zip(self.hidden, kept, context[1:], strict=True):
                        seen[:, :, row + half, column + half] = nn.functional.silu(h)
                        h = h + layer.at(seen, row, column) + added[:, :, row, column]  # type: ignore[operator]
                    out = nn.functional.linear(nn.functional.silu(h), self.last.masked().flatten(1), self.last.bias)
                    odds = (logits[:, channel, row, column] + out[:, channel]).sigmoid()
                    x[:, channel, row + half, column + half] = (uniform[:, channel, row, column] < odds).to(x.dtype)
        return x[:, :, half : half + height, half : half + width].clone()


def _each(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer of images ``(n, C, H, W)`` under any leading axes."""
    y = layer(x.reshape(-1, *x.shape[-3:]))
    return y.reshape(*x.shape[:-3], *y.shape[1:])
