"""Options that several commands share."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from pyro_vae.errors import UserError
from pyro_vae.paths import expanded


def expand(value: Any) -> Any:
    """A path, or several, with ``~`` for the home, which a shell leaves alone after ``--out=``."""
    if isinstance(value, list | tuple):
        return [expanded(path) for path in value]
    return None if value is None else expanded(value)


RunPath = Annotated[
    Path,
    typer.Argument(
        metavar="RUN", help="A run directory written by pyro-vae train.", show_default=False, callback=expand
    ),
]
DataRoot = Annotated[
    str | None, typer.Option("--data-root", help="Where data sets lie [env: PYRO_VAE_DATA].", show_default=False)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else there.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the draws.")]
ProgramFile = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="FILE.py", help="The program of a run that was trained on a .py file.", show_default=False
    ),
]
Given = Annotated[
    list[str] | None,
    typer.Option(
        "--given",
        metavar="COLUMN=VALUE",
        help="Hold a label, covariates (a,b,c) or a column of a record at a value; may be repeated.",
        show_default=False,
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-program", help="Let the file that --model names have the weights of a run that was trained on another."
    ),
]
Present = Annotated[
    str | None,
    typer.Option(
        metavar="COLUMN=ROWS",
        help="Rows in which a column is present, label=100, as many of each class as can be; nan: NaN of a file are missing.",
        show_default=False,
    ),
]
Split = Annotated[str, typer.Option(help="train, validation or test.")]


def given(ctx: typer.Context, name: str) -> bool:
    """Whether an option or argument was written on the command line."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse_given(ctx: typer.Context, names: Collection[str], why: str) -> None:
    """:class:`UserError`, ``why`` and what to leave out, where one of these options was written on the command line."""
    found = [p.opts[0] for p in ctx.command.params if p.name in names and p.name is not None and given(ctx, p.name)]
    if found:
        raise UserError(f"{why}: leave out {', '.join(found)}")


def trusting(function: Callable[..., Any]) -> Callable[..., Any]:
    """A command that takes ``--trust-program`` beside ``--model``."""

    @functools.wraps(function)
    def call(*args: Any, trust_program: bool = False, **kwargs: Any) -> Any:
        from pyro_vae.cli.runs import TRUST

        before = TRUST.set(trust_program)
        try:
            return function(*args, **kwargs)
        finally:
            TRUST.reset(before)

    hints = {**typing.get_type_hints(function, include_extras=True), "trust_program": Trust}
    signature = inspect.signature(function)
    shown = [p.replace(annotation=hints[p.name]) for p in signature.parameters.values()]
    shown.append(inspect.Parameter("trust_program", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Trust))
    call.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    call.__annotations__ = hints
    return call
