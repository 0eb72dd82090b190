"""Matplotlib axes for images, points and curves, without pyplot: nothing global is read or changed."""

from __future__ import annotations

import functools
import io
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from pyro_vae.errors import UserError
from pyro_vae.paths import writable
from pyro_vae.training.files import write_bytes

P = ParamSpec("P")
R = TypeVar("R")

PICTURES = (".png", ".pdf", ".svg")
UNTOUCHED = {"backend", "backend_fallback", "interactive", "toolbar", "datapath"}  # of matplotlib's settings
DPI = 100
MARGIN, TITLE, LINE = 10, 16, 20  # pixels: around a picture of images, above its title, and for a line of the title
SMALLEST = 480  # pixels: the width of a figure, so that its title fits
WIDTH, LARGEST_CELL = 1000, 240  # pixels: what a grid of images is fitted to, and the largest single image
FRAME, PAPER = (0.36, 0.44, 0.55), (1.0, 1.0, 1.0)  # a frame of a hue is seen beside black, grey and white alike
SQUARE, LONG = (7.2, 5.8), (8.5, 4.5)  # inches: of points with a legend beside them, and of curves
LONGEST_NAMED = 60  # columns that are named below a picture
_SPOKEN: ContextVar[tuple[bool, tuple[str, ...]]] = ContextVar("spoken", default=(False, ()))
POINT_COLOURS = ("0.6", "tab:blue")


def image_grid(
    images: Any,
    ncols: int | None = None,
    ax: Axes | None = None,
    *,
    title: str | None = None,
    wide_rows: Collection[int] = (),
    wide_columns: Collection[int] = (),
) -> Axes:
    """Draw images in rows and columns with a thin gap, and nothing else.

    Args:
        images: tensor or array ``(n, H, W)``, ``(n, 1, H, W)`` or ``(n, 3, H, W)``; floats are clipped to [0, 1], with 0
            black and 1 white, integers are taken as levels of 0 to 255; an image of NaN leaves its place empty.
        ncols: images per row; the square root of n, rounded up, where None.
        ax: where to draw; None makes a figure in which every pixel of an image is a whole number of pixels.
        title: a line above.
        wide_rows: numbers of rows (from 0) above which the gap is wider.
        wide_columns: numbers of columns to the left of which the gap is wider.

    Returns:
        The axes; ``ax.figure`` is the figure.

    Raises:
        UserError: no images, or arrays that are none.

    Example:
        >>> import torch
        >>> image_grid(torch.rand(6, 1, 8, 8), ncols=3).get_images()[0].get_array().ndim
        3
    """
    pixels = _pixels(images)
    if ncols is None:
        ncols = math.ceil(math.sqrt(len(pixels)))
    if ncols < 1:
        raise UserError(f"ncols = {ncols}: expected at least one image per row")
    mosaic = _mosaic(pixels, min(ncols, len(pixels)), set(wide_rows), set(wide_columns))
    own = ax is None
    if ax is None:
        ax = _image_axes(mosaic.shape[0], mosaic.shape[1], 0 if title is None else 1 + title.count("\n"))
    ax.imshow(mosaic, aspect="auto" if own else "equal", interpolation="nearest" if own else "antialiased")
    ax.set_axis_off()
    if title is not None:
        ax.set_title(title, fontsize=11)
    return ax


def points(
    sets: dict[str, Any], ax: Axes | None = None, *, title: str | None = None, joined: bool = False, size: float = 8.0
) -> Axes:
    """Scatter one or two sets of points ``(n, 2)`` by name; ``joined`` draws a line from each of the first to its second."""
    if ax is None:
        ax = new_axes(SQUARE)
    arrays = {name: as_array(x) for name, x in sets.items()}
    if joined:
        first, second = arrays.values()
        ax.plot(*np.stack([first, second]).transpose(2, 0, 1), color="0.8", linewidth=0.6, zorder=1)
    for (name, x), colour in zip(arrays.items(), POINT_COLOURS[-len(arrays) :], strict=True):
        ax.scatter(x[:, 0], x[:, 1], s=size, color=colour, label=name, linewidths=0, zorder=2)
    if len(arrays) > 1:
        legend_beside(ax)
    ax.set_aspect("equal", adjustable="datalim")
    return finish(ax, title, "$x_1$", "$x_2$")


