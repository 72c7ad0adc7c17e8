"""What other servers change in a registry that several share, read and followed here."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from sqlalchemy import Connection, Engine

from loraplex_server.adapters.data_dir import storage_errors
from loraplex_server.adapters.errors import StorageFailed
from loraplex_server.adapters.in_use import AdaptersInUse
from loraplex_server.adapters.name_changes import (
    NameChange,
    last_change_id,
    prune_changes,
    read_changes,
)
from loraplex_server.adapters.registry import stored_ids

_PAGE: Final = 1000


class ChangeFeed:
    """Owned by the store; `catch_up` is for one thread at a time, all else for any.

    A server's own changes come by too, which were followed already: once more does no harm.

    Args:
        clock: seconds, the one of `KnownNames`.
    """

    def __init__(
        self,
        database: Engine,
        scope: str,
        in_use: AdaptersInUse,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with the last change up to now, before anything is looked up here.

        Raises:
            StorageFailed
        """
        self._database = database
        self._scope = scope
        self._in_use = in_use
        self._clock = clock
        self._followed_s = clock()
        with storage_errors("open the registry"), database.connect() as connection:
            self._last = last_change_id(connection)

    @property
    def age_s(self) -> float:
        """How long ago the last complete reading began: what is known here is so old at most."""
        return self._clock() - self._followed_s

    def catch_up(self) -> tuple[NameChange, ...] | None:
        """Follow all that was changed up to now.

        Returns:
            What concerns names of this base; None if some changes are lost, so that any name may
            have changed.

        Raises:
            StorageFailed: the registry does not answer; the next call goes on from here.
        """
        began_s = self._clock()
        self._in_use.begin_reading(began_s)
        try:
            with (
                storage_errors("follow what other servers changed"),
                self._database.connect() as connection,
            ):
                changes = self._follow(connection)
        except StorageFailed:
            self._in_use.note_failure()
            raise
        self._in_use.note_reading(began_s)
        self._followed_s = began_s
        return changes

    def prune(self, now: int) -> None:
        """Delete what all servers have read long ago, or will never read; raises StorageFailed.

        Args:
            now: Unix seconds.
        """
        with storage_errors("prune changes"), self._database.begin() as connection:
            prune_changes(connection, now)

    def _follow(self, connection: Connection) -> tuple[NameChange, ...] | None:
        newest = last_change_id(connection)
        if newest == self._last:
            return ()
        changes = self._read(connection)
        if changes is None:
            self._in_use.follow_all(stored_ids(connection))
            self._last = newest
            return None
        own = tuple(change for change in changes if change.scope == self._scope)
        gone = set().union(*(change.gone for change in changes))
        if gone:
            # Some may have come back since. No statement takes any number of values.
            gone -= stored_ids(connection, gone if len(gone) <= _PAGE else None)
        self._in_use.follow({change.name for change in own}, gone)
        self._last = changes[-1].change_id
        return own

    def _read(self, connection: Connection) -> list[NameChange] | None:
        """Return all new changes; None if some are lost: pruned, or older than a restored copy."""
        changes: list[NameChange] = []
        last = self._last
        while page := read_changes(connection, last, _PAGE):
            # Anywhere: a row of a server whose clock is behind is old from the beginning.
            if page[-1].change_id != last + len(page):
                return None
            changes += page
            last = page[-1].change_id
        return changes or None
