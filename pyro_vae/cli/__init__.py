"""The command line: one file per command, each importing what it uses when it runs."""

from __future__ import annotations

import sys
import warnings
from typing import Any


def main(args: list[str] | None = None) -> None:
    """Run ``pyro-vae``: exit status 0; 2 and one line for what the user can mend; 1 for a fault of ours."""
    from pyro_vae.cli.app import run
    from pyro_vae.cli.output import abandon, open_standard_streams

    open_standard_streams()
    warnings.showwarning = _show
    status = run(sys.argv[1:] if args is None else args)
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            abandon(stream)
    sys.exit(status)


def _show(message: Any, *where: Any, **more: Any) -> None:
    """A warning in one line: whoever gives a command has no use for the place in the code."""
    print(f"warning: {message}", file=sys.stderr)
