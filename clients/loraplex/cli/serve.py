"""`loraplex serve`: becomes the server, if it is installed. Imports nothing of it."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import Any

import typer
from typer.core import TyperCommand

from loraplex.errors import UsageError

_NEEDED = ("loraplex_server", "torch", "fastapi")


class PassThrough(TyperCommand):
    """A command that leaves every argument, `--help` and `--` too, as it was typed."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return []


def serve(ctx: typer.Context) -> None:
    """Start the server. Every argument is the server's: try `loraplex serve --help`."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"the server is not installed (no {', '.join(missing)}): pip install 'loraplex[server]'"
        )
    sys.stdout.flush()
    sys.stderr.flush()
    # The server takes this process's place, so signals and exit codes need no relay.
    os.execv(sys.executable, [sys.executable, "-m", "loraplex_server", *ctx.args])
