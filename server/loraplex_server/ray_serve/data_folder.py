"""Whose data folder is whose, among replicas that come and go on one machine."""

from __future__ import annotations

import fcntl
import itertools
import os
from pathlib import Path


class ClaimedFolder:
    """Held from construction to `close`, or to the end of the process however it ends."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def first_free(cls, root: Path) -> ClaimedFolder:
        """Take the first of the numbered folders in `root` that nobody has; raises OSError.

        They are counted, not named by replica: the next replica on the machine takes a folder that
        was left, with the adapter files that are in it.
        """
        root.mkdir(parents=True, exist_ok=True)
        for number in itertools.count():
            path = root / f"replica-{number}"
            lock = _open_lock(path.with_suffix(".lock"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                continue
            return cls(path, lock)
        raise AssertionError("numbers end")

    @classmethod
    def the_only_one(cls, root: Path) -> ClaimedFolder:
        """Take `root` itself; blocks until the replica before this one has ended. Raises OSError.

        Serve starts a replica's successor while it still finishes its requests.
        """
        root.mkdir(parents=True, exist_ok=True)
        lock = _open_lock(root / "replica.lock")
        fcntl.flock(lock, fcntl.LOCK_EX)
        return cls(root, lock)

    def close(self) -> None:
        """Leave it to others."""
        os.close(self._lock)


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
