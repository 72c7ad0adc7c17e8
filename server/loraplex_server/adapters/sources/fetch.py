"""Bringing a source's files into a quarantine, within its bounds."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Final

from loraplex_server.adapters.archive import WANTED
from loraplex_server.adapters.errors import DigestMismatch, SourceFailed
from loraplex_server.adapters.safetensors_check import WEIGHTS_NAME
from loraplex_server.adapters.sources.https_files import read_https
from loraplex_server.adapters.sources.local_files import read_local
from loraplex_server.adapters.sources.object_files import read_object
from loraplex_server.adapters.sources.source import Source, SourcePolicy
from loraplex_server.adapters.upload import UploadStaging

MAX_FETCH_S: Final = 1800.0


class FetchCancelled(Exception):
    """Nobody waits for it any more."""


def fetch(
    source: Source,
    policy: SourcePolicy,
    staging: UploadStaging,
    *,
    sha256: str | None = None,
    cancelled: threading.Event,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Receive the source's archive, or its two files, in `staging`; `finish` it then.

    Args:
        sha256: 64 hex digits that the archive, or the safetensors file, must have.
        cancelled: gives the fetch up at the next piece that comes.

    Raises:
        SourceForbidden, SourceUnsupported, SourceFailed, DigestMismatch, FetchCancelled
        InvalidUpload, UploadTooLarge, StorageFailed: as an upload does.
    """
    deadline = clock() + MAX_FETCH_S
    for filename, url in source.files().items():
        digest = hashlib.sha256()
        with staging.open_part(filename) as writer, closing(_read(source, url, policy)) as chunks:
            for chunk in chunks:
                if cancelled.is_set():
                    raise FetchCancelled
                if clock() > deadline:
                    raise SourceFailed(f"the source took longer than {MAX_FETCH_S:.0f} s")
                digest.update(chunk)
                writer.write(chunk)
        is_pinned = filename == WEIGHTS_NAME or filename not in WANTED
        if sha256 is not None and is_pinned and digest.hexdigest() != sha256:
            raise DigestMismatch(sha256, digest.hexdigest())


def _read(source: Source, url: str, policy: SourcePolicy) -> Generator[bytes]:
    if source.kind == "file":
        assert policy.root is not None, "a policy without a root refuses files"
        return read_local(url, policy.root)
    if source.kind == "https":
        return read_https(url, allow_private=policy.allow_private)
    return read_object(url)
