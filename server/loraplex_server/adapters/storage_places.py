"""Where a catalogue keeps names and files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class StoragePlaces:
    """Places outside the data folder, which several servers may share.

    Attributes:
        registry_url: SQLAlchemy's URL of a database that several servers share, together with
            `blob_url`; None for a SQLite file in the data folder, the catalogue's alone.
        blob_url: where adapter files are kept, any fsspec URL; None for the data folder.
        outage_s: how long names that are known resolve while a shared registry does not answer.
        copies_bytes: how much of what `blob_url` keeps elsewhere may be on this machine's disk
            too; None for as much as leaves a tenth of the disk free.
    """

    registry_url: str | None = None
    blob_url: str | None = None
    outage_s: float = 0.0
    copies_bytes: int | None = None

    @property
    def is_shared(self) -> bool:
        """Whether other servers use the registry and the files too."""
        return self.registry_url is not None


IN_DATA_DIR: Final = StoragePlaces()
