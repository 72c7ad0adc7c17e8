"""The catalogue's folder on disk: its parts, its one owner, and how its failures are told.

catalog.sqlite3   names and adapters          staging/   uploads and files being written
blobs/            canonical adapter files     lock       held by the one process that uses it
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from sqlalchemy.exc import SQLAlchemyError

from loraplex_server.adapters.errors import StorageFailed


class DataDir:
    """Owned by the catalogue from construction to `close`; no other process can hold it too."""

    def __init__(self, root: Path) -> None:
        """Make the folder and take its lock; raises StorageFailed."""
        self.root = root
        self.database = root / "catalog.sqlite3"
        self.blobs = root / "blobs"
        self.staging = root / "staging"
        with storage_errors("open the data folder"):
            self.blobs.mkdir(parents=True, exist_ok=True)
            self._lock: int | None = _take_lock(root / "lock")
            self._sweep_staging()

    def close(self) -> None:
        """Give the lock back. Idempotent."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _sweep_staging(self) -> None:
        """Whatever is there was left by a process that died: uploads never survive a restart."""
        if self.staging.exists():
            shutil.rmtree(self.staging)
        self.staging.mkdir()


def _take_lock(path: Path) -> int:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    if sys.platform != "win32":
        import fcntl  # absent on Windows, where the folder is simply not guarded

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise StorageFailed(
                f"another process uses the data folder {path.parent}; stop it, or give this "
                "server a folder of its own"
            ) from error
    return handle


@contextlib.contextmanager
def storage_errors(action: str) -> Iterator[None]:
    """Tell a failure of disk or database during `action` as StorageFailed, with what to do."""
    try:
        yield
    except OSError as error:
        raise StorageFailed(f"could not {action}: {_advice(error)}") from error
    except SafetensorError as error:
        # The library that writes adapter files tells a full disk in its own way.
        raise StorageFailed(f"could not {action}: {error}") from error
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        raise StorageFailed(f"could not {action}: the catalogue's database: {cause}") from error


def _advice(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free space, or move the data folder to a larger disk"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write {error.filename}; give this user the data folder"
    return str(error)
