"""One self-contained HTML page: sections of figures, tables and notes, in one template; nothing is fetched from anywhere.

Everything that comes from a run (names, paths, specs, labels) is untrusted and goes through Jinja's autoescaping.
"""

from __future__ import annotations

import base64
import io
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from pyro_vae import __version__
from pyro_vae.analysis.drawing import own_style
from pyro_vae.errors import UserError
from pyro_vae.paths import writable
from pyro_vae.training.files import write_text

TEMPLATE = "page.html"
IMAGE = re.compile(r"(?<![\w./-])[Ii]mage(s?)(?![\w/-]|\.\w)")
WIDE = 480  # CSS pixels: plots that are wider keep letters that can be read, in a box that scrolls on a phone
SHARP = 150  # dots per inch of lines and text; pictures of images keep the size at which their pixels are whole


@dataclass(frozen=True)
class Block:
    """A piece of a section: figure, row (of figures), table, facts, code, note, warning or omitted."""

    kind: str
    content: dict[str, Any]


@dataclass
class Section:
    """A titled part of the page, filled from the top down.

    What a program or its data cannot have (a :class:`UserError`, or a density that is not implemented) becomes a line that says
    why; any other error is a fault, and is not caught.
    """

    key: str
    title: str
    lead: str = ""
    blocks: list[Block] = field(default_factory=list)

    def figure(self, what: str, make: Callable[[], Axes | Figure], caption: str) -> None:
        """A picture of ``what``, with a caption below."""

        def add() -> None:
            self.blocks.append(Block("figure", picture(make(), what, caption)))

        self.attempt(what, add)

    def row(self, figures: Iterable[tuple[str, Callable[[], Axes | Figure]]]) -> None:
        """Pictures side by side, each with its name below."""
        found: list[dict[str, Any]] = []
        for name, make in figures:
            self.attempt(name, lambda name=name, make=make: found.append(picture(make(), name, name)))  # type: ignore[misc]
        if found:
            self.blocks.append(Block("row", {"figures": found}))

    def table(
        self, head: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "", *, folded: bool = False
    ) -> None:
        """A table in a box of its own; ``folded`` shows the caption until it is opened."""
        cells = [[str(cell) for cell in row] for row in rows]
        self.blocks.append(Block("table", {"head": list(head), "rows": cells, "caption": caption, "folded": folded}))

    def facts(self, facts: Sequence[tuple[str, str, str]]) -> None:
        """Figures that are read first: name, value, and a word on the value."""
        self.blocks.append(Block("facts", {"facts": list(facts)}))

    def code(self, caption: str, text: str) -> None:
        """Text as it stands."""
        self.blocks.append(Block("code", {"caption": caption, "text": text}))

    def note(self, text: str) -> None:
        """A paragraph."""
        self.blocks.append(Block("note", {"text": text}))

    def warning(self, text: str) -> None:
        """What stands against a number, verbatim."""
        self.blocks.append(Block("warning", {"text": text}))

    def attempt(self, what: str, add: Callable[[], None]) -> None:
        """Add something, or the line that says why it is not there."""
        try:
            add()
        except UserError as error:
            self._omit(what, str(error))
        except NotImplementedError as error:
            self._omit(what, f"the program has no such density ({error or 'not implemented'})")

    def speak(self, noun: str) -> None:
        """Call data what they are, in all that is not the user's: rows, and not images."""
        for block in self.blocks:
            if block.kind != "code":
                block.content.update({key: _spoken(value, noun) for key, value in block.content.items()})
        self.lead = _spoken(self.lead, noun)

    def _omit(self, what: str, why: str) -> None:
        """One line for neighbours that are left out for one reason."""
        last = self.blocks[-1] if self.blocks else None
        if last is not None and last.kind == "omitted" and last.content["why"] == why:
            last.content["names"].append(what)
        else:
            self.blocks.append(Block("omitted", {"names": [what], "why": why}))


def _spoken(value: Any, noun: str) -> Any:
    """Text, or texts in lists and tables, with ``noun`` for image; names of files and pictures stay."""
    if isinstance(value, str):
        return value if value.startswith("data:") else IMAGE.sub(rf"{noun}\1", value)
    if isinstance(value, list | tuple):
        return type(value)(_spoken(v, noun) for v in value)
    return {k: _spoken(v, noun) for k, v in value.items()} if isinstance(value, dict) else value


def picture(drawn: Axes | Figure, what: str, caption: str) -> dict[str, Any]:
    """A figure as base64 PNG, with its size in CSS pixels."""
    figure: Any = drawn
    while not isinstance(figure, Figure):
        figure = figure.figure
    buffer = io.BytesIO()
    dpi = figure.dpi if any(ax.get_images() for ax in figure.axes) else SHARP
    with own_style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a user's names, in any script
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    content = buffer.getvalue() if dpi == figure.dpi else _fewer_colours(buffer)
    width, height = (round(side * figure.dpi) for side in figure.get_size_inches())
    source = "data:image/png;base64," + base64.b64encode(content).decode("ascii")
    kind = "images" if dpi == figure.dpi else "wide" if width > WIDE else "plot"
    return {"source": source, "alt": what, "caption": caption, "width": width, "height": height, "kind": kind}


def _fewer_colours(png: io.BytesIO) -> bytes:
    """The picture with a palette of 256 colours, a third of the size; for lines and text, where nobody sees it."""
    buffer = io.BytesIO()
    with Image.open(png) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page as HTML.

    >>> "&lt;b&gt;" in render("<b>", "", [])
    True
    """
    text = resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    shown = [section for section in sections if section.blocks]
    return environment.from_string(text).render(title=title, subtitle=subtitle, sections=shown, version=__version__)


def destination(path: str | os.PathLike[str]) -> Path:
    """``path`` if a page can be written there; else a :class:`UserError`, before any work is done."""
    return writable(path, ".html", "reports are written as HTML")


def write(path: Path, text: str) -> Path:
    """Write a page: the whole file or nothing."""
    # a lone surrogate, as an undecodable file name holds, has no UTF-8
    write_text(path, text.encode("utf-8", "replace").decode("utf-8"))
    return path
