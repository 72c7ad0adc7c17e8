"""A name or version that was taken away, and who still uses what it stood for."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex_server.adapters.holds import Drain
from loraplex_server.adapters.record import AdapterRecord


@dataclass(frozen=True)
class Removal:
    """`record` is what the name stood for; each of `drains` ends when an adapter is let go of."""

    record: AdapterRecord
    drains: tuple[Drain, ...]
