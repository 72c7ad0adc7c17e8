"""The quarantine of one upload: files arrive here, and leave only as a checked folder.

Signatures first; the bodies follow.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from loraplex_server.adapters.record import AdapterLimits


class PartWriter:
    """One file being received; a context manager that closes it."""

    def write(self, chunk: bytes) -> None:
        """Append; raises UploadTooLarge, StorageFailed."""

    def close(self) -> None:
        """Idempotent."""

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class UploadStaging:
    """Owned by one request; used by one thread at a time; always deleted on exit."""

    def __init__(self, parent: Path, limits: AdapterLimits | None = None) -> None:
        """Make the quarantine folder under `parent`; raises StorageFailed."""

    def open_part(self, filename: str) -> PartWriter:
        """Begin to receive one file: `adapter_config.json`, `adapter_model.safetensors`, or one
        archive of the folder (`*.zip`, `*.tar`, `*.tar.gz`, `*.tgz`).

        Raises:
            InvalidUpload: another file, or the same one twice.
        """
        raise NotImplementedError

    def write_part(self, filename: str, chunks: Iterable[bytes]) -> None:
        """Receive one file whole; raises as `open_part` and `PartWriter.write` do."""

    def finish(self) -> Path:
        """Unpack the archive if there is one, and return the folder for `register`.

        Raises:
            InvalidUpload, UploadTooLarge, StorageFailed
        """
        raise NotImplementedError

    def close(self) -> None:
        """Delete the quarantine and everything in it. Idempotent."""

    def __enter__(self) -> UploadStaging:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
