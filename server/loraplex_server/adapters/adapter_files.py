"""The files of registered adapters: found on a local disk, and swept when no row refers to them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Final

from sqlalchemy import Engine

from loraplex_server.adapters.blobs import BlobStore
from loraplex_server.adapters.data_dir import storage_errors
from loraplex_server.adapters.errors import StorageFailed
from loraplex_server.adapters.file_claim import claim_files
from loraplex_server.adapters.local_copies import LocalCopies
from loraplex_server.adapters.registry import stored_sizes
from loraplex_server.adapters.registry_database import read_identity
from loraplex_server.adapters.storage_places import StoragePlaces
from loraplex_server.adapters.version_row import VersionRow

#: Of a registry that other servers use too: whoever stores a file has so long to register it, and
#: whoever runs on a deleted one elsewhere so long to have read it.
SHARED_GRACE_S: Final = 3600.0


class AdapterFiles:
    """Owned by the store; every method may be called from any thread, and raises StorageFailed.

    A sweep goes by the registry that there was at the start. Whoever makes its database anew, to
    restore a backup into it, would else have all files swept as unknown.

    Args:
        copies: of a remote store's files on this machine's disk.
        places: if other servers put and read files too, none goes that is younger than
            `SHARED_GRACE_S`; if they are not in the data folder, servers over another registry may
            be led to them by mistake.
    """

    def __init__(
        self, blobs: BlobStore, copies: LocalCopies, database: Engine, places: StoragePlaces
    ) -> None:
        self._blobs = blobs
        self._copies = copies
        self._database = database
        self._min_age_s = SHARED_GRACE_S if places.is_shared else 0.0
        with storage_errors("open the registry"), database.connect() as connection:
            self._registry_id = read_identity(connection)
        self._claims_files = places.blob_url is not None
        self._claim()

    def sweep(self) -> None:
        """Delete files that no row refers to; at any time where the registry is shared."""
        self._claim()  # two that found the place empty at one moment have both written their id
        with storage_errors("sweep the adapters' files"):
            self._blobs.sweep(self._stored, min_age_s=self._min_age_s)

    def sweep_at_start(self) -> None:
        """The same, and of this machine's copies also those that a power cut left incomplete."""
        stored = functools.cache(self._stored)
        with storage_errors("sweep the adapters' files"):
            self._blobs.sweep(stored, min_age_s=self._min_age_s)
            self._copies.sweep(stored())

    def make_room(self, drop_copy: Callable[[str], bool]) -> None:
        """Keep the disk from filling up with copies; see `LocalCopies.make_room`."""
        with storage_errors("make room for copies of adapters' files"):
            self._copies.make_room(drop_copy)

    def local_copy(self, row: VersionRow) -> Path | None:
        """Return the adapter's file if it is on a local disk already; does not block for long."""
        return self._blobs.local_copy(row.adapter_id)

    def local_path(self, row: VersionRow) -> Path:
        """Return the adapter's file on a local disk; the caller holds it."""
        try:
            with storage_errors("open the adapter's file"):
                return self._blobs.local_path(row.adapter_id)
        except StorageFailed as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise StorageFailed(
                    f"the weights of {row.name!r} are gone from the data folder; upload it again"
                ) from error
            raise

    def _claim(self) -> None:
        if self._claims_files:
            claim_files(self._registry_id, self._blobs)

    def _stored(self) -> dict[str, int]:
        with self._database.connect() as connection:
            if read_identity(connection) != self._registry_id:
                raise StorageFailed(
                    "no file is swept, as the registry is another one than when this server "
                    "started, and knows others: restore its database, or restart the server"
                )
            return stored_sizes(connection)
