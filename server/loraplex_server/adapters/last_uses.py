"""When names were used last, noted in memory and written to the registry once in a while.

A write for each request would cost each request a write to the disk. What a crash loses is at most
the last minute's uses, which makes a name expire a minute early at worst.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class LastUses:
    """Owned by the catalogue; safe from any thread. Times are Unix seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unwritten: dict[str, int] = {}

    def note(self, name: str, now: int) -> None:
        with self._lock:
            self._unwritten[name] = now

    def of(self, name: str) -> int | None:
        """Return the last use that is not in the registry yet."""
        with self._lock:
            return self._unwritten.get(name)

    def forget(self, name: str) -> None:
        """The name is gone, and whoever gets it next was not used yet."""
        with self._lock:
            self._unwritten.pop(name, None)

    @contextmanager
    def taken(self) -> Iterator[dict[str, int]]:
        """Hand out what is to be written; it is forgotten here unless that fails."""
        with self._lock:
            uses, self._unwritten = self._unwritten, {}
        try:
            yield uses
        except BaseException:
            with self._lock:
                self._unwritten = {**uses, **self._unwritten}
            raise
