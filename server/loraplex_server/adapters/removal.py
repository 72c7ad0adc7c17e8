"""A name or version that was taken away, and who still uses what it stood for."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex_server.adapters.holds import Drain
from loraplex_server.adapters.record import AdapterRecord
from loraplex_server.adapters.version_row import VersionRow


@dataclass(frozen=True)
class Removal:
    """`record` is what the name stood for; each of `drains` ends when an adapter is let go of."""

    record: AdapterRecord
    drains: tuple[Drain, ...]


@dataclass(frozen=True)
class RemovedVersions:
    """What a delete took away.

    Attributes:
        row: the version that was named, by itself or as the name's current one.
        drains: one for each adapter that somebody may still use.
        is_name: the name went, with all its versions.
    """

    row: VersionRow
    drains: tuple[Drain, ...]
    is_name: bool
