"""The installed version of the loraplex distribution."""

from __future__ import annotations

from importlib import metadata


def installed_version() -> str:
    """Return the version of the installed distribution, "0+unknown" in a bare checkout."""
    try:
        return metadata.version("loraplex")
    except metadata.PackageNotFoundError:
        return "0+unknown"
