"""Errors of the memory package.

MemoryAccountError
├── OutOfPages           the pool cannot give so many pages now
└── AdapterFileError     a canonical adapter file cannot be read
"""

from __future__ import annotations


class MemoryAccountError(Exception):
    """Base of everything this package raises on purpose."""


class OutOfPages(MemoryAccountError):
    """Fewer free pages than asked for; the caller evicts, preempts or waits."""

    def __init__(self, *, requested: int, available: int) -> None:
        self.requested = requested
        self.available = available
        super().__init__(f"{requested} pages requested, {available} free")


class AdapterFileError(MemoryAccountError):
    """A canonical adapter file is missing, truncated or not what its manifest says."""

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"adapter file {path}: {reason}")
