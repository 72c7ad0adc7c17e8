"""`file:` sources: regular files below one folder, wherever links point."""

from __future__ import annotations

import os
import stat
from collections.abc import Generator
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from loraplex_server.adapters.errors import SourceFailed, SourceForbidden

CHUNK_BYTES: Final = 1 << 20


def read_local(url: str, root: Path) -> Generator[bytes]:
    """Yield the file's content.

    `file:name` is relative to `root`, `file:///folder/name` absolute and must lie below it.

    Raises:
        SourceForbidden: it is not below `root` once every link is followed, or no regular file.
        SourceFailed: it cannot be read.
    """
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise SourceForbidden("a file: source names no host: file:name or file:///folder/name")
    try:
        folder = root.resolve(strict=True)
        # Judged before it is looked for: what is outside is nobody's to know.
        path = (folder / unquote(parts.path)).resolve()
        if not path.is_relative_to(folder):
            raise SourceForbidden(f"{unquote(parts.path)!r} is not below the server's adapter_root")
        with os.fdopen(_open_below(folder, path), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise SourceForbidden(f"{unquote(parts.path)!r} is not a regular file")
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        raise SourceFailed(f"cannot read {unquote(parts.path)!r}: {reason}") from error


def _open_below(folder: Path, path: Path) -> int:
    """Open a resolved path step by step: a link that was put on the way since leads nowhere."""
    *folders, name = path.relative_to(folder).parts or (".",)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    for part in folders:
        handle = _open_in(handle, part, os.O_DIRECTORY)
    # A pipe may not hold the server up.
    return _open_in(handle, name, os.O_NONBLOCK)


def _open_in(parent: int, name: str, flags: int) -> int:
    try:
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | flags, dir_fd=parent)
    finally:
        os.close(parent)
