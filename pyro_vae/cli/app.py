"""All commands, and what becomes of their errors."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Any

import typer

from pyro_vae.cli import (
    anomaly,
    baseline,
    catalogue,
    compare,
    evaluate,
    export,
    impute,
    interpolate,
    list_,
    manifold,
    posterior,
    prove,
    reconstruct,
    report,
    sample,
    score,
    show,
    train,
)
from pyro_vae.cli.options import trusting
from pyro_vae.cli.output import OutputError, abandon, streams
from pyro_vae.errors import UserError

app = typer.Typer(
    name="pyro-vae",
    help="Variational autoencoders as Pyro programs: declare, train, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = 130
MENDABLE = {  # what the system says of places, and of what is full
    getattr(errno, name)
    for name in (
        "EACCES", "EPERM", "ENOENT", "ENOTDIR", "EISDIR", "EEXIST", "ENOTEMPTY", "ENOSPC", "EDQUOT", "EROFS", "ENAMETOOLONG",
        "ELOOP", "EIO", "EMFILE", "ENFILE", "EFBIG", "ETXTBSY", "ESTALE", "EBUSY", "EBADF",
    )
    if hasattr(errno, name)
}  # fmt: skip


def _version(wanted: bool) -> None:
    if wanted:
        from pyro_vae import __version__

        print(f"pyro-vae {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


COMMANDS: dict[str, Callable[..., Any]] = {
    "train": train.train,
    "evaluate": evaluate.evaluate,
    "baseline": baseline.baseline,
    "prove": prove.prove,
    "compare": compare.compare,
    "sample": sample.sample,
    "reconstruct": reconstruct.reconstruct,
    "interpolate": interpolate.interpolate,
    "manifold": manifold.manifold,
    "posterior": posterior.posterior,
    "anomaly": anomaly.anomaly,
    "score": score.score,
    "impute": impute.impute,
    "report": report.report,
    "export": export.export,
    "runs": catalogue.runs,
    "list": list_.list_,
    "show": show.show,
}
for name, function in COMMANDS.items():
    app.command(name)(function if name in ("list", "show", "runs", "baseline") else trusting(function))


def run(args: list[str]) -> int:
    """Run one command line and return its exit status."""
    standard = sys.stdout
    with streams():
        status = _run(args)
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            abandon(standard)
        except OutputError as error:
            abandon(standard)
            status = status or (_refuse(str(error)) if standard is not None else 0)
    return status


def _run(args: list[str]) -> int:
    try:
        status: Any = app(args, prog_name="pyro-vae", standalone_mode=False)
        if status == INTERRUPTED:  # newer typer turns a keyboard interrupt into a status
            print("interrupted", file=sys.stderr)
        return status if isinstance(status, int) else 0
    except UserError as error:
        return _refuse(str(error))
    except (KeyboardInterrupt, EOFError):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # who read has seen enough
        abandon(sys.stdout)
        return 0
    except Exception as error:
        if isinstance(error, OSError) and error.errno in MENDABLE:
            what = error.filename or "a file"
            return _refuse(f"cannot read or write {what}: {error.strerror}; free it, or choose another place")
        # typer carries a click of its own in some versions: its errors are known by what they can do
        if type(error).__name__ == "Abort":
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            return _refuse(_with_value(error.format_message(), args))
        if _no_memory(error):
            return _refuse(f"out of memory ({_first_line(error)}): choose smaller sizes, or free some memory")
        traceback.print_exc()
        print("This is a fault of pyro-vae; please report it with the lines above.", file=sys.stderr)
        return 1


def _no_memory(error: Exception) -> bool:
    """Whether there was no memory, on the host or, where torch is loaded at all, on a device."""
    if isinstance(error, MemoryError):
        return True
    if "torch" not in sys.modules:
        return False
    from pyro_vae.memory import is_out_of_memory

    return is_out_of_memory(error)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:160]


def _with_value(message: str, args: list[str]) -> str:
    """The message about an option, with the value that was given for it: newer typer leaves that out."""
    option = (
        message.removeprefix("Invalid value for '").partition("'")[0] if message.startswith("Invalid value") else ""
    )
    given = [b for a, b in pairwise(args) if a == option]
    return f"{message} (got {given[-1]!r})" if given else message


def _refuse(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2
