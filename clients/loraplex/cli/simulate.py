"""`loraplex simulate`: becomes the simulator, if the server is installed. Imports nothing of it."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import typer

from loraplex.errors import UsageError

_NEEDED = ("loraplex_server", "numpy")


def simulate(ctx: typer.Context) -> None:
    """Simulate the scheduler on other hardware and loads: try `loraplex simulate --list`."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"the simulator is not installed (no {', '.join(missing)}): "
            "pip install 'loraplex[server]'"
        )
    sys.stdout.flush()
    sys.stderr.flush()
    # As with `loraplex serve`: it takes this process's place, signals and exit codes included.
    os.execv(sys.executable, [sys.executable, "-m", "loraplex_server.simulator", *ctx.args])
