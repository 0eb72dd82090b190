"""``pyro-vae runs``."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from pyro_vae.cli.options import Json, expand


def runs(
    folder: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="Where to look, in folders of folders too.", callback=expand)
    ] = Path("runs"),
    format_: Annotated[
        str | None,
        typer.Option("--format", help="markdown, latex, csv or json [default: markdown].", show_default=False),
    ] = None,
    json_: Json = False,
) -> None:
    """List the runs in a folder: their data, model, guide, seed, epochs, NLL as evaluate found it, size and parent."""
    from pyro_vae import tables
    from pyro_vae.cli.output import show_or_say
    from pyro_vae.errors import UserError

    shape = tables.format_of(format_, json_)
    if not folder.is_dir():
        raise UserError(f"there is no folder {str(folder)!r}: give one that holds runs, pyro-vae runs DIR")
    found = [_line(where.parent, folder) for where in sorted(folder.rglob("spec.toml"))]
    if not found and shape == "markdown":
        show_or_say(f"there are no runs in {folder}")
    elif shape == "json":
        show_or_say(json.dumps({"runs": found}, indent=2))
    else:
        header = list(found[0]) if found else ["run"]
        values = [list(line.values()) for line in found]
        written = [
            ["-" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v) for v in row] for row in values
        ]
        show_or_say(
            tables.comma_separated(header, values).rstrip() if shape == "csv"
            else (tables.latex if shape == "latex" else tables.markdown)(header, written)
        )  # fmt: skip


def _line(path: Path, folder: Path) -> dict[str, Any]:
    """What a run says of itself; nothing of torch is needed, and what is damaged or missing is None."""
    try:
        record = tomllib.loads((path / "spec.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {}

    def of(*keys: str) -> Any:
        value: Any = record
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value["name"] if isinstance(value, dict) and "name" in value else value

    declared = [of("model", "prior") or of("model", "program"), of("model", "likelihood")]
    own = of("program", "file") or of("program", "class")
    try:
        nll = json.loads((path / "evaluation.json").read_text(encoding="utf-8"))["nll"]
    except (OSError, ValueError, KeyError, TypeError):
        nll = None
    return {
        "run": str(path.relative_to(folder)),
        "data": of("data", "name"),
        "model": ", ".join(map(str, declared)) if "model" in record else None if own is None else Path(str(own)).name,
        "guide": of("guide", "posterior"),
        "seed": of("training", "seed"),
        "epochs": _epochs(path),
        "nll": nll,
        "mb": round(sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / 1e6, 2),
        "parent": of("lineage", "parent"),
    }


def _epochs(path: Path) -> int | None:
    try:
        return (path / "metrics.jsonl").read_text(encoding="utf-8").count("\n")
    except (OSError, ValueError):
        return None
