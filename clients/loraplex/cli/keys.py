"""`loraplex keys`: becomes the server's own command, if it is installed. Imports nothing of it."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import typer

from loraplex.errors import UsageError

_NEEDED = ("loraplex_server", "sqlalchemy")


def keys(ctx: typer.Context) -> None:
    """Make, list and revoke API keys, on the server's machine: try `loraplex keys --help`."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"keys are made where the server is, which is not installed here (no "
            f"{', '.join(missing)}): pip install 'loraplex[server]'; from elsewhere an admin's key "
            "makes others by POST /v1/keys"
        )
    sys.stdout.flush()
    sys.stderr.flush()
    # As with `loraplex serve`: it takes this process's place, signals and exit codes included.
    os.execv(sys.executable, [sys.executable, "-m", "loraplex_server.keys_command", *ctx.args])
