"""`loraplex adapters check`: becomes the server's own check, if it is installed."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import typer

from loraplex.errors import UsageError

_NEEDED = ("loraplex_server", "torch")


def check(ctx: typer.Context) -> None:
    """Tell what a server would make of an adapter, without one: try `check --help`."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"adapters are checked by the server's own code, which is not installed (no "
            f"{', '.join(missing)}): pip install 'loraplex[server]'"
        )
    sys.stdout.flush()
    sys.stderr.flush()
    # As with `loraplex serve`: it takes this process's place, signals and exit codes included.
    os.execv(sys.executable, [sys.executable, "-m", "loraplex_server.check_adapter", *ctx.args])
