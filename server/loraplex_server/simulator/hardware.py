"""Devices by name; the figures and their sources are in `hardware.toml`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from loraplex_server.simulator.errors import SimulationError


@dataclass(frozen=True)
class Hardware:
    """What one device can do at best; see `hardware.toml` for units and sources."""

    key: str
    name: str
    memory: float
    bandwidth: float
    flops: float
    host_link: float
    disk: float
    source: str


@cache
def all_hardware() -> dict[str, Hardware]:
    """Return every device of `hardware.toml` by its key."""
    text = files("loraplex_server.simulator").joinpath("hardware.toml").read_text("utf-8")
    return {key: Hardware(key=key, **table) for key, table in tomllib.loads(text).items()}


def find_hardware(key: str) -> Hardware:
    """Return a device by its key.

    Raises:
        SimulationError: there is none; the message lists those there are.
    """
    known = all_hardware()
    if key not in known:
        raise SimulationError(f"no hardware {key!r}; known are {', '.join(sorted(known))}")
    return known[key]
