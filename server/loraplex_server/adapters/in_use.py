"""Names resolved to adapters that are held from then on, and what goes when nobody holds it.

Invariants:
- A name resolves in one atomic step to a held adapter: what is known of it still counts when the
  hold begins. What the name stands for later is of no concern to the hold.
- An adapter's file exists while a version or a hold refers to it.

The registry is never asked under the lock, so what is known is found at once while it hangs; and
the event loop never waits for the lock, as a file may be deleted under it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from typing import Final

from loraplex_server.adapters.blobs import BlobStore
from loraplex_server.adapters.errors import AdapterNotFound, StorageFailed
from loraplex_server.adapters.holds import AdapterHolds, Drain
from loraplex_server.adapters.known_names import KnownNames
from loraplex_server.adapters.references import AdapterReference
from loraplex_server.adapters.version_row import VersionRow

_log = logging.getLogger(__name__)

#: A name that changes again whenever it was looked up.
_MAX_LOOKUPS: Final = 16


class AdaptersInUse:
    """Owned by the store; every method may be called from any thread.

    Args:
        look_up: asks the registry; raises AdapterNotFound, AmbiguousVersion, StorageFailed.
        is_shared: other servers use the files too: only this one's copies are deleted.
        on_discard: told of each adapter that nothing refers to any more, from any thread.
        at_stage: told when a file was deleted; for tests.
    """

    def __init__(
        self,
        look_up: Callable[[AdapterReference], VersionRow],
        blobs: BlobStore,
        *,
        is_shared: bool,
        outage_s: float,
        on_discard: Callable[[str], None],
        at_stage: Callable[[str], None],
    ) -> None:
        self._look_up = look_up
        self._blobs = blobs
        self._is_shared = is_shared
        self._on_discard = on_discard
        self._at_stage = at_stage
        self._lock = threading.Lock()
        self._holds = AdapterHolds()
        self._known = KnownNames(is_shared=is_shared, outage_s=outage_s)
        # Ever held and not discarded since: what the engine may have something of.
        self._seen: set[str] = set()

    # ---- holding ---------------------------------------------------------------------------

    def try_hold(self, reference: AdapterReference) -> VersionRow | None:
        """Resolve a reference from what is known, and hold what it stands for; does not block.

        Returns:
            None where the registry must be asked.

        Raises:
            AdapterNotFound: nothing stands for it, or did not a moment ago: `resolve_and_hold`
                with `is_fresh` knows.
        """
        if not self._lock.acquire(blocking=False):
            return None
        try:
            known = self._known.get(reference)
            return self._held(reference, known.row) if known is not None else None
        finally:
            self._lock.release()

    def resolve_and_hold(
        self, reference: AdapterReference, *, is_fresh: bool = False
    ) -> VersionRow:
        """The same, asking the registry if need be; blocks.

        Args:
            is_fresh: ask in any case.

        Raises:
            AdapterNotFound, AmbiguousVersion, StorageFailed
        """
        if not is_fresh and (row := self.try_hold(reference)) is not None:
            return row
        for _ in range(_MAX_LOOKUPS):
            with self._lock:
                ticket = self._known.ask(reference)
            try:
                found = self._ask(reference)
                with self._lock:
                    if self._known.learn(ticket, found):
                        return self._held(reference, found)
            except StorageFailed:
                if (row := self._held_in_need(reference)) is not None:
                    return row
                raise
            finally:
                with self._lock:
                    self._known.give_up(ticket)
        raise StorageFailed(f"{reference} is being changed all the time; try again shortly")

    def hold(self, adapter_id: str) -> None:
        """Hold an adapter that may have no name yet."""
        with self._lock:
            self._holds.hold(adapter_id)

    def release(self, adapter_id: str, name: str | None = None) -> None:
        """End a hold; if it was the last of a deleted adapter, its file goes."""
        with self._lock:
            is_over = self._holds.release(adapter_id, name)
            freed = self._delete_file(adapter_id) if is_over else 0
            drained = self._holds.take_drained(adapter_id, is_gone=is_over)
        self._tell(adapter_id if is_over else None, drained, freed)

    def drop_copy(self, adapter_id: str) -> bool:
        """Remove this machine's copy of an adapter's file unless somebody holds the adapter."""
        with self._lock:
            if self._holds.num_held(adapter_id):
                return False
            self._blobs.forget(adapter_id)
            return True

    def num_held(self, adapter_id: str) -> int:
        with self._lock:
            return self._holds.num_held(adapter_id)

    def num_held_by(self, adapter_id: str, name: str) -> int:
        """Return how many users hold the adapter who asked for it by `name`."""
        with self._lock:
            return self._holds.num_held_by(adapter_id, name)

    def names(self) -> set[str]:
        """Return the names by which anything is held."""
        with self._lock:
            return set(self._holds.names_in_use())

    # ---- after changes ---------------------------------------------------------------------

    def forget(self, name: str) -> None:
        """The name was changed: ask the registry when somebody wants it."""
        with self._lock:
            self._known.forget(name)

    def take_away(self, name: str, ids: Collection[str], gone: Collection[str]) -> list[Drain]:
        """The name stands for none of the adapters any more, and for those gone no name does.

        Returns:
            For each adapter, who waits until nobody uses it by that name.
        """
        drains = [Drain(i, name, is_last=i in gone) for i in sorted(ids)]
        with self._lock:
            self._known.forget(name)
            for drain in drains:
                self._holds.wait(drain)
            endings = [self._doom(i) if i in gone else self._ending(i) for i in sorted(ids)]
        for ending in endings:
            self._tell(*ending)
        return drains

    def take_place(self, name: str, adapter_id: str, gone: Collection[str]) -> None:
        """The name stands for the adapter now, and no name for those gone."""
        with self._lock:
            self._known.forget(name)
            self._holds.take_over(adapter_id, name)
            endings = [self._doom(other_id) for other_id in gone]
            drained = self._holds.take_drained(adapter_id, is_gone=False)
        self._tell(None, drained, 0)
        for ending in endings:
            self._tell(*ending)

    def settle(self, adapter_id: str, *, is_named: bool) -> None:
        """Whether a held adapter goes when its last hold ends."""
        with self._lock:
            if is_named:
                self._holds.spare(adapter_id)
            else:
                self._holds.doom(adapter_id)

    # ---- changes of other servers ------------------------------------------------------------

    def follow(self, names: Collection[str], gone: Collection[str]) -> None:
        """Names were changed elsewhere, and no name stands for those gone any more."""
        with self._lock:
            for name in names:
                self._known.forget(name)
            # Of others there may be a copy of the file, of an earlier run.
            endings = [self._doom(i) if i in self._seen else self._drop_copy(i) for i in gone]
        for ending in endings:
            self._tell(*ending)

    def follow_all(self, stored: Collection[str]) -> None:
        """Anything may have changed elsewhere; names stand for the `stored` adapters only."""
        with self._lock:
            self._known.forget_all()
            unnamed = self._seen.difference(stored)
        self.follow((), unnamed)

    def begin_reading(self, now_s: float) -> None:
        """Changes of other servers are being read from now on (monotonic seconds)."""
        with self._lock:
            self._known.begin_reading(now_s)

    def note_reading(self, began_s: float) -> None:
        """All changes of other servers until then (monotonic seconds) were followed."""
        with self._lock:
            self._known.note_reading(began_s)

    def note_failure(self) -> None:
        """The registry does not answer."""
        with self._lock:
            self._known.note_failure()

    # ---- pieces, outside the lock ------------------------------------------------------------

    def _ask(self, reference: AdapterReference) -> VersionRow | None:
        try:
            return self._look_up(reference)
        except AdapterNotFound:
            return None

    def _held_in_need(self, reference: AdapterReference) -> VersionRow | None:
        with self._lock:
            known = self._known.get_in_need(reference)
            is_there = known is not None and known.row is not None
            return self._held(reference, known.row) if known and is_there else None

    def _tell(self, discarded: str | None, drained: list[Drain], freed: int) -> None:
        """Say that an adapter is gone, then that nobody needs to wait for it."""
        if discarded is not None:
            self._on_discard(discarded)
        for drain in drained:
            # Whoever waited may have been cancelled, such as when the server stops.
            if drain.freed.set_running_or_notify_cancel():
                drain.freed.set_result(freed)

    # ---- pieces, under the lock --------------------------------------------------------------

    def _held(self, reference: AdapterReference, row: VersionRow | None) -> VersionRow:
        if row is None:
            raise AdapterNotFound(str(reference))
        self._holds.hold(row.adapter_id, row.name)
        self._seen.add(row.adapter_id)
        return row

    def _doom(self, adapter_id: str) -> tuple[str | None, list[Drain], int]:
        """No version refers to the adapter any more."""
        if not self._holds.doom(adapter_id):
            return self._ending(adapter_id)
        freed = self._delete_file(adapter_id)
        return adapter_id, self._holds.take_drained(adapter_id, is_gone=True), freed

    def _drop_copy(self, adapter_id: str) -> tuple[None, list[Drain], int]:
        self._delete_file(adapter_id)
        return None, [], 0

    def _ending(self, adapter_id: str) -> tuple[None, list[Drain], int]:
        return None, self._holds.take_drained(adapter_id, is_gone=False), 0

    def _delete_file(self, adapter_id: str) -> int:
        """Return the bytes freed. Nobody begins to use the file meanwhile.

        A failure costs only disk space, until the sweep at the next start: no reason to fail the
        delete, or the request that happened to end last.
        """
        self._seen.discard(adapter_id)
        try:
            if self._is_shared:
                self._blobs.forget(adapter_id)
                return 0
            freed = self._blobs.delete(adapter_id)
        except OSError as error:
            _log.warning("adapter file %s was not deleted: %s", adapter_id, error)
            return 0
        self._at_stage("file deleted")
        return freed
