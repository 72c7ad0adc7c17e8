"""Adapter files by content: what is under an id never changes, and is whole or absent.

The store is any fsspec file system; a local folder is used in place. From a remote store, a file
is copied once into a local cache, because the engine maps local files.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Final

from fsspec.core import url_to_fs

from loraplex_server.adapters.identity import ID_PREFIX

_SUFFIX: Final = ".safetensors"
_PART_SUFFIX: Final = ".part"


class BlobStore:
    """Owned by the catalogue; safe from any thread, since every file appears by a rename.

    Every method raises OSError when the file system fails.
    """

    def __init__(self, url: str, *, cache_dir: Path) -> None:
        """Open the store and make its folder.

        Args:
            url: a local folder, or what fsspec takes (`s3://bucket/folder`).
            cache_dir: where files of a remote store are copied to; unused by a local one.
        """
        self._fs, self._root = _open_fs(url)
        self._is_local = _is_local(self._fs)
        self._cache_dir = cache_dir
        self._fs.makedirs(self._root, exist_ok=True)

    def put(self, adapter_id: str, file: Path) -> None:
        """Move the local `file` into the store, durably; replaces the same content.

        `file` must be on the store's own disk if the store is local.
        """
        if self._is_local:
            _sync(file)
            file.replace(self._path(adapter_id))
            _sync(Path(self._root))
            return
        part = f"{self._path(adapter_id)}.{file.name}{_PART_SUFFIX}"
        self._fs.put_file(str(file), part)
        self._fs.mv(part, self._path(adapter_id))
        file.unlink()

    def local_path(self, adapter_id: str) -> Path:
        """Return the content as a local file; raises FileNotFoundError if it is not stored."""
        if self._is_local:
            path = Path(self._path(adapter_id))
        else:
            path = self._cache_dir / _file_name(adapter_id)
            if not path.exists():
                self._download(adapter_id, path)
        path.stat()
        return path

    def delete(self, adapter_id: str) -> None:
        """Remove the content here and in the cache; absent is fine."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(adapter_id))
        if not self._is_local:
            (self._cache_dir / _file_name(adapter_id)).unlink(missing_ok=True)

    def sweep(self, keep: Collection[str]) -> list[str]:
        """Delete unfinished files and every id not in `keep`; returns the ids deleted.

        For start-up only: nobody else may be putting.
        """
        orphans = [adapter_id for adapter_id in self._stored_ids() if adapter_id not in keep]
        for adapter_id in orphans:
            self.delete(adapter_id)
        return orphans

    def _stored_ids(self) -> Iterator[str]:
        for listed in self._fs.ls(self._root, detail=False):
            name = PurePosixPath(str(listed)).name
            if name.endswith(_PART_SUFFIX):
                self._fs.rm_file(listed)
            elif name.endswith(_SUFFIX):
                yield ID_PREFIX + name.removesuffix(_SUFFIX)

    def _download(self, adapter_id: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, suffix=_PART_SUFFIX)
        os.close(handle)
        try:
            self._fs.get_file(self._path(adapter_id), part)
            Path(part).replace(path)
        finally:
            Path(part).unlink(missing_ok=True)

    def _path(self, adapter_id: str) -> str:
        return f"{self._root}/{_file_name(adapter_id)}"


def _open_fs(url: str) -> tuple[Any, str]:
    fs, root = url_to_fs(url)
    return fs, str(root).rstrip("/")


def _is_local(fs: Any) -> bool:
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return "file" in protocols


def _file_name(adapter_id: str) -> str:
    return adapter_id.removeprefix(ID_PREFIX) + _SUFFIX


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk, not only in the kernel's cache."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
