"""The quarantine of one upload: files arrive here, and leave only as a checked folder.

Invariants: no byte of an upload is written outside the quarantine folder, no more bytes than the
limit are written inside, no file name of the sender is used as a path, and the folder is gone when
the upload ends, however it ends.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Final

from loraplex_server.adapters.archive import WANTED, extract_adapter
from loraplex_server.adapters.data_dir import storage_errors
from loraplex_server.adapters.errors import InvalidUpload, StorageFailed, UploadTooLarge
from loraplex_server.adapters.formats.config_json import CONFIG_NAME
from loraplex_server.adapters.record import AdapterLimits
from loraplex_server.adapters.safetensors_check import CONVERT_PICKLE

ARCHIVE_SUFFIXES: Final = (".zip", ".tar", ".tar.gz", ".tgz")

_PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_ARCHIVE: Final = "archive"


class ByteBudget:
    """Bytes one upload may still write; shared by its files."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._left = limit_bytes

    def spend(self, num_bytes: int) -> None:
        """Raises UploadTooLarge, before the bytes are written."""
        self._left -= num_bytes
        if self._left < 0:
            raise UploadTooLarge(self._limit_bytes)


class PartWriter:
    """One file being received; owned by the upload's thread, closed by its context manager."""

    def __init__(self, file: IO[bytes], budgets: tuple[ByteBudget, ...]) -> None:
        self._file = file
        self._budgets = budgets

    def write(self, chunk: bytes) -> None:
        """Append; raises UploadTooLarge, StorageFailed."""
        for budget in self._budgets:
            budget.spend(len(chunk))
        with storage_errors("store the upload"):
            self._file.write(chunk)

    def close(self) -> None:
        """Finish the file; raises StorageFailed. Idempotent."""
        with storage_errors("store the upload"):
            self._file.close()

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
    """Owned by one request and used by one thread at a time; its folder is deleted on exit."""

    def __init__(self, parent: Path, limits: AdapterLimits | None = None) -> None:
        """Make the quarantine folder under `parent`; raises StorageFailed."""
        self._limits = limits or AdapterLimits()
        self._budget = ByteBudget(self._limits.max_upload_bytes)
        self._received: set[str] = set()
        self._writers: list[PartWriter] = []
        with storage_errors("store the upload"):
            self._root = Path(tempfile.mkdtemp(dir=parent, prefix="upload-"))
            self._folder = self._root / "adapter"
            self._folder.mkdir()

    def open_part(self, filename: str) -> PartWriter:
        """Begin to receive one file: `adapter_config.json`, `adapter_model.safetensors`, or one
        archive of the folder (`*.zip`, `*.tar`, `*.tar.gz`, `*.tgz`).

        Raises:
            InvalidUpload: another file, or the same one twice.
            StorageFailed
        """
        kind = _kind_of(filename)
        if kind in self._received:
            raise InvalidUpload(f"{kind} was sent twice")
        if self._received and _ARCHIVE in (kind, *self._received):
            raise InvalidUpload("send either the two files or one archive of the folder")
        self._received.add(kind)
        budgets: tuple[ByteBudget, ...] = (self._budget,)
        if kind == CONFIG_NAME:
            budgets += (ByteBudget(self._limits.max_config_bytes),)
        target = self._root / _ARCHIVE if kind == _ARCHIVE else self._folder / kind
        with storage_errors("store the upload"):
            writer = PartWriter(target.open("xb"), budgets)
        self._writers.append(writer)
        return writer

    def write_part(self, filename: str, chunks: Iterable[bytes]) -> None:
        """Receive one file whole; raises as `open_part` and `PartWriter.write` do."""
        with self.open_part(filename) as writer:
            for chunk in chunks:
                writer.write(chunk)

    def finish(self) -> Path:
        """Unpack the archive if there is one, and return the folder for `register`.

        Raises:
            InvalidUpload, UploadTooLarge, StorageFailed
        """
        for writer in self._writers:
            writer.close()
        if _ARCHIVE in self._received:
            self.extract_archive(self._root / _ARCHIVE)
        elif missing := [name for name in WANTED if name not in self._received]:
            raise InvalidUpload(f"{' and '.join(missing)} missing from the upload")
        return self._folder

    def extract_archive(self, path: Path) -> None:
        """Unpack the two wanted files of the archive at `path`, which is deleted.

        Raises:
            InvalidUpload, UploadTooLarge, StorageFailed
        """
        with storage_errors("unpack the archive"):
            extract_adapter(path, self._folder, self._limits)
            path.unlink()

    def close(self) -> None:
        """Delete the quarantine and everything in it. Idempotent."""
        for writer in self._writers:
            # A full disk may fail the last bytes; they are thrown away here anyway.
            with contextlib.suppress(StorageFailed):
                writer.close()
        # What cannot be deleted now is swept at the next start.
        shutil.rmtree(self._root, ignore_errors=True)

    def __enter__(self) -> UploadStaging:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _kind_of(filename: str) -> str:
    """Return which file of an upload this is; the name is compared, never used as a path."""
    if filename in WANTED:
        return filename
    if filename.lower().endswith(ARCHIVE_SUFFIXES):
        return _ARCHIVE
    if filename.lower().endswith(_PICKLE_SUFFIXES):
        raise InvalidUpload(f"{filename[:100]!r}: {CONVERT_PICKLE}")
    raise InvalidUpload(
        f"{filename[:100]!r} is not part of an upload; send {WANTED[0]} and {WANTED[1]}, or one "
        f"archive of the folder ({', '.join(ARCHIVE_SUFFIXES)})"
    )
