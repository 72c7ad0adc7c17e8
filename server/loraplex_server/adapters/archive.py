"""One adapter folder out of an archive that anybody may have made.

Accepted: zip, tar and tar.gz, recognised by content; the two wanted files at the top or in one
folder. Everything is streamed, and bounded before it is believed: entries, bytes per read (a
library that reads a whole directory or header at once is stopped there), bytes read in total and
bytes written. Nothing is extracted by its name in the archive, so no name can lead outside.
"""

from __future__ import annotations

import gzip
import io
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, cast

from loraplex_server.adapters.errors import InvalidUpload, UploadTooLarge
from loraplex_server.adapters.formats.config_json import CONFIG_NAME
from loraplex_server.adapters.record import AdapterLimits
from loraplex_server.adapters.safetensors_check import CONVERT_PICKLE, WEIGHTS_NAME

WANTED: Final = (CONFIG_NAME, WEIGHTS_NAME)

_PICKLE_WEIGHTS: Final = re.compile(r"adapter_model\.(bin|pt|pth|pkl|ckpt)")
_CHUNK_BYTES: Final = 256 << 10
#: Of a zip's directory or a tar's extended header, both read in one piece by the library.
_MAX_READ_BYTES: Final = 1 << 20
#: Padding, headers and re-reading come on top of the files themselves.
_READ_OVERHEAD: Final = 2

_BROKEN: Final = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    gzip.BadGzipFile,
    EOFError,
    NotImplementedError,
    RuntimeError,  # zipfile's word for "encrypted", and too deep a recursion in tarfile
    ValueError,
    OverflowError,
    LookupError,
    struct.error,
)


@dataclass(frozen=True)
class _Entry:
    name: str
    is_file: bool
    is_folder: bool
    size_bytes: int


def extract_adapter(archive: Path, folder: Path, limits: AdapterLimits) -> None:
    """Write the two wanted files of `archive` into `folder`.

    Raises:
        InvalidUpload: it is no archive, is broken, unsafe, or holds no or several adapters.
        UploadTooLarge: it unpacks to more than the limit.
        OSError: the disk failed.
    """
    with archive.open("rb") as file:
        start = file.read(262)
        file.seek(0)
        try:
            if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
                _extract_zip(file, folder, limits)
            elif start.startswith(b"\x1f\x8b"):
                with gzip.GzipFile(fileobj=file) as unzipped:
                    _extract_tar(cast("IO[bytes]", unzipped), folder, limits)
            elif start[257:262] == b"ustar":
                _extract_tar(file, folder, limits)
            else:
                raise InvalidUpload("the archive is neither zip nor tar nor tar.gz")
        except _BROKEN as error:
            raise InvalidUpload(f"the archive is broken or cut off: {error}") from error


class _GuardedFile(io.RawIOBase):
    """A readable file that refuses to be read at once, or again and again, without bound.

    Args:
        counts_skips: whether seeking forward costs what it skips, as it does in a gzip stream.
    """

    def __init__(self, file: IO[bytes], limit_bytes: int, *, counts_skips: bool) -> None:
        self._file = file
        self._limit_bytes = limit_bytes
        self._left = _READ_OVERHEAD * limit_bytes + _MAX_READ_BYTES
        self._counts_skips = counts_skips

    def read(self, size: int | None = -1, /) -> bytes:
        # zipfile reads the rest of the file when it looks for the directory's end: a few kB.
        at_most = _MAX_READ_BYTES + 1
        chunk = self._file.read(at_most if size is None or size < 0 else min(size, at_most))
        if len(chunk) > _MAX_READ_BYTES:
            raise InvalidUpload("the archive has a header or directory of unreasonable size")
        self._spend(len(chunk))
        return chunk

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        if whence == io.SEEK_SET and offset < 0:
            # A zip whose directory claims to begin before the file; the disk is not to blame.
            raise InvalidUpload("the archive's directory points outside it")
        if self._counts_skips:
            assert whence == io.SEEK_SET, "tarfile seeks from the start"
            self._spend(max(0, offset - self._file.tell()))
        return self._file.seek(offset, whence)

    def _spend(self, num_bytes: int) -> None:
        self._left -= num_bytes
        if self._left < 0:
            raise UploadTooLarge(self._limit_bytes)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


