"""A lock file by which programs on one machine keep still while another one measures."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

#: Long enough for the others to notice that the lock is free.
_PAUSE_S = 0.5


class TurnLock:
    """Takes turns with whoever locks the same file with flock(2); without a file, does nothing.

    Args:
        hold_s: after so long the lock is given up for a moment, where `breathe` allows it.
    """

    def __init__(self, path: Path | None, hold_s: float) -> None:
        self._path, self._hold_s = path, hold_s
        self._file: IO[bytes] | None = None
        self._mode, self._since_s = fcntl.LOCK_SH, 0.0

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the lock while the block runs: shared at first, as others who are not quiet do."""
        if self._path is None:
            yield
            return
        with self._path.open("ab") as self._file:
            self._lock(fcntl.LOCK_SH)
            try:
                yield
            finally:
                self._file = None

    def quiet(self) -> None:
        """Wait until all others are still, and keep them so."""
        if self._file is not None:
            self._lock(fcntl.LOCK_EX)

    def breathe(self) -> None:
        """Let others go first if this turn has lasted long; nothing may be measured right now."""
        if self._file is not None and time.monotonic() - self._since_s > self._hold_s:
            fcntl.flock(self._file, fcntl.LOCK_UN)
            time.sleep(_PAUSE_S)
            self._lock(self._mode)

    def _lock(self, mode: int) -> None:
        assert self._file is not None
        fcntl.flock(self._file, mode)
        self._mode, self._since_s = mode, time.monotonic()