@contextmanager
def speaking(*, series: bool = False, columns: Sequence[str] = ()) -> Iterator[None]:
    """While entered, data of two axes are ``series`` (time, channel), and those of one the named ``columns`` of a table."""
    before = _SPOKEN.set((series, tuple(columns)))
    try:
        yield
    finally:
        _SPOKEN.reset(before)


def curves(sets: dict[str, Any], ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """Draw vectors ``(n, D)`` or series ``(n, T, C)`` against their index, and columns of a table above their names.

    The sets by name differ in the style of line, the vectors in colour.
    """
    if ax is None:
        ax = new_axes(LONG)
    columns = _SPOKEN.get()[1]
    sets = {name: as_array(x) for name, x in sets.items()}
    if columns:  # of other units each
        every = np.concatenate(list(sets.values()))
        sd = np.nanstd(every, 0)
        sets = {name: (x - np.nanmean(every, 0)) / np.where(sd > 0, sd, 1.0) for name, x in sets.items()}
    for (name, x), style in zip(sets.items(), ("o", "x") if columns else ("-", "--"), strict=False):
        for row, vector in enumerate(x):
            lines = ax.plot(vector, style, color=f"C{row % 10}", linewidth=1.2, markersize=5)
            lines[0].set_label(name if row == 0 else None)
    if len(sets) > 1:
        legend_beside(ax)
    along = name_elements(ax)
    return finish(ax, title, along, "standard deviations of what is shown" if columns else "value")


def name_elements(ax: Axes, most: int = LONGEST_NAMED) -> str:
    """What the elements of a vector are, below axes that have them from left to right; columns, if few, get their names."""
    series, columns = _SPOKEN.get()
    if columns and len(columns) <= most:
        ax.set_xticks(
            range(len(columns)), [plain(c) for c in columns], rotation=90 if len(columns) > 6 else 0, fontsize=8
        )
    return "time" if series else "column" if columns else "element of the vector"


def finish(ax: Axes, title: str | None, xlabel: str, ylabel: str) -> Axes:
    """Title, labels and two quiet spines."""
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.spines[["top", "right"]].set_visible(False)
    if title is not None:
        ax.set_title(title, fontsize=11)
    return ax


def legend_beside(ax: Axes) -> None:
    """A legend to the right of the axes, where it hides nothing."""
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def new_figure(inches: tuple[float, float]) -> Figure:
    """A figure that pyplot knows nothing of."""
    figure = Figure(figsize=inches, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_axes(inches: tuple[float, float]) -> Axes:
    """Axes of a new figure."""
    return new_figure(inches).add_subplot()


def plain(text: str) -> str:
    """A name of the user's as matplotlib shows it unchanged: no mathematics in it, and no label that is left out."""
    text = "".join(c if c.isprintable() else " " for c in text).replace("$", "\\$")
    return f" {text}" if text.startswith("_") else text


def save(picture: Axes | Figure, path: str | Path) -> Path:
    """Write a figure, or the figure of some axes, as PNG, PDF or SVG by the name's ending: the whole file or nothing.

    Raises:
        UserError: another ending, or a place that cannot be written to.
    """
    path = destination(path)
    figure: Any = picture
    while not isinstance(figure, Figure):
        figure = figure.figure
    buffer = io.BytesIO()
    kind = path.suffix.lower()[1:]
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)  # the same figure is the same file
    with own_style():
        for text in figure.findobj(Text):
            text.set_usetex(False)
        figure.savefig(buffer, format=kind, dpi=figure.dpi, metadata=undated)
    write_bytes(path, buffer.getvalue())
    return path


def destination(path: str | Path, *, arrays: bool = False) -> Path:
    """``path`` if a picture (or ``arrays``) can be written there; else a :class:`UserError`, before any work is done."""
    return writable(path, (*PICTURES, ".npy") if arrays else PICTURES, "pictures are written as PNG, PDF or SVG")


@contextmanager
def own_style() -> Iterator[None]:
    """While entered, matplotlib draws as it comes, whatever a matplotlibrc says of LaTeX, fonts, colours and sizes."""
    ours = {k: v for k, v in matplotlib.rcParamsDefault.items() if k not in UNTOUCHED}
    with warnings.catch_warnings(), matplotlib.rc_context():
        warnings.simplefilter("ignore", matplotlib.MatplotlibDeprecationWarning)
        matplotlib.rcParams.update(ours)
        matplotlib.rcParams["svg.hashsalt"] = "pyro-vae"
        yield


def drawn(function: Callable[P, R]) -> Callable[P, R]:
    """A function that draws, in :func:`own_style`."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with own_style():
            return function(*args, **kwargs)

    return call


def as_array(x: Any) -> np.ndarray:
    """A tensor, or anything like an array, as numpy on the host."""
    return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)


def is_image(shape: tuple[int, ...]) -> bool:
    """Whether a datum of this shape is drawn as an image: (H, W), (1, H, W) or (3, H, W)."""
    return (len(shape) == 2 and not _SPOKEN.get()[0]) or (len(shape) == 3 and shape[0] in (1, 3))


def require_drawable(shape: tuple[int, ...]) -> None:
    """:class:`UserError` for a datum that is neither an image nor a vector."""
    if not is_image(shape) and len(shape) != 1 and not (len(shape) == 2 and _SPOKEN.get()[0]):
        raise UserError(
            f"there is no picture for data of shape {tuple(shape)}: expected images (H, W), (1, H, W) or (3, H, W), or "
            "vectors (D,); draw a slice of pv.sample or pv.reconstruct with image_grid"
        )


def _pixels(images: Any) -> np.ndarray:
    """Floats in [0, 1], ``(n, H, W, 3)``."""
    x = as_array(images)
    if x.ndim not in (3, 4) or not is_image(x.shape[1:]) or x.size == 0:
        raise UserError(
            f"expected at least one image, (n, H, W), (n, 1, H, W) or (n, 3, H, W); got an array of shape {x.shape}"
        )
    x = x.astype(np.float32) / (1.0 if x.dtype.kind in "fb" else 255.0)
    x = x[..., None] if x.ndim == 3 else x.transpose(0, 2, 3, 1)
    return np.broadcast_to(np.clip(x, 0.0, 1.0), (*x.shape[:3], 3))


def _mosaic(pixels: np.ndarray, ncols: int, wide_rows: set[int], wide_columns: set[int]) -> np.ndarray:
    """All images in one array ``(height, width, 3)``, each pixel repeated so that the thin gap is thin."""
    n, h, w, _ = pixels.shape
    nrows = math.ceil(n / ncols)
    scale = max(1, round(min(LARGEST_CELL, WIDTH / ncols) / max(h, w)))
    pixels = pixels.repeat(scale, 1).repeat(scale, 2)
    h, w = h * scale, w * scale
    gap = max(2, round(0.03 * max(h, w)), min(4, round(0.45 * scale)))  # seen between large pixels too

    def starts(count: int, length: int, wide: set[int]) -> list[int]:
        extra = np.cumsum([4 * gap if i in wide else 0 for i in range(count)])
        return [gap + i * (length + gap) + int(e) for i, e in enumerate(extra)]

    rows, columns = starts(nrows, h, wide_rows), starts(ncols, w, wide_columns)
    mosaic = np.empty((rows[-1] + h + gap, columns[-1] + w + gap, 3), dtype=np.float32)
    mosaic[:] = PAPER
    for i, image in enumerate(pixels):
        top, left = rows[i // ncols], columns[i % ncols]
        if not np.isnan(image).all():
            mosaic[top - gap : top + h + gap, left - gap : left + w + gap] = FRAME
            mosaic[top : top + h, left : left + w] = image
    return mosaic


def _image_axes(height: int, width: int, title_lines: int) -> Axes:
    """Axes of exactly ``height`` x ``width`` pixels in a figure with room for a title."""
    top = TITLE + LINE * title_lines if title_lines else MARGIN
    total_w, total_h = max(width, SMALLEST) + 2 * MARGIN, height + MARGIN + top
    # a hundredth of a pixel more, because the canvas rounds down
    figure = Figure(figsize=((total_w + 0.01) / DPI, (total_h + 0.01) / DPI), dpi=DPI)
    FigureCanvasAgg(figure)
    left = (total_w - width) // 2
    return figure.add_axes((left / total_w, MARGIN / total_h, width / total_w, height / total_h))