class _Selection:
    """Judges entries one by one and says which are wanted; all must lie in one folder."""

    def __init__(self, limits: AdapterLimits) -> None:
        self._limits = limits
        self._num_entries = 0
        self._num_bytes = 0
        self._folder: str | None = None
        self._seen: set[str] = set()
        self._pickle: str | None = None

    def wants(self, entry: _Entry) -> str | None:
        """Return the file name to extract the entry to, None to skip it."""
        self._num_entries += 1
        if self._num_entries > self._limits.max_archive_entries:
            raise InvalidUpload(
                f"the archive has more than {self._limits.max_archive_entries} entries"
            )
        folder, _, name = _safe_name(entry.name).rpartition("/")
        if entry.is_folder:
            return None
        if not entry.is_file:
            raise InvalidUpload(
                f"{entry.name[:200]!r} in the archive is a link or a device; pack real files "
                "(tar --dereference, zip without --symlinks)"
            )
        if _PICKLE_WEIGHTS.fullmatch(name):
            self._pickle = name
        if name not in WANTED or folder.count("/") > 0:
            return None
        self._claim(folder, name, entry.size_bytes)
        return name

    def _claim(self, folder: str, name: str, size_bytes: int) -> None:
        if self._folder is not None and folder != self._folder:
            raise InvalidUpload(
                f"the archive holds more than one adapter folder ({self._folder or '.'!r} and "
                f"{folder or '.'!r}); pack one"
            )
        if name in self._seen:
            raise InvalidUpload(f"{name} is in the archive twice")
        self._folder = folder
        self._seen.add(name)
        self._num_bytes += size_bytes
        if self._num_bytes > self._limits.max_upload_bytes:
            raise UploadTooLarge(self._limits.max_upload_bytes)

    def check_complete(self) -> None:
        if WEIGHTS_NAME not in self._seen and self._pickle:
            raise InvalidUpload(f"the weights are in {self._pickle}: {CONVERT_PICKLE}")
        for name in WANTED:
            if name not in self._seen:
                raise InvalidUpload(
                    f"the archive holds no {name}, neither at its top nor in one folder there"
                )


def _safe_name(name: str) -> str:
    """Return the name without a leading `./`; refuses what could point outside a folder."""
    parts = name.split("/")
    is_unsafe = (
        name.startswith("/")
        or ".." in parts
        or any(char in name for char in "\\\0")
        or re.match(r"[A-Za-z]:", name)
    )
    if is_unsafe:
        raise InvalidUpload(f"the archive names a file outside its folder: {name[:200]!r}")
    return "/".join(part for part in parts if part not in ("", "."))


def _extract_zip(file: IO[bytes], folder: Path, limits: AdapterLimits) -> None:
    guarded = _GuardedFile(file, limits.max_upload_bytes, counts_skips=False)
    selection = _Selection(limits)
    with zipfile.ZipFile(cast("IO[bytes]", guarded)) as archive:
        for info in archive.infolist():
            name = selection.wants(_zip_entry(info))
            if name is None:
                continue
            if info.flag_bits & 0x1:
                raise InvalidUpload("the zip is encrypted; pack it without a password")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise InvalidUpload("the zip is not compressed by deflate; pack it with plain zip")
            with archive.open(info) as source:
                _copy(source, folder / name, limits.max_upload_bytes)
    selection.check_complete()


def _zip_entry(info: zipfile.ZipInfo) -> _Entry:
    mode = info.external_attr >> 16
    is_special = bool(stat.S_IFMT(mode)) and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
    # orig_filename: zipfile cuts `filename` at a NUL and rewrites backslashes.
    return _Entry(
        name=info.orig_filename,
        is_file=not info.is_dir() and not is_special,
        is_folder=info.is_dir() and not is_special,
        size_bytes=info.file_size,
    )


def _extract_tar(file: IO[bytes], folder: Path, limits: AdapterLimits) -> None:
    guarded = _GuardedFile(file, limits.max_upload_bytes, counts_skips=True)
    selection = _Selection(limits)
    with tarfile.open(fileobj=cast("IO[bytes]", guarded), mode="r:") as archive:
        for member in _members(archive):
            entry = _Entry(
                name=member.name,
                is_file=member.isreg() and not member.issparse() and member.size >= 0,
                is_folder=member.isdir(),
                size_bytes=member.size,
            )
            name = selection.wants(entry)
            source = archive.extractfile(member) if name else None
            if name and source is not None:
                with source:
                    _copy(source, folder / name, limits.max_upload_bytes)
    selection.check_complete()


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Iterate over a tar that moves forward only.

    A header with a negative size would lead back, and older Pythons round and round.
    """
    last_offset = -1
    while (member := archive.next()) is not None:
        if member.offset <= last_offset or member.size < 0:
            raise InvalidUpload("the tar's headers do not follow each other")
        last_offset = member.offset
        yield member


def _copy(source: IO[bytes], target: Path, limit_bytes: int) -> None:
    """Stream one file out, by the bytes that come and not by the size that was declared."""
    written = 0
    with target.open("xb") as file:
        while chunk := source.read(_CHUNK_BYTES):
            written += len(chunk)
            if written > limit_bytes:
                raise UploadTooLarge(limit_bytes)
            file.write(chunk)
