"""The entry point. Imports nothing beyond the standard library until it is called."""

from __future__ import annotations

import io
import sys


def main() -> None:
    """Run the command line, or say in one line what it needs to run."""
    try:
        from loraplex.cli.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich", "click"):
            raise
        sys.stderr.write(
            f"error: the command line needs {error.name}: pip install 'loraplex[cli]'\n"
        )
        raise SystemExit(1) from None
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # An answer may hold what the terminal's encoding has not.
            stream.reconfigure(errors="replace")
    app()
